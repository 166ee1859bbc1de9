"""Pictures of a run: its curves, and panels of slices with label maps, in colours that every reader can tell apart."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.patches import Patch
from numpy.typing import NDArray

from mpscl_ray.runs.atomic_files import write_atomically
from mpscl_ray.runs.palette import COLOURS, colour, hex_colour
from mpscl_ray.runs.structures import NOT_ANNOTATED, display_indices, display_order

_CURVES = tuple(hex_colour(index) for index in range(1, len(COLOURS) - 1))
"""The colours of the classes without the last, yellow, which is too pale for a line on white."""

_LINES = ("-", "--", "-.", ":")
_GREY = "#666666"
_DPI = 100
_TILE = 128
_GAP = 4
_HEADER = 24
_OPACITY = 0.55

Record = Mapping[str, Any]


def plot_progress(records: Sequence[Record], path: Path, title: str = "") -> None:
    """Write :func:`progress_figure` as a PNG; an older file is replaced as a whole. Raises StorageError."""
    save_figure(path, progress_figure(records, title))


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG; an older file is replaced as a whole. Raises StorageError."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)  # type: ignore[no-untyped-call]
    write_atomically(path, buffer.getvalue())


def progress_figure(records: Sequence[Record], title: str = "") -> Figure:
    """Losses, shares and validation Dice over the iterations of a run, with a line between phases.

    ``records`` are those of metrics.jsonl, in order.
    """
    shares = ("train/pseudo_label_fraction", *sorted(_tags(records, "train/discriminator_accuracy")))
    structures = [tag.removeprefix("val/dice/") for tag in _tags(records, "val/dice/") if not tag.endswith("/mean")]
    dice = [f"val/dice/{name}" for name in (*display_order(structures), "mean")]
    figure = Figure(figsize=(9, 9), dpi=_DPI, layout="constrained")
    losses_axes, shares_axes, dice_axes = figure.subplots(3, 1, sharex=True)
    # In the order of their first record, not of their names: a loss that comes later changes no colour.
    _curves(losses_axes, records, _tags(records, "train/loss_"), "train/loss_", "training loss")
    _curves(shares_axes, records, shares, "train/", "share")
    shares_axes.set_ylim(-0.02, 1.02)
    _curves(dice_axes, records, [*dice, "val/source/dice/mean"], "val/", "validation Dice")
    dice_axes.set_ylim(-0.02, 1.02)
    dice_axes.set_xlabel("iteration of the run")
    boundaries = _phases(records)
    for axes in (losses_axes, shares_axes, dice_axes):
        for start, _ in boundaries[1:]:
            axes.axvline(start, color=_GREY, linewidth=1)
    for start, name in boundaries:
        losses_axes.annotate(f" {name}", (start, 1.0), xycoords=("data", "axes fraction"), va="bottom", color=_GREY)
    if title:
        figure.suptitle(title)
    return figure


def panel(
    images: NDArray[np.floating[Any]], label_maps: Mapping[str, NDArray[np.integer[Any]]], classes: Sequence[str]
) -> NDArray[np.uint8]:
    """Rows of slices; columns: the image, then the image under each label map. Titles above, classes below.

    Args:
        images: (N, H, W), in any unit: grey runs from their 1st to their 99th percentile.
        label_maps: Title -> (N, H, W) with values 0..C-1, such as source-only, adaptation, label. 0 stays clear, and
            what is not annotated is grey.
        classes: Names, background first.

    Returns:
        RGB image (height, width, 3), uint8.
    """
    grey = grey_slices(images)
    columns = [grey, *(overlay(grey, labels) for labels in label_maps.values())]
    scale = max(1, round(_TILE / max(images.shape[1:])))
    columns = [column.repeat(scale, axis=1).repeat(scale, axis=2) for column in columns]
    count, height, width = columns[0].shape[:3]
    grid = np.full((count * (height + _GAP) - _GAP, len(columns) * (width + _GAP) - _GAP, 3), 255, dtype=np.uint8)
    for index, column in enumerate(columns):
        for row, tile in enumerate(column):
            top, left = row * (height + _GAP), index * (width + _GAP)
            grid[top : top + height, left : left + width] = tile
    return np.concatenate(
        [
            _titles(["image", *label_maps], width, grid.shape[1]),
            grid,
            _legend(classes, label_maps.values(), grid.shape[1]),
        ]
    )


def save_png(path: Path, image: NDArray[np.uint8]) -> None:
    """Write an RGB image (H, W, 3) as PNG; an older file is replaced as a whole. Raises StorageError."""
    buffer = io.BytesIO()
    imsave(buffer, np.ascontiguousarray(image), format="png")
    write_atomically(path, buffer.getvalue())


def _tags(records: Sequence[Record], prefix: str) -> list[str]:
    return list({tag: None for record in records for tag in record if tag.startswith(prefix)})


def _phases(records: Sequence[Record]) -> list[tuple[int, str]]:
    """Where each phase starts: (global step, name)."""
    starts: list[tuple[int, str]] = []
    before = 0
    for record in records:
        name = str(record.get("phase", ""))
        if not starts or starts[-1][1] != name:
            starts.append((before, name))
        before = record["global_step"]
    return starts


def _curves(axes: Axes, records: Sequence[Record], tags: Sequence[str], prefix: str, label: str) -> None:
    """One line for each tag; its colour and its dash each tell it from the others, and stay while the run goes on."""
    for number, tag in enumerate(tags):
        points = [(record["global_step"], float(record[tag])) for record in records if tag in record]
        points = [point for point in points if math.isfinite(point[1])]
        if not points:
            continue
        mean = tag.endswith("/mean")
        axes.plot(
            *zip(*points, strict=True),
            color="black" if mean else _CURVES[number % len(_CURVES)],
            linestyle=_LINES[(number // len(_CURVES) + number) % len(_LINES)],
            linewidth=2 if mean else 1.2,
            marker="o" if len(points) < 30 else "",
            markersize=3,
            label=tag.removeprefix(prefix).removeprefix("dice/").replace("/dice/", " ").replace("_", " "),
        )
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small", frameon=False)
    else:
        axes.text(0.5, 0.5, "nothing measured yet", transform=axes.transAxes, ha="center", color=_GREY)


def grey_slices(images: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """(N, H, W) intensities as (N, H, W, 3) grey, from their 1st to their 99th percentile."""
    low, high = np.percentile(images, (1, 99))
    scaled = np.clip((images - low) / max(float(high - low), 1e-12), 0, 1)
    return np.repeat((255 * scaled).round().astype(np.uint8)[..., None], 3, axis=-1)


def overlay(grey: NDArray[np.uint8], labels: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
    """Grey slices (N, H, W, 3) under the colours of a label map (N, H, W); class 0 stays clear."""
    colours = np.array([(0, 0, 0), *(colour(index) for index in range(1, int(labels.max()) + 1))])
    mixed = (1 - _OPACITY) * grey + _OPACITY * colours[labels]
    return np.where(labels[..., None] > 0, mixed.round(), grey).astype(np.uint8)


def _strip(width: int, height: int) -> Figure:
    return Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")


def _pixels(figure: Figure) -> NDArray[np.uint8]:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba(), dtype=np.uint8)[..., :3]  # type: ignore[no-untyped-call]


def _titles(titles: Sequence[str], tile: int, width: int) -> NDArray[np.uint8]:
    figure = _strip(width, _HEADER)
    for index, title in enumerate(titles):
        figure.text((index * (tile + _GAP) + tile / 2) / width, 0.45, title, ha="center", va="center", fontsize=8)
    return _pixels(figure)


def legend_handles(classes: Sequence[str], label_maps: Iterable[NDArray[np.integer[Any]]]) -> list[Patch]:
    """Colour and name of each class but the background, and of what is not annotated where a map has some."""
    names = {index: classes[index] for index in display_indices(classes)}
    if any((labels == NOT_ANNOTATED).any() for labels in label_maps):
        names[NOT_ANNOTATED] = "not annotated"
    return [Patch(facecolor=hex_colour(index), label=name) for index, name in names.items()]


def _legend(classes: Sequence[str], label_maps: Iterable[NDArray[np.integer[Any]]], width: int) -> NDArray[np.uint8]:
    """:func:`legend_handles` in as many rows as the width needs."""
    handles = legend_handles(classes, label_maps)
    longest = max((len(str(handle.get_label())) for handle in handles), default=1)
    in_a_row = max(1, min(len(handles), width // (7 * longest + 45)))
    figure = _strip(width, _HEADER * max(1, math.ceil(len(handles) / in_a_row)))
    if handles:
        figure.legend(handles=handles, ncols=in_a_row, loc="center", fontsize=8, frameon=False)
    return _pixels(figure)
