"""Does a label map belong to its image, by what both show? No header says that a map is shifted, turned or inverted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.errors import DataError

_MOST_OF_BORDER = 0.5
"""Part of the border of a volume from which a structure there is suspicious."""
_SAMPLE = 30_000
_FEWEST_LABELLED = 100
_BETTER, _BETTER_BY = 1.25, 0.04
"""A moved map has to explain so many times as much of the intensities, and so much more, to be worth a warning.

Of bSSFP and LGE volumes with good labels the best moved map explained 0.5 to 1.14 times as much.
"""
_SHIFTS = (1 / 16, 1 / 8, 1 / 4)
"""Shifts that are tried, as parts of the length of an axis."""


def check_background(label: NDArray[np.uint8], classes: Sequence[str], path: Path) -> list[str]:
    """A warning if one structure covers most of the border of the volume, where background is usual.

    Args:
        label: Class indices (X, Y, Z).
        classes: Names by class index.
        path: File, for messages.

    Raises:
        DataError: There is no background at all: ids that are shifted by one.
    """
    faces = [label.take(end, axis).ravel() for axis in range(label.ndim) for end in (0, -1)]
    counts = np.bincount(np.concatenate(faces), minlength=NOT_ANNOTATED + 1)
    share = counts / counts.sum()
    most = int(counts[1:NOT_ANNOTATED].argmax()) + 1
    if share[most] <= _MOST_OF_BORDER:
        return []
    found = f"{classes[most]} covers {100 * share[most]:.0f} % of the border of the volume"
    if not (label == 0).any():
        raise DataError(
            f"{path} has no background: {found}; if its ids begin with 1 for background, say so in the label table, "
            "e.g. --labels 1=background,2=MYO,3=LV"
        )
    return [f"{found}, where background is usual; check that the label map is not inverted and the label table"]


def blank_slices(image: NDArray[np.float32], label: NDArray[np.uint8]) -> list[str]:
    """A warning on slices of the array that have one intensity throughout, but a label."""
    most = 0
    for axis in range(image.ndim):
        others = tuple(other for other in range(image.ndim) if other != axis)
        blank = image.min(axis=others) == image.max(axis=others)
        if blank.any():
            shown = ((label > 0) & (label < NOT_ANNOTATED)).any(axis=others)
            most = max(most, int(np.count_nonzero(blank & shown)))
    if not most:
        return []
    return [f"the image is empty where the label map shows a structure, in {most} of its slices; check both files"]


def better_placed(image: NDArray[np.float32], label: NDArray[np.uint8]) -> list[str]:
    """A warning if the label map fits its image much better mirrored, with its axes exchanged, or shifted along one.

    How well a map fits is the part of the variance of the intensities that its classes explain.
    """
    at = np.flatnonzero(((label > 0) & (label < NOT_ANNOTATED)).ravel())
    if at.size < _FEWEST_LABELLED:
        return []
    low, high = np.percentile(image.ravel()[at[:: at.size // _SAMPLE + 1]], (1, 99))
    step = max(1, math.ceil((image.size / _SAMPLE) ** (1 / 3)))
    steps = [min(step, max(1, length // 8)) for length in image.shape]
    chosen = [np.arange(size // 2, length, size) for size, length in zip(steps, image.shape, strict=True)]
    spread = high - low
    values = np.clip(image[np.ix_(*chosen)].astype(np.float64), low - spread, high + spread).ravel()
    own = _explained(values, label[np.ix_(*chosen)].ravel())
    fits = {how: _explained(values, moved.ravel()) for how, moved in _moved(label, chosen)}
    how = max(fits, key=fits.__getitem__)
    best = fits[how]
    if best < _BETTER * own or best < own + _BETTER_BY:
        return []
    return [
        f"the label map fits its image better with {how}: its classes then explain {best:.2f} of the variance of the "
        f"intensities, and {own:.2f} as stored; look at both"
    ]


def _moved(label: NDArray[np.uint8], chosen: Sequence[NDArray[np.intp]]) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Chosen rows of each axis of the label map, moved in the ways that an export goes wrong, and what was done."""
    for axes in itertools.permutations(range(3)):
        turned = label.transpose(axes)
        if turned.shape != label.shape:
            continue
        for signs in itertools.product((1, -1), repeat=3):
            how = [] if axes == (0, 1, 2) else [f"its axes in the order {', '.join(map(str, axes))}"]
            mirrored = [str(axis) for axis, sign in enumerate(signs) if sign < 0]
            how += [f"axis {' and '.join(mirrored)} mirrored"] if mirrored else []
            if how:
                yield " and ".join(how), turned[tuple(slice(None, None, sign) for sign in signs)][np.ix_(*chosen)]
    for axis, length in enumerate(label.shape):
        for shift in sorted({sign * round(part * length) for part in _SHIFTS for sign in (-1, 1)} - {0}):
            rows = [(index - shift) % length if other == axis else index for other, index in enumerate(chosen)]
            yield f"a shift by about {shift} voxels along axis {axis}", label[np.ix_(*rows)]


def _explained(values: NDArray[np.float64], label: NDArray[np.uint8]) -> float:
    """Part of the variance of the values that the means of the classes explain."""
    known = label != NOT_ANNOTATED
    values, label = values[known], label[known]
    total = float(((values - values.mean()) ** 2).sum()) if values.size else 0.0
    if total == 0:
        return 0.0
    counts = np.bincount(label)
    means = np.bincount(label, weights=values) / np.maximum(counts, 1)
    return float((counts * (means - values.mean()) ** 2).sum()) / total
