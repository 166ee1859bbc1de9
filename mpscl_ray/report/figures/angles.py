"""Distributions of the angle of target features to their prototype: over training (Fig. 9), over runs (Fig. 11)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mpscl_ray.report.figures.style import GREY, evenly_drawn, run_style
from mpscl_ray.runs.palette import hex_colour
from mpscl_ray.runs.structures import display_indices

ROWS = (
    ("nearest", "all pixels,\nby pseudo-label"),
    ("selected", "selected pixels,\nby pseudo-label"),
    ("label", "all pixels, by label\n(for this figure only)"),
)
"""Key of a histogram in a record, and which pixels it counts."""

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
    drawn = evenly_drawn(records)
    last = len(drawn) - 1

    def colour(number: int, pure: str) -> tuple[float, float, float]:
        share = 0.2 + 0.8 * (number + 1) / len(drawn)
        red, green, blue = (1 - share + share * part for part in to_rgb(pure))
        return red, green, blue

    def line(number: int, index: int) -> dict[str, Any]:
        return {"color": colour(number, hex_colour(index)), "linewidth": 2.0 if number == last else 1.1}

    def mean(number: int) -> dict[str, Any] | None:
        return {"linewidth": 0.8, "linestyle": "-" if number == last else ":"} if number in (0, last) else None

    figure = _distributions(drawn, classes, line, mean)
    marks = []
    for number, record in enumerate(drawn):
        when = "start" if record["iteration"] == 0 else f"iteration {record['iteration']}"
        marks.append(Line2D([], [], color=colour(number, "black"), linewidth=1.6, label=when))
    figure.legend(handles=marks, loc="outside upper center", ncols=len(marks))
    return figure


def between_runs(runs: Mapping[str, Record], classes: Sequence[str]) -> Figure:
    """The last record of several runs, such as with and without margin; a line for each run.

    Args:
        runs: title -> record of features.jsonl.
        classes: names, background first.

    Source: Fig. 11, Liu et al. 2022.
    """
    styles = [{**run_style(number), "linewidth": 1.4} for number in range(len(runs))]
    mean = {"linewidth": 0.7, "linestyle": ":"}
    figure = _distributions(list(runs.values()), classes, lambda number, _: styles[number], lambda _: mean)
    marks = [Line2D([], [], label=title, **style) for title, style in zip(runs, styles, strict=True)]
    figure.legend(handles=marks, loc="outside upper center", ncols=min(4, len(marks)))
    return figure


def mean_angle(histogram: Sequence[int]) -> float:
    """Mean of a histogram of degrees, from the centres of its bins; NaN where it is empty."""
    counts = np.asarray(histogram, dtype=np.float64)
    total = counts.sum()
    return float((counts * (np.arange(len(counts)) + 0.5)).sum() / total) if total else float("nan")


def _distributions(
    records: Sequence[Record],
    classes: Sequence[str],
    line: Callable[[int, int], dict[str, Any]],
    mean: Callable[[int], dict[str, Any] | None],
) -> Figure:
    """A panel for each structure and kind of pixels, and in it each record's histogram as a density.

    Args:
        records: in the order in which they are drawn.
        classes: names, background first.
        line: style of a density by the numbers of record and class.
        mean: style of the vertical line at the mean by the number of the record; None for no such line.
    """
    rows = [(key, name) for key, name in ROWS if all(key in record for record in records)]
    columns = display_indices(classes)
    figure = Figure(figsize=(1.75 * len(columns) + 1.0, 1.25 * len(rows) + 0.8), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True)
    used = np.sum([np.sum(record[key][1:], axis=0) for record in records for key, _ in rows], axis=0)
    shown = np.flatnonzero(np.cumsum(used) < 0.998 * used.sum()) if used.sum() else np.array([89])
    for row, (key, name) in enumerate(rows):
        axes[row, 0].set_ylabel(name, fontsize=7)
        for panel, index in zip(axes[row], columns, strict=True):
            for number, record in enumerate(records):
                counts = np.asarray(record[key][index], dtype=np.float64)
                if not counts.sum():
                    continue
                style, mean_style = line(number, index), mean(number)
                density = np.convolve(counts / counts.sum(), _KERNEL, mode="same")
                panel.plot(np.arange(len(density)) + 0.5, density, **style)
                if mean_style is not None:
                    panel.axvline(mean_angle(record[key][index]), color=style["color"], **mean_style)
            if not panel.lines:
                panel.text(0.5, 0.45, "no pixel", transform=panel.transAxes, ha="center", color=GREY, fontsize=7)
            panel.set_yticks([])
            panel.spines["left"].set_visible(False)
            panel.set_xlim(0, min(180, (shown[-1] if len(shown) else 0) + 8))
            panel.set_ylim(bottom=0)
    for panel, index in zip(axes[0], columns, strict=True):
        panel.set_title(classes[index])
    figure.supxlabel("angle to the prototype of the pixel's class, degrees", fontsize=8)
    return figure
