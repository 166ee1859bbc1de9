"""Self-paced pseudo-labels of a few target slices during the adaptation, after Fig. 10, and how many are right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from mpscl_ray.data.label_values import is_structure
from mpscl_ray.report.figures.style import class_colours, class_legend, evenly_drawn, image_grid, run_style
from mpscl_ray.runs.plots import grey_slices, overlay
from mpscl_ray.train.feature_log import PseudoLabels

COLUMNS = ("nearest prototype", "difference of\ncosines", "selected", "pseudo-label")
_SLICES = 2


def refinement(
    panels: Sequence[PseudoLabels],
    shown: Mapping[str, NDArray[Any]],
    iterations: Mapping[int, int],
    classes: Sequence[str],
    delta_th: float,
) -> Figure:
    """Rows: the slice, then records from first to last. Four columns for each of two slices, a line between them.

    Args:
        panels: records in order; at least one.
        shown: the slices (:meth:`FeatureRecord.read_slices`).
        iterations: global step -> iteration of the adaptation.
        classes: names, background first.
        delta_th: threshold on the difference.

    Source: Fig. 10, Liu et al. 2022.
    """
    drawn = evenly_drawn(panels)
    slices = _largest(panels, shown)
    highest = max(float(panel.difference.max()) for panel in drawn)
    ratios = ([1.0] * len(COLUMNS) + [0.18]) * len(slices)
    figure, axes = image_grid(len(drawn) + 1, len(ratios) - 1, (1.12, 1.14), ratios[:-1])
    for tile in axes.flat:
        tile.set_facecolor("none")
    palette = class_colours(len(classes))
    for position, index in enumerate(slices):
        first = position * (len(COLUMNS) + 1)
        _draw_slice(axes[0, first : first + 2], shown, index)
        for row, panel in enumerate(drawn, start=1):
            _draw_record(axes[row, first : first + len(COLUMNS)], panel, index, palette, highest)
        for tile, title in zip(axes[1, first:], COLUMNS, strict=False):
            tile.set_title(title, fontsize=7)
    for row, panel in enumerate(drawn, start=1):
        iteration = iterations.get(panel.global_step)
        when = f"step {panel.global_step}" if iteration is None else f"iteration\n{iteration}" if iteration else "start"
        axes[row, 0].set_ylabel(when, fontsize=7)
    scale = figure.colorbar(
        ScalarMappable(Normalize(0, highest), "viridis"), ax=list(axes[1:, -1]), fraction=0.09, pad=0.05, aspect=35
    )
    scale.set_label("difference of cosines")
    scale.outline.set_visible(False)
    if delta_th < highest:
        scale.ax.axhline(delta_th, color="white", linewidth=1.5)
    class_legend(figure, classes, shown.get("label"))
    if len(slices) > 1:
        _dotted_line(figure, axes)
    return figure


def _draw_slice(tiles: NDArray[Any], shown: Mapping[str, NDArray[Any]], index: int) -> None:
    """A slice, and beside it its ground truth where there is one."""
    grey = grey_slices(shown["image"][[index]])
    tiles[0].imshow(grey[0], interpolation="nearest")
    tiles[0].set_title(f"slice {shown['slice_index'][index]}")
    if "label" in shown:
        tiles[1].imshow(overlay(grey, shown["label"][[index]])[0], interpolation="nearest")
        tiles[1].set_title("ground truth")


def _draw_record(
    tiles: NDArray[Any], panel: PseudoLabels, index: int, palette: NDArray[np.uint8], highest: float
) -> None:
    """The four columns of one slice in one record."""
    nearest, selected = panel.nearest[index], panel.selected[index]
    pseudo = palette[nearest].copy()
    pseudo[~selected] = 255
    tiles[0].imshow(palette[nearest], interpolation="nearest")
    tiles[1].imshow(panel.difference[index], cmap="viridis", vmin=0, vmax=highest, interpolation="nearest")
    tiles[2].imshow(selected, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    tiles[3].imshow(pseudo, interpolation="nearest")
    for tile in tiles:
        for spine in tile.spines.values():
            spine.set_visible(True)
            spine.set_linewidth(0.4)


def selection_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Shares of pixels: selected; of these labelled as a structure; of these labelled correctly.

    Args:
        runs: title -> records of features.jsonl, at least one of each.
    """
    figure = Figure(figsize=(8.6, 2.4), layout="constrained")
    axes = figure.subplots(1, 3, sharex=True)
    titles = (
        "pixels selected, share of all",
        "pseudo-label is a structure,\nshare of selected",
        "right where pseudo-label is a\nstructure (by labels, for this only)",
    )
    for number, (title, records) in enumerate(runs.items()):
        style = {**run_style(number), "marker": "o", "markersize": 2.5}
        shares = [_shares(record) for record in records]
        for panel, values in zip(axes, zip(*shares, strict=True), strict=True):
            panel.plot([record["iteration"] for record in records], values, label=title, **style)
    for panel, title in zip(axes, titles, strict=True):
        panel.set_title(title)
        panel.set_ylim(-0.02, 1.02)
        panel.set_xlabel("iteration of the adaptation")
        panel.grid(alpha=0.25, linewidth=0.5)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    return figure


def _shares(record: Mapping[str, Any]) -> tuple[float, float, float]:
    nearest, selected = (np.sum(record[name], axis=1) for name in ("nearest", "selected"))
    share = selected.sum() / max(nearest.sum(), 1)
    structures = selected[1:].sum() / selected.sum() if selected.sum() else np.nan
    right = np.nan
    if "selected_confusion" in record:
        confusion = np.asarray(record["selected_confusion"])[:, 1:]
        right = confusion[1:].trace() / confusion.sum() if confusion.sum() else np.nan
    return float(share), float(structures), float(right)


def _largest(panels: Sequence[PseudoLabels], shown: Mapping[str, NDArray[Any]]) -> list[int]:
    """The slices with the largest structures: by their labels, else by the last record."""
    maps = shown["label"] if "label" in shown else panels[-1].nearest
    sizes = is_structure(maps).sum(axis=(1, 2))
    return sorted(int(index) for index in np.argsort(-sizes, kind="stable")[:_SLICES])


def _dotted_line(figure: Figure, axes: NDArray[Any]) -> None:
    """A line between the two slices, drawn once the layout is known."""
    figure.draw_without_rendering()
    gap = axes[1, len(COLUMNS)].get_position()
    top, bottom = axes[0, 0].get_position().y1, axes[-1, 0].get_position().y0
    middle = (gap.x0 + gap.x1) / 2
    figure.set_layout_engine("none")
    figure.add_artist(Line2D([middle, middle], [bottom, top], linestyle=":", color="black", linewidth=1))
