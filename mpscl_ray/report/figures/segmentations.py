"""Slices with the label maps of several segmenters side by side, after Fig. 6, and their entropy, after Fig. 2."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.ndimage
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.data.slice_selection import evenly_spaced, labelled_slices
from mpscl_ray.report.figures.style import ERROR, class_legend, image_grid, wrapped
from mpscl_ray.runs.plots import grey_slices, overlay

CONFIDENT = 0.1
"""A prediction is confident where its entropy is below this share of log C."""

_TILE = 1.25
_ENTROPY_MAP = "magma"
_ROWS = 3
"""Slices of the figure of confident errors."""
_BOXES = 4
_SMALLEST_BOX = 6
"""Pixels of the smallest error that gets a box."""


@dataclass(frozen=True)
class Segmented:
    """The prediction of one segmenter for one case."""

    title: str
    """Of the segmenter."""
    labels: NDArray[np.uint8]
    """(D, H, W) class indices."""
    entropy: NDArray[np.float32]
    """(D, H, W) of its probabilities over log C, in [0, 1]."""

    def errors(self, truth: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """(D, H, W): where it is wrong."""
        errors: NDArray[np.bool_] = (self.labels != truth) & (truth != NOT_ANNOTATED)
        return errors

    def confident_errors(self, truth: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """(D, H, W): where it is wrong and confident."""
        return self.errors(truth) & (self.entropy < CONFIDENT)


def side_by_side(
    images: NDArray[np.float32],
    columns: Sequence[Segmented],
    truth: NDArray[np.uint8] | None,
    classes: Sequence[str],
    slices: NDArray[np.intp],
) -> Figure:
    """Rows: slices. Columns: the image, the label map of each segmenter, the ground truth where there is one.

    Args:
        images: (D, H, W).
        columns: segmenters, all of this case.
        truth: (D, H, W), or None.
        classes: names, background first.
        slices: which to show.
    """
    grey = grey_slices(images[slices])
    shown = [("image", grey), *((column.title, overlay(grey, column.labels[slices])) for column in columns)]
    if truth is not None:
        shown.append(("ground truth", overlay(grey, truth[slices])))
    figure, _ = _rows_of_slices(shown, slices)
    class_legend(figure, classes, truth)
    return figure


def overconfident(
    images: NDArray[np.float32],
    columns: Sequence[Segmented],
    truth: NDArray[np.uint8] | None,
    classes: Sequence[str],
) -> Figure:
    """Slices with prediction and entropy of each segmenter, and red boxes around confident errors.

    The slices are those in which the first segmenter has most such pixels, some distance apart. Without ground truth
    they are evenly spaced among those in which it predicts a structure, and there are no boxes.

    Arguments as of :func:`side_by_side`.

    Source: Fig. 2, Liu et al. 2022.
    """
    if truth is None:
        chosen = evenly_spaced(labelled_slices(columns[0].labels), _ROWS)
    else:
        chosen = _worst(columns[0].confident_errors(truth).sum(axis=(1, 2)))
    grey = grey_slices(images[chosen])
    shown: list[tuple[str, NDArray[Any]]] = [("image", grey)]
    for column in columns:
        shown += [(column.title, overlay(grey, column.labels[chosen])), ("its entropy", column.entropy[chosen])]
    if truth is not None:
        shown.append(("ground truth", overlay(grey, truth[chosen])))
    figure, axes = _rows_of_slices(shown, chosen)
    if truth is not None:
        for position, column in enumerate(columns):
            for row, errors in enumerate(column.confident_errors(truth)[chosen]):
                for box, tile in itertools.product(_boxes(errors), axes[row, 1 + 2 * position : 3 + 2 * position]):
                    tile.add_patch(Rectangle(*box, fill=False, edgecolor=ERROR, linewidth=1.1))
    scale = figure.colorbar(
        ScalarMappable(Normalize(0, 1), _ENTROPY_MAP), ax=list(axes[:, -1]), fraction=0.08, pad=0.04, aspect=30
    )
    scale.set_label("entropy / log C")
    scale.outline.set_visible(False)
    class_legend(figure, classes, truth)
    return figure


def confident_share(column: Segmented, truth: NDArray[np.uint8]) -> float:
    """Share of a segmenter's wrong pixels whose entropy is low; NaN where none is wrong."""
    wrong = int(column.errors(truth).sum())
    return float(column.confident_errors(truth).sum()) / wrong if wrong else math.nan


def _rows_of_slices(
    columns: Sequence[tuple[str, NDArray[Any]]], slices: NDArray[np.intp]
) -> tuple[Figure, NDArray[Any]]:
    """A row for each slice; a title and a picture of each slice, RGB or a share in [0, 1], for each column."""
    height, width = columns[0][1].shape[1:3]
    figure, axes = image_grid(len(slices), len(columns), (_TILE * width / height, _TILE))
    for position, (title, tiles) in enumerate(columns):
        axes[0, position].set_title(wrapped(title))
        for row, tile in enumerate(tiles):
            axes[row, position].imshow(tile, cmap=_ENTROPY_MAP, vmin=0, vmax=1, interpolation="nearest")
    for row, index in enumerate(slices):
        axes[row, 0].set_ylabel(f"slice {index}", fontsize=7)
    return figure, axes


def _worst(errors: NDArray[np.integer]) -> NDArray[np.intp]:
    """Slices with most errors, at least a twelfth of the volume apart; in order."""
    apart = max(1, len(errors) // 12)
    chosen: list[int] = []
    for index in np.argsort(-errors, kind="stable"):
        if len(chosen) < _ROWS and all(abs(index - other) >= apart for other in chosen):
            chosen.append(int(index))
    return np.array(sorted(chosen))


def _boxes(errors: NDArray[np.bool_]) -> list[tuple[tuple[float, float], float, float]]:
    """(left, top), width and height around the largest connected errors of a slice, two pixels off."""
    parts, _ = scipy.ndimage.label(errors, structure=np.ones((3, 3)))
    sizes = np.bincount(parts.ravel())[1:]
    found = []
    objects = scipy.ndimage.find_objects(parts)
    for index in np.argsort(-sizes, kind="stable")[:_BOXES]:
        if sizes[index] >= _SMALLEST_BOX:
            rows, columns = objects[index]
            left, top = columns.start - 2.5, rows.start - 2.5
            found.append(((left, top), columns.stop - left + 1.5, rows.stop - top + 1.5))
    return found
