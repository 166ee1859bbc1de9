"""Figures of a search: the trials' curves, parallel coordinates, and the effect of each setting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from mpscl_ray.runs.plots import save_figure
from mpscl_ray.tune.agreement import rank_correlation
from mpscl_ray.tune.criteria import score
from mpscl_ray.tune.display import short_key
from mpscl_ray.tune.ledger import Trial
from mpscl_ray.tune.space import Distribution

_MAP = matplotlib.colormaps["viridis"]
_GREY = "#666666"
_STATES: Mapping[str | None, dict[str, Any]] = {
    "finished": {"color": "#2166ac", "marker": "o"},
    "stopped": {"color": "#999999", "marker": "x"},
    "failed": {"color": "#b2182b", "marker": "X"},
    None: {"color": "#999999", "marker": "."},
}
"""Colour and mark of a trial by how it ended; None for one that has not."""
_DPI = 110


def curves(trials: Sequence[Trial], metric: str, rungs: Sequence[float], best: int | None, path: Path) -> None:
    """Score over iterations: trials in full are blue, stopped ones grey with a cross at the end, failed ones red.

    Args:
        trials: in any order; one without a score is not drawn.
        metric: what is drawn.
        rungs: iterations at which trials were compared; none without early stopping.
        best: number of the best trial, which is black.
        path: PNG to write.
    """
    figure = Figure(figsize=(9, 5), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    for rung in rungs:
        axes.axvline(rung, color=_GREY, linewidth=0.8, linestyle=":")
    for trial in sorted(trials, key=lambda entry: (entry.number == best, entry.state == "finished")):
        points = [(iteration, score(values, metric)) for iteration, values in sorted(trial.reports.items())]
        points = [point for point in points if math.isfinite(point[1])]
        if not points:
            continue
        chosen = trial.number == best
        end = {**_STATES[trial.state], "zorder": 4} | ({"color": "black"} if chosen else {})
        width, zorder = (2.4, 3) if chosen else (1.3, 2)
        axes.plot(*zip(*points, strict=True), color=end["color"], linewidth=width, zorder=zorder)
        axes.plot(*points[-1], **end)
        _note(axes, str(trial.number), points[-1], offset=6, color=end["color"], zorder=4)
    axes.plot([], [], color="black", linewidth=2.4, label="best")
    for label, state in (("trained in full", "finished"), ("stopped early", "stopped"), ("failed", "failed")):
        axes.plot([], [], label=label, **_STATES[state])
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes.set_xlabel("iteration of the last phase (dotted: rungs)" if rungs else "iteration of the last phase")
    axes.set_ylabel(axis_name(metric))
    axes.grid(alpha=0.3)
    save_figure(path, figure)


def parallel_coordinates(trials: Sequence[Trial], space: Sequence[Distribution], metric: str, path: Path) -> None:
    """One line a trial through its settings to its score; colour is the score, dashed lines were stopped early."""
    scored = _scored(trials, metric)
    figure = Figure(figsize=(max(6.0, 1.8 * (len(space) + 2)), 5), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    scores = [value for _, value in scored]
    low, high = (min(scores), max(scores)) if scores else (0.0, 1.0)
    norm = Normalize(low, high if high > low else low + 1e-9)
    for trial, value in sorted(scored, key=lambda pair: (pair[0].state == "finished", pair[1])):
        heights = [_height(entry, trial.settings[entry.keys[0]]) for entry in space] + [float(norm(value))]
        full = trial.state == "finished"
        dashes, width, alpha = ("-", 2.0, 1.0) if full else ((0, (4, 3)), 1.0, 0.6)
        colour = _MAP(float(norm(value)))
        axes.plot(range(len(heights)), heights, color=colour, linestyle=dashes, linewidth=width, alpha=alpha)
    for position, ticks in enumerate([*map(_ticks, space), [(0.0, f"{low:.3f}"), (1.0, f"{high:.3f}")]]):
        axes.axvline(position, color=_GREY, linewidth=0.8)
        for height, text in ticks:
            _note(axes, text, (position, height))
    axes.set_xticks(range(len(space) + 1), [*map(_label, space), axis_name(metric).replace(" (", "\n(")])
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(space) + 0.35)
    axes.spines[:].set_visible(False)
    axes.set_title("solid: trained in full; dashed: stopped early, score where it stopped", fontsize=9, color=_GREY)
    save_figure(path, figure)


def effects(trials: Sequence[Trial], space: Sequence[Distribution], metric: str, path: Path) -> None:
    """Score against each setting, with the rank correlation over trials in full."""
    columns = len(space) if len(space) < 5 else 3 if len(space) < 7 else 4
    rows = math.ceil(len(space) / columns)
    figure = Figure(figsize=(3.1 * columns, 2.9 * rows), dpi=_DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, entry in zip(grid.flat, space, strict=False):
        _effect(axes, _scored(trials, metric), entry)
    for axes in grid.flat[len(space) :]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel(axis_name(metric))
    figure.suptitle(
        "filled: trained in full; crosses: stopped early, score where they stopped", fontsize=9, color=_GREY
    )
    save_figure(path, figure)


def _effect(axes: Axes, scored: Sequence[tuple[Trial, float]], entry: Distribution) -> None:
    key = entry.keys[0]
    points: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for trial, value in scored:
        at = trial.settings[key]
        points[trial.state == "finished"].append((_position(entry, at) if entry.kind == "choice" else at, value))
    full = points[True]
    for own, state in ((points[False], "stopped"), (full, "finished")):
        if own:
            axes.plot(*zip(*own, strict=True), linestyle="", **_STATES[state])
    if entry.kind == "choice":
        axes.set_xticks(range(len(entry.values)), [str(value) for value in entry.values])
        axes.set_xlim(-0.5, len(entry.values) - 0.5)
        for position in range(len(entry.values)):
            scores = [value for at, value in full if at == position]
            if scores:
                axes.hlines(float(np.mean(scores)), position - 0.2, position + 0.2, color="black")
    elif entry.kind == "loguniform":
        low, high = entry.values
        ticks = (low, math.sqrt(low * high), high)  # those of a logarithmic axis overlap within one decade
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
        axes.set_xticks([], minor=True)
    numeric = entry.kind != "choice" and len(full) > 2
    rho = rank_correlation([at for at, _ in full], [value for _, value in full]) if numeric else math.nan
    axes.set_xlabel(_label(entry), fontsize=9)
    axes.set_title("" if math.isnan(rho) else f"rank correlation {rho:+.2f} ({len(full)} in full)", fontsize=8)
    axes.grid(alpha=0.3)


def axis_name(metric: str) -> str:
    """The label of an axis that shows a criterion."""
    return "target validation Dice (oracle)" if metric == "oracle" else f"{metric.replace('_', ' ')} (no target labels)"


def _note(axes: Axes, text: str, point: tuple[float, float], offset: int = 3, **style: Any) -> None:
    """Write a text to the right of a point."""
    axes.annotate(text, point, xytext=(offset, 0), textcoords="offset points", fontsize=8, va="center", **style)


def _label(entry: Distribution) -> str:
    return "\n".join(map(short_key, entry.keys))


def _scored(trials: Sequence[Trial], metric: str) -> list[tuple[Trial, float]]:
    pairs = [(trial, score(trial.last, metric)) for trial in trials]
    return [pair for pair in pairs if math.isfinite(pair[1])]


def _height(entry: Distribution, value: Any) -> float:
    """Position of a value on its axis, 0 to 1."""
    if entry.kind == "choice":
        return _position(entry, value) / max(1, len(entry.values) - 1)
    low, high = entry.values
    if entry.kind == "loguniform":
        return math.log(value / low) / math.log(high / low)
    return float((value - low) / (high - low))


def _position(entry: Distribution, value: Any) -> int:
    """Number of a choice; True and 1 are two choices."""
    return [repr(choice) for choice in entry.values].index(repr(value))


def _ticks(entry: Distribution) -> list[tuple[float, str]]:
    if entry.kind == "choice":
        return [(_height(entry, value), str(value)) for value in entry.values]
    return [(0.0, f"{entry.values[0]:g}"), (1.0, f"{entry.values[1]:g}")]
