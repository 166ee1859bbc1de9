"""The Dice of each case, by structure: a point for each case, a bar at the mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from mpscl_ray.report.figures.style import run_style

_WIDTH = 0.8
"""Of the points of one structure, on an axis where structures are 1 apart."""


def dice_by_case(columns: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Points of all cases, a colour for each segmenter.

    Args:
        columns: title of a segmenter -> structure, in display order -> Dice in [0, 1] of each case.
    """
    structures = list(next(iter(columns.values())))
    figure = Figure(figsize=(max(5.0, 1.4 * len(structures) + 1.5), 3.0), layout="constrained")
    axes = figure.subplots()
    step = _WIDTH / len(columns)
    for number, (title, by_structure) in enumerate(columns.items()):
        colour = run_style(number)["color"]
        for at, values in enumerate(by_structure.values()):
            if not values:
                continue
            centre = at - _WIDTH / 2 + (number + 0.5) * step
            places = centre + 0.6 * step * (np.linspace(-0.5, 0.5, len(values)) if len(values) > 1 else np.zeros(1))
            axes.plot(places, 100 * np.sort(values), "o", color=colour, markersize=3, alpha=0.6, linewidth=0)
            mean = 100 * float(np.mean(values))
            label = title if not axes.get_legend_handles_labels()[1].count(title) else None
            axes.plot([centre - 0.4 * step, centre + 0.4 * step], [mean, mean], color=colour, linewidth=2, label=label)
    axes.set_xticks(range(len(structures)), structures)
    axes.set_ylim(-2, 102)
    axes.set_ylabel("Dice %")
    axes.grid(axis="y", alpha=0.25, linewidth=0.5)
    figure.legend(loc="outside lower center", ncols=min(4, len(columns)))
    return figure
