"""The affine of a NIfTI header: sform, qform and voxel sizes, and which of them is right if they differ."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from nibabel.spatialimages import HeaderDataError

from mpscl_ray.data.volumes.geometry import FloatArray, orientation_letters, voxel_sizes
from mpscl_ray.data.volumes.recipe import GeometryFrom
from mpscl_ray.errors import DataError

OBLIQUE = "the volume is oblique"
"""Begin of the warning that turning to the nearest orientation is inexact."""
_OBLIQUE_DEGREES = 15.0
_LARGEST_POSITION = 1e9
_VOXEL_MM = (0.005, 100.0)
_EXTENT_MM = (2.0, 5000.0)
"""Smallest and largest voxel and volume that count as a scan; others have the wrong unit."""
_MM_PER_UNIT = {1: 1000.0, 3: 0.001}
"""NIfTI codes of metres and micrometres."""


_FORMS: tuple[GeometryFrom, ...] = ("sform", "qform")


class NoPosition(DataError):
    """A header without any usable geometry."""


def header_affine(
    path: Path,
    header: Any,
    shape: tuple[int, int, int],
    assume_spacing_mm: tuple[float, float, float] | None,
    geometry: GeometryFrom | None,
    notices: list[str],
) -> npt.NDArray[np.float64]:
    """Affine of a header, voxel index to RAS+ millimetres; adds warnings to the notices.

    Args:
        path: File, for messages.
        header: nibabel header.
        shape: Of the volume.
        assume_spacing_mm: Voxel size to assume if the header has no usable affine.
        geometry: Which part of the header is right; None refuses a header whose parts contradict each other.
        notices: Warnings.

    Raises:
        DataError: The header has no usable affine, or two that differ in voxel size or orientation.
    """
    affine, problem = _stored_affine(header, geometry)
    if problem:
        return _assumed(path, header, problem, assume_spacing_mm, notices, geometry)
    if geometry is None:
        _refuse_two_meanings(path, header)
    unit = _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7)
    if unit is not None:
        affine[:3] *= unit
        notices.append(f"positions were stored in units of {unit:g} mm and converted")
    spacing = voxel_sizes(affine)
    if (implausible := _implausible(spacing, shape, unit)) and assume_spacing_mm is not None:
        return _assumed(path, header, implausible, assume_spacing_mm, notices)
    if implausible:
        raise DataError(
            f"{path} {implausible}; correct xyzt_units or the voxel sizes of the header, or replace them by "
            "--assume-spacing X,Y,Z"
        )
    directions = affine[:3, :3] / spacing
    angle = math.degrees(math.acos(min(1.0, float(np.abs(directions).max(axis=0).min()))))
    if angle > _OBLIQUE_DEGREES:
        notices.append(
            f"{OBLIQUE}: its axes are up to {angle:.0f} degrees from the patient's "
            f"(nearest orientation {orientation_letters(affine)})"
        )
    if (shear := float(np.abs(directions.T @ directions - np.eye(3)).max())) > 0.01:
        notices.append(
            f"the volume's axes are not at right angles (off by {math.degrees(math.asin(min(1.0, shear))):.0f} degrees)"
        )
    if assume_spacing_mm is not None and not np.allclose(spacing, assume_spacing_mm, rtol=0.01):
        notices.append(
            f"the header has voxels of {_times(spacing)} mm and was taken; --assume-spacing is only for headers "
            "without a usable geometry"
        )
    if np.array_equal(affine, np.eye(4)):
        notices.append("the header says 1 x 1 x 1 mm at the origin, as programs write that do not know the geometry")
    _note_forms_apart(header, shape, geometry, notices)
    return affine


def _assumed(
    path: Path,
    header: Any,
    problem: str,
    assume_spacing_mm: tuple[float, float, float] | None,
    notices: list[str],
    geometry: GeometryFrom | None = None,
) -> npt.NDArray[np.float64]:
    if assume_spacing_mm is None:
        if other := _other_form(header, geometry):
            raise DataError(f"{path} {problem}; {other}")
        ways = ["correct the header", "assume a spacing (--assume-spacing X,Y,Z)"]
        if _usable_sizes(header) and int(header["sform_code"]) <= 0 and int(header["qform_code"]) <= 0:
            ways.append(f"take that of the header's pixdim, {_times(_pixdim(header))} mm (--geometry pixdim)")
        raise NoPosition(
            f"{path} {problem}, so the position of its voxels is unknown; expected an sform or qform, "
            f"{', or '.join(ways)}, to take the axes as right, anterior, superior"
        )
    if len(assume_spacing_mm) != 3 or not all(0 < size < math.inf for size in assume_spacing_mm):
        raise DataError(f"{path}: the assumed spacing {assume_spacing_mm} has to be three sizes in mm above 0")
    notices.append(
        f"the header {problem}; voxels of {_times(assume_spacing_mm)} mm assumed, axes right, anterior, superior"
    )
    return np.diag([*assume_spacing_mm, 1.0]).astype(np.float64)


def _other_form(header: Any, geometry: GeometryFrom | None) -> str:
    """What to do where the sform or qform that was to be used is missing or wrong, and the other is good."""
    good = [kind for kind in _FORMS if not _stored_affine(header, kind)[1]]
    if not good:
        return ""
    if geometry in _FORMS and int(header[f"{geometry}_code"]) <= 0:
        return f"it has {_article(good[0])}: leave --geometry out"
    return f"its {good[0]} is good: give --geometry {good[0]}"


def _article(kind: GeometryFrom) -> str:
    return "an sform" if kind == "sform" else "a qform"


def _implausible(spacing: tuple[float, ...], shape: tuple[int, ...], unit: float | None) -> str:
    """What is wrong with the size of the voxels or of the whole volume, if anything."""
    extent = max(size * length for size, length in zip(spacing, shape, strict=True))
    if _VOXEL_MM[0] <= min(spacing) and max(spacing) <= _VOXEL_MM[1] and _EXTENT_MM[0] <= extent <= _EXTENT_MM[1]:
        return ""
    how = "" if unit is None else f" by its unit of {unit:g} mm"
    return f"has voxels of {_times(spacing)} mm{how}, a volume of up to {extent:.4g} mm, which no scan has"


def _pixdim(header: Any) -> tuple[float, float, float]:
    x, y, z = (abs(float(size)) for size in header["pixdim"][1:4])
    return x, y, z


def _usable_sizes(header: Any) -> bool:
    return all(math.isfinite(size) and size > 0 for size in _pixdim(header))


def _times(sizes: tuple[float, ...]) -> str:
    return " x ".join(f"{size:.5g}" for size in sizes)


def _qform(header: Any) -> npt.NDArray[np.float64] | None:
    """Affine of the qform, whatever its code; None if its quaternion is no rotation."""
    positive = header.copy()
    positive["pixdim"][1:4] = np.abs(positive["pixdim"][1:4])
    try:
        return np.asarray(positive.get_qform(), dtype=np.float64)
    except (HeaderDataError, ValueError):
        return None


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def _stored_affine(header: Any, geometry: GeometryFrom | None) -> tuple[npt.NDArray[np.float64], str]:
    """Affine as stored, sform before qform unless told otherwise, and what is wrong with it, if anything."""
    none = np.full((4, 4), np.nan)
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if not _usable_sizes(header) and geometry != "sform":
        return (
            none,
            f"has voxel sizes {', '.join(f'{float(size):g}' for size in header['pixdim'][1:4])} mm in its header",
        )
    if sform <= 0 and qform <= 0:
        if geometry == "pixdim":
            return np.diag([*_pixdim(header), 1.0]), ""
        return none, "has neither an sform nor a qform"
    if geometry in ("sform", "qform") and {"sform": sform, "qform": qform}[geometry] <= 0:
        return none, f"has no {geometry}, which --geometry asks for"
    if geometry == "sform" or (sform > 0 and geometry != "qform"):
        affine, kind = np.asarray(header.get_sform(), dtype=np.float64), _article("sform")
    else:
        found = _qform(header)
        if found is None:
            return none, "has a qform whose quaternion is no rotation"
        affine, kind = found, _article("qform")
    if not (np.abs(affine) < _LARGEST_POSITION).all():
        return none, f"has {kind} with numbers that are not finite or beyond any scan"
    columns = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    if columns.min() < 1 / _LARGEST_POSITION or abs(np.linalg.det(affine[:3, :3] / columns)) < 1e-3:
        return none, f"has {kind} that is singular"
    if geometry == "pixdim":
        affine[:3, :3] *= np.asarray(_pixdim(header)) / columns
    return affine, ""


@np.errstate(over="ignore", invalid="ignore")
def _refuse_two_meanings(path: Path, header: Any) -> None:
    """Refuse a header whose voxel sizes or orientation are stored in two ways that differ."""
    if int(header["sform_code"]) <= 0:
        return
    sform = np.asarray(header.get_sform(), dtype=np.float64)
    sizes, stated = voxel_sizes(sform), _pixdim(header)
    has_qform = int(header["qform_code"]) > 0
    if not np.allclose(sizes, stated, rtol=0.01):
        raise DataError(
            f"{path} has voxels of {_times(sizes)} mm by its sform and of {_times(stated)} mm by its "
            f"{'qform and pixdim' if has_qform else 'pixdim'}; say which is right: --geometry sform or --geometry "
            f"{'qform' if has_qform else 'pixdim'}"
        )
    qform = _qform(header) if has_qform else None
    if qform is None or not np.isfinite(qform).all():  # a quaternion that is none says nothing against the sform
        return
    letters = orientation_letters(sform), orientation_letters(qform)
    cosines = (sform[:3, :3] / voxel_sizes(sform) * (qform[:3, :3] / voxel_sizes(qform))).sum(axis=0)
    if letters[0] != letters[1] and cosines.min() < math.cos(math.radians(_OBLIQUE_DEGREES)):
        raise DataError(
            f"{path} has the orientation {letters[0]} by its sform and {letters[1]} by its qform; say which is right: "
            "--geometry sform or --geometry qform"
        )


@np.errstate(over="ignore", invalid="ignore")
def _note_forms_apart(header: Any, shape: tuple[int, int, int], geometry: str | None, notices: list[str]) -> None:
    """Warn if sform and qform put the volume in different positions: programs differ in which one they use."""
    if int(header["sform_code"]) <= 0 or int(header["qform_code"]) <= 0:
        return
    qform = _qform(header)
    if qform is None:
        return
    difference = largest_shift(np.asarray(header.get_sform()), qform, shape)
    if 1.0 < difference < math.inf:
        used = {"qform": "the qform", "pixdim": "the sform with the voxel sizes of pixdim"}.get(
            geometry or "", "the sform"
        )
        notices.append(f"sform and qform disagree by up to {difference:.1f} mm; {used} is used")


def largest_shift(first: FloatArray, second: FloatArray, shape: tuple[int, ...]) -> float:
    """Largest distance in mm between where two affines put a corner of the volume."""
    corners = np.array(np.meshgrid(*([0.0, n - 1.0] for n in shape))).reshape(3, -1)
    moved = (first - second)[:3, :3] @ corners + (first - second)[:3, 3:]
    return float(np.sqrt((moved**2).sum(axis=0)).max())
