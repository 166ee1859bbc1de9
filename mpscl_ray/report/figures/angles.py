"""Distributions of the angle of target features to their prototype: over training (Fig. 9), over runs (Fig. 11)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mpscl_ray.report.figures.style import GREY, RUN_COLOURS, RUN_LINES
from mpscl_ray.runs.palette import hex_colour
from mpscl_ray.runs.structures import display_indices

ROWS = (
    ("nearest", "all pixels,\nby pseudo-label"),
    ("selected", "selected pixels,\nby pseudo-label"),
    ("label", "all pixels, by label\n(for this figure only)"),
)
"""Key of a histogram in a record, and which pixels it counts."""

_DRAWN = 5
"""Records drawn of a run, evenly spaced over the adaptation."""

_KERNEL = np.array([1.0, 2.0, 3.0, 2.0, 1.0]) / 9.0
"""Smooths histograms over five degrees."""

Record = Mapping[str, Any]


def over_training(records: Sequence[Record], classes: Sequence[str]) -> Figure:
    """Columns: structures. Rows: by pseudo-label and by label. Lines: records, from pale (first) to dark (last).

    Args:
        records: of features.jsonl, in order; at least one.
        classes: names, background first.

    Source: Fig. 9, Liu et al. 2022.
    """
    rows = [(key, name) for key, name in ROWS if key in records[-1]]
    drawn = [records[index] for index in sorted(set(np.linspace(0, len(records) - 1, _DRAWN).round().astype(int)))]
    figure, axes = _panels(rows, classes)
    for row, (key, _) in enumerate(rows):
        for panel, index in zip(axes[row], display_indices(classes), strict=True):
            for number, record in enumerate(drawn):
                depth = 0.2 + 0.8 * (number + 1) / len(drawn)
                shade = _mixed(hex_colour(index), depth)
                last = number == len(drawn) - 1
                mean = _line(
                    panel, record[key][index], color=shade, linewidth=2.0 if last else 1.1, label=_when(record)
                )
                if mean is not None and (last or number == 0):
                    panel.axvline(mean, color=shade, linewidth=0.8, linestyle="-" if last else ":")
    _finish(figure, axes, [record[key] for record in drawn for key, _ in rows])
    handles, labels = [], []
    for number, record in enumerate(drawn):
        depth = 0.2 + 0.8 * (number + 1) / len(drawn)
        (handle,) = axes[0, 0].plot([], [], color=_mixed("#000000", depth), linewidth=1.6)
        handles.append(handle)
        labels.append(_when(record))
    figure.legend(handles, labels, loc="outside upper center", ncols=len(drawn))
    return figure


def between_runs(runs: Mapping[str, Record], classes: Sequence[str]) -> Figure:
    """The last record of several runs, such as with and without margin; a line for each run.

    Args:
        runs: title -> record of features.jsonl.
        classes: names, background first.

    Source: Fig. 11, Liu et al. 2022.
    """
    rows = [(key, name) for key, name in ROWS if all(key in record for record in runs.values())]
    figure, axes = _panels(rows, classes)
    handles: dict[str, Any] = {}
    for row, (key, _) in enumerate(rows):
        for panel, index in zip(axes[row], display_indices(classes), strict=True):
            for number, (title, record) in enumerate(runs.items()):
                style = {
                    "color": RUN_COLOURS[number % len(RUN_COLOURS)],
                    "linestyle": RUN_LINES[number % len(RUN_LINES)],
                    "linewidth": 1.4,
                }
                (handles[title],) = panel.plot([], [], **style)
                mean = _line(panel, record[key][index], **style)
                if mean is not None:
                    panel.axvline(mean, color=style["color"], linewidth=0.7, linestyle=":")
    _finish(figure, axes, [record[key] for record in runs.values() for key, _ in rows])
    figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=min(4, len(handles)))
    return figure


def mean_angle(histogram: Sequence[int]) -> float:
    """Mean of a histogram of degrees, from the centres of its bins; NaN where it is empty."""
    counts = np.asarray(histogram, dtype=np.float64)
    total = counts.sum()
    return float((counts * (np.arange(len(counts)) + 0.5)).sum() / total) if total else float("nan")


def _panels(rows: Sequence[tuple[str, str]], classes: Sequence[str]) -> tuple[Figure, NDArray[Any]]:
    columns = len(classes) - 1
    figure = Figure(figsize=(1.75 * columns + 1.0, 1.25 * len(rows) + 0.8), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False, sharex=True)
    for row, (_, name) in enumerate(rows):
        axes[row, 0].set_ylabel(name, fontsize=7)
    for panel, index in zip(axes[0], display_indices(classes), strict=True):
        panel.set_title(classes[index])
    return figure, axes


def _line(axes: Axes, histogram: Sequence[int], **style: Any) -> float | None:
    """Draw a histogram as a density; returns its mean, None where it is empty."""
    counts = np.asarray(histogram, dtype=np.float64)
    if not counts.sum():
        return None
    density = np.convolve(counts / counts.sum(), _KERNEL, mode="same")
    axes.plot(np.arange(len(density)) + 0.5, density, **style)
    return mean_angle(histogram)


def _finish(figure: Figure, axes: NDArray[Any], histograms: Sequence[Sequence[Sequence[int]]]) -> None:
    used = np.sum([np.sum(histogram[1:], axis=0) for histogram in histograms], axis=0)
    shown = np.flatnonzero(np.cumsum(used) < 0.998 * used.sum()) if used.sum() else np.array([89])
    for panel in axes.flat:
        panel.set_yticks([])
        panel.spines["left"].set_visible(False)
        panel.set_xlim(0, min(180, (shown[-1] if len(shown) else 0) + 8))
        panel.set_ylim(bottom=0)
        if not any(len(np.atleast_1d(line.get_xdata())) > 2 for line in panel.lines):
            panel.text(0.5, 0.45, "no pixel", transform=panel.transAxes, ha="center", color=GREY, fontsize=7)
    figure.supxlabel("angle to the prototype of the pixel's class, degrees", fontsize=8)


def _when(record: Record) -> str:
    return "start" if record["iteration"] == 0 else f"iteration {record['iteration']}"


def _mixed(colour: str, share: float) -> tuple[float, float, float]:
    """A colour mixed with white: a share of 1 is the pure colour."""
    red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return (1 - share + share * red, 1 - share + share * green, 1 - share + share * blue)
