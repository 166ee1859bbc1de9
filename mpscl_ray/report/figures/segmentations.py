"""Slices with the label maps of several segmenters side by side, after Fig. 6, and their entropy, after Fig. 2."""

from __future__ import annotations

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

from mpscl_ray.data.slice_selection import evenly_spaced, labelled_slices
from mpscl_ray.report.figures.style import ERROR, class_legend, image_grid, wrapped
from mpscl_ray.runs.plots import grey_slices, overlay

CONFIDENT = 0.1
"""A prediction is called confident where its entropy is below this share of log C."""

_TILE = 1.25
_BOXES = 4
_SMALLEST_BOX = 6
"""Pixels of an error that is worth a box."""


@dataclass(frozen=True)
class Segmented:
    """One case as one segmenter sees it.

    Attributes:
        title: of the segmenter.
        labels: (D, H, W) class indices.
        entropy: (D, H, W) of its probabilities over log C, in [0, 1].
    """

    title: str
    labels: NDArray[np.uint8]
    entropy: NDArray[np.float32]

    def confident_errors(self, truth: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """(D, H, W): where it is wrong and has little doubt."""
        errors: NDArray[np.bool_] = (self.labels != truth) & (self.entropy < CONFIDENT)
        return errors


def side_by_side(
    images: NDArray[np.float32],
    columns: Sequence[Segmented],
    truth: NDArray[np.uint8] | None,
    classes: Sequence[str],
    slices: Sequence[int] | NDArray[np.intp],
) -> Figure:
    """Rows: slices. Columns: the image, the label map of each segmenter, the ground truth where there is one.

    Args:
        images: (D, H, W).
        columns: segmenters, all of this case.
        truth: (D, H, W), or None.
        classes: names, background first.
        slices: which to show.
    """
    chosen = np.asarray(slices)
    grey = grey_slices(images[chosen])
    shown = [("image", grey), *((column.title, overlay(grey, column.labels[chosen])) for column in columns)]
    if truth is not None:
        shown.append(("ground truth", overlay(grey, truth[chosen])))
    figure, axes = image_grid(len(chosen), len(shown), (_TILE * grey.shape[2] / grey.shape[1], _TILE))
    for column, (title, tiles) in enumerate(shown):
        axes[0, column].set_title(wrapped(title))
        for row, tile in enumerate(tiles):
            axes[row, column].imshow(tile, interpolation="nearest")
    for row, index in enumerate(chosen):
        axes[row, 0].set_ylabel(f"slice {index}", fontsize=7)
    class_legend(figure, classes)
    return figure


def overconfident(
    images: NDArray[np.float32],
    columns: Sequence[Segmented],
    truth: NDArray[np.uint8] | None,
    classes: Sequence[str],
    number: int = 3,
) -> Figure:
    """Slices with prediction and entropy of each segmenter, and red boxes around what is wrong without doubt.

    The slices are those in which the first segmenter has most such pixels, apart from one another; without ground truth
    evenly spaced ones among those in which it predicts a structure, and no boxes.

    Args:
        images: (D, H, W).
        columns: segmenters, all of this case.
        truth: (D, H, W), or None.
        classes: names, background first.
        number: slices.

    Source: Fig. 2, Liu et al. 2022.
    """
    if truth is None:
        chosen = evenly_spaced(labelled_slices(columns[0].labels), number)
    else:
        chosen = _worst(columns[0].confident_errors(truth).sum(axis=(1, 2)), number)
    grey = grey_slices(images[chosen])
    total = 1 + 2 * len(columns) + (truth is not None)
    figure, axes = image_grid(len(chosen), total, (_TILE * grey.shape[2] / grey.shape[1], _TILE))
    _titles(axes[0], ["image", *(part for column in columns for part in (column.title, "its entropy"))])
    for row, index in enumerate(chosen):
        axes[row, 0].imshow(grey[row], interpolation="nearest")
        axes[row, 0].set_ylabel(f"slice {index}", fontsize=7)
        for place, column in enumerate(columns):
            prediction, entropy = axes[row, 1 + 2 * place], axes[row, 2 + 2 * place]
            prediction.imshow(overlay(grey[[row]], column.labels[[index]])[0], interpolation="nearest")
            entropy.imshow(column.entropy[index], cmap="magma", vmin=0, vmax=1, interpolation="nearest")
            if truth is not None:
                for box in _boxes(column.confident_errors(truth)[index]):
                    for place_of_box in (prediction, entropy):
                        place_of_box.add_patch(Rectangle(*box, fill=False, edgecolor=ERROR, linewidth=1.1))
        if truth is not None:
            axes[row, -1].imshow(overlay(grey[[row]], truth[[index]])[0], interpolation="nearest")
    if truth is not None:
        axes[0, -1].set_title("ground truth")
    scale = figure.colorbar(
        ScalarMappable(Normalize(0, 1), "magma"), ax=list(axes[:, -1]), fraction=0.08, pad=0.04, aspect=30
    )
    scale.set_label("entropy / log C")
    scale.outline.set_visible(False)
    class_legend(figure, classes)
    return figure


def confident_share(column: Segmented, truth: NDArray[np.uint8]) -> float:
    """Share of a segmenter's wrong pixels whose entropy is low; NaN where none is wrong."""
    wrong = int((column.labels != truth).sum())
    return float(column.confident_errors(truth).sum()) / wrong if wrong else math.nan


def _titles(axes: NDArray[Any], titles: Sequence[str]) -> None:
    for place, title in zip(axes, titles, strict=False):
        place.set_title(wrapped(title))


def _worst(errors: NDArray[np.integer], number: int) -> NDArray[np.intp]:
    """Slices with most errors, none within a twelfth of the volume of another; in order."""
    apart = max(1, len(errors) // 12)
    chosen: list[int] = []
    for index in np.argsort(-errors, kind="stable"):
        if all(abs(index - other) >= apart for other in chosen):
            chosen.append(int(index))
        if len(chosen) == number:
            break
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
