"""Whether a label map is on the grid of its image."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from typing import Any

import nibabel as nib
import numpy as np

from mpscl_ray.data.volumes.geometry import FloatArray, orientation_letters
from mpscl_ray.data.volumes.header_geometry import largest_shift
from mpscl_ray.data.volumes.nifti import Volume
from mpscl_ray.errors import DataError

TOLERANCE_MM = 1e-3
_TOLERANCE_VOXELS = 0.02
"""Part of the smallest voxel by which the corners of two grids may be apart: rounding of headers."""


def check_same_geometry(image: Volume, label: Volume, tolerance: float | None = None) -> None:
    """Refuse a label map that is not on the grid of its image.

    Args:
        image: The image.
        label: Its label map.
        tolerance: Largest distance of a corner, in mm; None allows 0.02 of the smallest voxel.

    Raises:
        DataError: Shapes or affines differ.
    """
    if tolerance is None:
        tolerance = max(TOLERANCE_MM, _TOLERANCE_VOXELS * min(image.spacing_mm))
    if image.array.shape != label.array.shape:
        orders = [order for order in permutations(range(3)) if image.array.shape == _permuted(label.array.shape, order)]
        transposed = (
            f", as if its axes were transposed ({', '.join(map(str, orders[0]))}); transpose it, or" if orders else ";"
        )
        raise DataError(
            f"{label.path} has shape {label.array.shape} but its image {image.path} has {image.array.shape}; expected "
            f"the same grid{transposed} export the label map on the image"
        )
    shift = largest_shift(image.affine, label.affine, image.array.shape)
    if not shift <= tolerance:
        spacings = " and ".join(" x ".join(f"{s:.4g}" for s in volume.spacing_mm) for volume in (label, image))
        letters = [orientation_letters(volume.affine) for volume in (label, image)]
        turned = f"orientations {letters[0]} and {letters[1]}, " if letters[0] != letters[1] else ""
        raise DataError(
            f"{label.path} is not on the grid of its image {image.path}: corners are up to {shift:.3g} mm apart "
            f"({turned}voxels {spacings} mm, affines {_rows(label.affine)} and {_rows(image.affine)}); export the "
            "label map on the image, or give --fix-geometry copy-from-image if only its header is wrong"
        )


def turned_to(image: Volume, label: Volume) -> Volume:
    """The label map with its axes in the order and direction of its image's, if it is the same grid stored otherwise.

    Any other label map is returned as it is.
    """
    if np.abs(image.affine - label.affine).max() <= TOLERANCE_MM and image.array.shape == label.array.shape:
        return label
    orientations: Any = nib.orientations
    start, end = (orientations.io_orientation(volume.affine) for volume in (label, image))
    if np.isnan(start).any() or np.isnan(end).any() or np.array_equal(start, end):
        return label
    turn = orientations.ornt_transform(start, end)
    array = orientations.apply_orientation(label.array, turn)
    affine = label.affine @ orientations.inv_ornt_aff(turn, label.array.shape)
    x, y, z = (label.spacing_mm[int(np.flatnonzero(turn[:, 0] == axis)[0])] for axis in range(3))
    notice = (
        f"the label map is stored {orientation_letters(label.affine)}, its image {orientation_letters(image.affine)}; "
        "the map was turned to the image"
    )
    turned = replace(label, array=array, affine=affine, spacing_mm=(x, y, z), notices=(*label.notices, notice))
    try:
        check_same_geometry(image, turned)
    except DataError:
        return label
    return turned


def _permuted(shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in order)


def _rows(affine: FloatArray) -> str:
    return "[" + "; ".join(" ".join(f"{value:.4g}" for value in row) for row in affine[:3]) + "]"
