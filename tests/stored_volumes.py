"""Small volumes in memory, stored in any order and sense, and recipes to prepare them by."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from mpscl_ray.data.volumes.recipe import Recipe

Array = npt.NDArray[Any]
SIGNED_PERMUTATIONS = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]
SPACING = np.array([1.5, 2.0, 3.0])
WHOLE: dict[str, Any] = {"crop": None, "clip_percentile": 100.0}
"""Recipe that only turns the volume."""
RECIPES = [
    Recipe(crop=(5, 6), clip_percentile=100),
    Recipe(crop=(5, 6), size=(9, 3), clip_percentile=100),
    Recipe(crop=(12, 14), crop_depth=3, size=(7, 7), clip_percentile=100, slice_axis="axial"),
    Recipe(crop=(6, 6), spacing_mm=(4.0, 1.0, 2.2), clip_percentile=100, slice_axis="sagittal"),
    Recipe(
        crop=(8, 5), spacing_mm=(None, 1.7, 5.0), size=(6, 6), orientation="stored", slice_axis="1", clip_percentile=100
    ),
]


def ras_volume(shape: tuple[int, int, int] = (7, 9, 8), seed: int = 0) -> tuple[Array, Array, Array]:
    """Image, labels and affine of a volume stored right, anterior, superior."""
    random = np.random.default_rng(seed)
    image = random.normal(100, 20, shape).astype(np.float32)
    label = random.integers(0, 5, shape).astype(np.uint8)
    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = (-20, 5, 60)
    return image, label, affine


def stored_as(array: Array, affine: Array, order: tuple[int, ...], signs: tuple[int, ...]) -> tuple[Array, Array]:
    """The same volume with its array axes in another order and sense, and the affine that says so."""
    turned = array.transpose(order)
    change = np.zeros((4, 4))
    change[3, 3] = 1
    for new, (old, sign) in enumerate(zip(order, signs, strict=True)):
        change[old, new] = sign
        if sign < 0:
            change[old, 3] = array.shape[old] - 1
            turned = np.flip(turned, new)
    return turned.copy(), affine @ change


def ball(shape: tuple[int, int, int], radius: float, spacing: Array) -> Array:
    grid = np.indices(shape).T.T
    offset = (grid - (np.array(shape).reshape(3, 1, 1, 1) - 1) / 2) * spacing.reshape(3, 1, 1, 1)
    return (np.sqrt((offset**2).sum(0)) < radius).astype(np.uint8)
