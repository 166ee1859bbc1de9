"""Cross-entropy on source and target over the iterations, after Fig. 8."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mpscl_ray.config.titles import phase_title
from mpscl_ray.report.figures.style import GREY

CURVES = (
    ("train/loss_cross_entropy_main", "batches of the labelled domain, training", "#0072b2", "-"),
    ("val/source/loss_cross_entropy", "source, validation", "#009e73", "--"),
    ("val/loss_cross_entropy", "target, validation (labels for this curve only)", "#d55e00", "-."),
)
"""Tag, name, colour and dashes."""

_WINDOW = 9
"""Records in the running median of a training curve."""


@dataclass(frozen=True)
class Training:
    """The losses of one run."""

    title: str
    """Of the run."""
    records: Sequence[Mapping[str, Any]]
    """Of metrics.jsonl."""
    test: Mapping[int, float] = field(default_factory=dict)
    """Global step -> cross-entropy of the test case that the figures show, at the ends of phases."""


def loss_curves(runs: Sequence[Training]) -> Figure:
    """A panel for each run, with a common loss axis."""
    columns = min(2, len(runs))
    rows = math.ceil(len(runs) / columns)
    figure = Figure(figsize=(8.8 if columns > 1 else 7.0, 2.5 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    handles: dict[str, Any] = {}
    largest = 0.0
    for panel, run in zip(axes.flat, runs, strict=False):
        largest = max(largest, _draw(panel, run, handles))
    for panel in axes.flat[len(runs) :]:
        panel.set_visible(False)
    axes[0, 0].set_ylim(0, 1.05 * largest if largest else 1)
    for panel in axes[:, 0]:
        panel.set_ylabel("weighted cross-entropy")
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=min(2, max(1, len(handles))))
    return figure


def has_losses(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there is a curve to draw."""
    return any(tag in record for record in records for tag, *_ in CURVES)


def _draw(axes: Axes, run: Training, handles: dict[str, Any]) -> float:
    """Draw one run; returns the maximum of its smoothed curves."""
    highest = 0.0
    for tag, name, colour, line in CURVES:
        points = [(r["global_step"], float(r[tag])) for r in run.records if tag in r and math.isfinite(r[tag])]
        if not points:
            continue
        steps, values = np.array([step for step, _ in points]), np.array([value for _, value in points])
        if tag.startswith("train/"):
            axes.plot(steps, values, color=colour, linewidth=0.5, alpha=0.35)
            values = _running_median(values)
        mark = "o" if len(points) < 30 else ""
        (handles[name],) = axes.plot(
            steps, values, color=colour, linestyle=line, linewidth=1.6, marker=mark, markersize=2.5
        )
        highest = max(highest, float(values[1:].max() if len(values) > 2 else values.max()))
    if run.test:
        (handles["target, one test volume (labels for these points only)"],) = axes.plot(
            list(run.test), list(run.test.values()), linestyle="", marker="*", markersize=8, color="#cc79a7"
        )
        highest = max(highest, *run.test.values())
    # A forked run starts at the step at which it was forked.
    first = start = run.records[0]["global_step"] - run.records[0]["iteration"]
    for index, record in enumerate(run.records):
        if index == 0 or record["phase"] != run.records[index - 1]["phase"]:
            if index:
                axes.axvline(start, color=GREY, linewidth=0.8)
            name = f" {phase_title(record['phase'])}"
            label = axes.annotate(
                name, (start, 1.0), xycoords=("data", "axes fraction"), va="top", color=GREY, fontsize=7
            )
            label.set_in_layout(False)  # it may be longer than its phase
        start = record["global_step"]
    axes.set_xlim(left=first)
    axes.set_title(run.title)
    axes.set_xlabel("iteration")
    axes.grid(alpha=0.25, linewidth=0.5)
    return highest


def _running_median(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    half = _WINDOW // 2
    return np.array([np.median(values[max(0, at - half) : at + half + 1]) for at in range(len(values))])
