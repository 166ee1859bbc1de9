"""The volumes that the viewer of a report shows, as NIfTI files small enough to be part of a page."""

from __future__ import annotations

import gzip
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from mpscl_ray.data.dataset import Case, Manifest
from mpscl_ray.data.scaling import unscale
from mpscl_ray.data.volumes.geometry import Geometry
from mpscl_ray.data.volumes.recipe import PLANES, Recipe

_UNKNOWN_PLANE = "axial"
"""Slices whose place in the body is not known are shown as this plane shows them: rows down, columns to the right."""


def plane_of(case: Case, manifest: Manifest) -> str | None:
    """Plane of a case's slices; None where it is not known how they lie in the body."""
    recipe = Recipe.from_json(manifest.recipe)
    return recipe.slice_axis if case.geometry and recipe.orientation == "canonical" else None


def display_affine(plane: str | None, spacing_mm: tuple[float, float, float] | None) -> npt.NDArray[np.float64]:
    """(4, 4), voxel (column, row, slice) to RAS+ millimetres, along the axes of the body nearest to the slices.

    Args:
        plane: see :func:`plane_of`.
        spacing_mm: of slices, rows and columns; None for voxels of unknown size, which become cubes.
    """
    affine = np.zeros((4, 4))
    affine[3, 3] = 1.0
    axes = zip(PLANES[plane or _UNKNOWN_PLANE], spacing_mm or (1.0, 1.0, 1.0), strict=True)
    for column, ((world, sense), mm) in zip((2, 1, 0), axes, strict=True):
        affine[world, column] = sense * mm
    return affine


def original_units(slices: npt.NDArray[np.float32], case: Case, manifest: Manifest) -> npt.NDArray[np.float32]:
    """Intensities (D, H, W) as in the image file, but for clipped ones; normalised where those are not known."""
    normalised = unscale(slices, manifest.scaling.low, manifest.scaling.high)
    if not case.geometry:
        return normalised
    geometry = Geometry.from_json(case.geometry)
    return normalised * np.float32(geometry.standard_deviation) + np.float32(geometry.mean)


def unit_of(case: Case, manifest: Manifest) -> str:
    """``HU`` for Hounsfield units; empty for intensities in arbitrary units."""
    return "HU" if case.geometry and Recipe.from_json(manifest.recipe).hounsfield else ""


def encode_image(intensities: npt.NDArray[np.float32], affine: npt.NDArray[np.float64]) -> bytes:
    """(D, H, W) as ``.nii.gz`` with 256 grey values, which the header scales to the intensities."""
    make: Any = nib.Nifti1Image
    image = make(intensities.transpose(2, 1, 0), affine)
    image.header.set_xyzt_units("mm")
    image.header.set_data_dtype(np.uint8)
    return gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)
