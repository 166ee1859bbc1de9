"""Reading images and label maps from NIfTI files; files that cannot be trusted are refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from nibabel.spatialimages import HeaderDataError

from mpscl_ray.data.volumes.geometry import orientation_letters, voxel_sizes
from mpscl_ray.data.volumes.label_maps import map_labels, whole_ids, write_itksnap_labels
from mpscl_ray.data.volumes.nifti_file import StoredVolume, read_stored
from mpscl_ray.errors import DataError

__all__ = [
    "Volume",
    "check_same_geometry",
    "map_labels",
    "phi_fields",
    "read_image",
    "read_label",
    "write_itksnap_labels",
]

_PIECE = 1 << 22
_OBLIQUE_DEGREES = 15.0
_LARGEST_POSITION = 1e9
_MM_PER_UNIT = {1: 1000.0, 3: 0.001}
"""NIfTI codes of metres and micrometres."""
_TEXT_FIELDS = ("descrip", "db_name", "aux_file", "intent_name", "data_type", "unused_str")


@dataclass(frozen=True)
class Volume:
    """A volume as read from a file."""

    array: npt.NDArray[Any]
    """Three axes in the order of the file: float32 intensities or int32 label ids."""
    affine: npt.NDArray[np.float64]
    """(4, 4), voxel index to RAS+ millimetres."""
    spacing_mm: tuple[float, float, float]
    """Voxel size along each array axis."""
    path: Path
    sha256: str
    """SHA-256 of the file."""
    header: Any
    """nibabel header as stored, for writing a label map of the same geometry."""
    notices: tuple[str, ...]
    """Warnings, each a sentence without the path."""


def read_image(
    path: Path | str,
    *,
    assume_spacing_mm: tuple[float, float, float] | None = None,
    max_voxels: int = 2**31,
) -> Volume:
    """Read a grey-value image.

    Args:
        path: ``.nii`` or ``.nii.gz``, NIfTI-1 or NIfTI-2.
        assume_spacing_mm: Voxel size to assume, axes as right, anterior, superior, if the header has no usable one.
        max_voxels: Largest volume that is read.

    Returns:
        float32 intensities, slope and intercept applied.

    Raises:
        DataError: The file is damaged, no single volume of real numbers, lacks a usable geometry, holds a voxel that
            is not finite, or has one intensity throughout.
    """
    opened = _open(Path(path), assume_spacing_mm, max_voxels)
    flat = np.empty(opened.stored.voxels.size, dtype=np.float32)
    low, high, broken, first = math.inf, -math.inf, 0, -1
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE]
        with np.errstate(over="ignore", invalid="ignore"):
            piece[:] = opened.values(start)
        finite = np.isfinite(piece)
        if not finite.all():
            first = start + int(np.argmin(finite)) if broken == 0 else first
            broken += int(piece.size - np.count_nonzero(finite))
        else:
            low, high = min(low, float(piece.min())), max(high, float(piece.max()))
    if broken:
        raise DataError(
            f"{path} has {broken} voxels that are NaN, infinite or beyond single precision, the first at index "
            f"{opened.index(first)}; expected finite intensities, export it again or set these voxels"
        )
    if low == high:
        raise DataError(f"{path} has the intensity {low:g} in every voxel and cannot be normalised; leave it out")
    return opened.volume(flat)


def read_label(
    path: Path | str,
    *,
    assume_spacing_mm: tuple[float, float, float] | None = None,
    max_voxels: int = 2**31,
) -> Volume:
    """Read a label map; ids may be stored as real numbers, such as 200.0.

    Args:
        path: ``.nii`` or ``.nii.gz``, NIfTI-1 or NIfTI-2.
        assume_spacing_mm: Voxel size to assume, axes as right, anterior, superior, if the header has no usable one.
        max_voxels: Largest volume that is read.

    Returns:
        int32 ids, as in the file.

    Raises:
        DataError: As `read_image`, but one id throughout is allowed; or an id is further than 0.001 from a whole
            number or beyond 32 bits.
    """
    opened = _open(Path(path), assume_spacing_mm, max_voxels)
    flat = np.empty(opened.stored.voxels.size, dtype=np.int32)
    wrong, first, example = 0, -1, 0.0
    for start in range(0, flat.size, _PIECE):
        values = opened.values(start).astype(np.float64)
        whole, good = whole_ids(values)
        if not good.all():
            if wrong == 0:
                first = int(np.argmin(good))
                example = float(values[first])
                first += start
            wrong += int(good.size - np.count_nonzero(good))
        else:
            flat[start : start + _PIECE] = whole
    if wrong:
        raise DataError(
            f"{path} has {wrong} voxels whose label is no whole number of 32 bits, the first is {example:g} at index "
            f"{opened.index(first)}; expected label ids, perhaps the map was interpolated or is an image"
        )
    return opened.volume(flat)


@dataclass(frozen=True)
class _Opened:
    """A file with a valid header, its voxels still as stored."""

    path: Path
    stored: StoredVolume
    shape: tuple[int, int, int]
    affine: npt.NDArray[np.float64]
    spacing_mm: tuple[float, float, float]
    slope: float
    intercept: float
    notices: tuple[str, ...]

    def values(self, start: int) -> npt.NDArray[Any]:
        """The next `_PIECE` voxels from a position in the file, slope and intercept applied."""
        raw = self.stored.voxels[start : start + _PIECE]
        if self.slope == 1.0 and self.intercept == 0.0:
            return raw
        return raw.astype(np.float64) * self.slope + self.intercept

    def index(self, position: int) -> tuple[int, ...]:
        return tuple(int(i) for i in np.unravel_index(position, self.shape, order="F"))

    def volume(self, flat: npt.NDArray[Any]) -> Volume:
        array = flat.reshape(self.shape, order="F")
        return Volume(
            array, self.affine, self.spacing_mm, self.path, self.stored.sha256, self.stored.header, self.notices
        )


def _open(path: Path, assume_spacing_mm: tuple[float, float, float] | None, max_voxels: int) -> _Opened:
    stored = read_stored(path, max_voxels)
    shape, notices = _volume_shape(path, stored)
    affine, spacing_mm = _geometry(path, stored.header, shape, assume_spacing_mm, notices)
    slope, intercept = _slope(path, stored.header, notices)
    return _Opened(path, stored, shape, affine, spacing_mm, slope, intercept, tuple(notices))


def _volume_shape(path: Path, stored: StoredVolume) -> tuple[tuple[int, int, int], list[str]]:
    notices = list(stored.notices)
    shape = stored.shape
    text = " x ".join(str(n) for n in shape)
    if len(shape) < 3:
        raise DataError(
            f"{path} is a single picture of {text} pixels, expected a volume with three axes; join the slices of a "
            f"patient to a volume"
        )
    if math.prod(shape[3:]) > 1:
        raise DataError(
            f"{path} has {len(shape)} axes ({text}), expected one volume with three axes; save one time point or "
            f"channel as a separate file"
        )
    if len(shape) > 3:
        notices.append(f"the trailing axes of length 1 of {text} were dropped")
    return (shape[0], shape[1], shape[2]), notices


def _slope(path: Path, header: Any, notices: list[str]) -> tuple[float, float]:
    """Slope and intercept to apply: none if the slope is 0 (the NIfTI rule) or not finite."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        notices.append(f"intensity slope {slope:g} means that stored values are taken as they are")
        return 1.0, 0.0
    if not math.isfinite(intercept):
        raise DataError(
            f"{path} has intensity slope {slope:g} but intercept {intercept}; expected a finite one, export it again"
        )
    return slope, intercept


def _geometry(
    path: Path,
    header: Any,
    shape: tuple[int, int, int],
    assume_spacing_mm: tuple[float, float, float] | None,
    notices: list[str],
) -> tuple[npt.NDArray[np.float64], tuple[float, float, float]]:
    affine, problem = _stored_affine(header)
    if problem:
        if assume_spacing_mm is None:
            raise DataError(
                f"{path} {problem}, so the position of its voxels is unknown; expected an sform or qform, correct the "
                f"header or assume a spacing (--assume-spacing) to take the axes as right, anterior, superior"
            )
        if len(assume_spacing_mm) != 3 or not all(0 < s < math.inf for s in assume_spacing_mm):
            raise DataError(f"{path}: the assumed spacing {assume_spacing_mm} has to be three sizes in mm above 0")
        affine = np.diag([*assume_spacing_mm, 1.0]).astype(np.float64)
        sizes = " x ".join(f"{s:g}" for s in assume_spacing_mm)
        notices.append(f"the header {problem}; voxels of {sizes} mm assumed, axes right, anterior, superior")
        return affine, voxel_sizes(affine)
    unit = _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7)
    if unit is not None:
        affine[:3] *= unit
        notices.append(f"positions were stored in units of {unit:g} mm and converted")
    spacing = voxel_sizes(affine)
    directions = affine[:3, :3] / spacing
    angle = math.degrees(math.acos(min(1.0, float(np.abs(directions).max(axis=0).min()))))
    if angle > _OBLIQUE_DEGREES:
        notices.append(
            f"the volume is oblique: its axes are up to {angle:.0f} degrees from the patient's "
            f"(nearest orientation {orientation_letters(affine)})"
        )
    if (shear := float(np.abs(directions.T @ directions - np.eye(3)).max())) > 0.01:
        notices.append(
            f"the volume's axes are not at right angles (off by {math.degrees(math.asin(min(1.0, shear))):.0f} degrees)"
        )
    _compare_forms(header, shape, notices)
    return affine, spacing


@np.errstate(over="ignore", invalid="ignore")
def _stored_affine(header: Any) -> tuple[npt.NDArray[np.float64], str]:
    """Affine as stored, sform before qform, and what is wrong with it, if anything."""
    none = np.full((4, 4), np.nan)
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if sform <= 0 and qform <= 0:
        return none, "has neither an sform nor a qform"
    pixdim = [float(size) for size in header["pixdim"][1:4]]
    if not all(math.isfinite(size) and size != 0 for size in pixdim):
        return none, f"has voxel sizes {', '.join(f'{s:g}' for s in pixdim)} mm in its header"
    if sform > 0:
        affine = np.asarray(header.get_sform(), dtype=np.float64)
        kind = "an sform"
    else:
        positive = header.copy()
        positive["pixdim"][1:4] = np.abs(positive["pixdim"][1:4])
        try:
            affine = np.asarray(positive.get_qform(), dtype=np.float64)
        except (HeaderDataError, ValueError):
            return none, "has a qform whose quaternion is no rotation"
        kind = "a qform"
    if not (np.abs(affine) < _LARGEST_POSITION).all():
        return none, f"has {kind} with numbers that are not finite or beyond any scan"
    columns = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    if columns.min() < 1 / _LARGEST_POSITION or abs(np.linalg.det(affine[:3, :3] / columns)) < 1e-3:
        return none, f"has {kind} that is singular"
    return affine, ""


@np.errstate(over="ignore", invalid="ignore")
def _compare_forms(header: Any, shape: tuple[int, int, int], notices: list[str]) -> None:
    """Warn if the header describes the geometry in two ways that differ: programs differ in which one they use."""
    if int(header["sform_code"]) <= 0:
        return
    used = np.sqrt((np.asarray(header.get_sform(), dtype=np.float64)[:3, :3] ** 2).sum(axis=0))
    stated = np.abs(np.asarray(header["pixdim"][1:4], dtype=np.float64))
    if not np.allclose(used, stated, rtol=0.01):
        sizes = [" x ".join(f"{size:.4g}" for size in three) for three in (stated, used)]
        notices.append(
            f"the voxel sizes of the header, {sizes[0]}, differ from those of its sform, {sizes[1]}, which is used"
        )
    if int(header["qform_code"]) <= 0:
        return
    try:
        difference = _largest_shift(np.asarray(header.get_sform()), np.asarray(header.get_qform()), shape)
    except (HeaderDataError, ValueError):
        return
    if not difference <= 1.0:
        notices.append(f"sform and qform disagree by up to {difference:.1f} mm; the sform is used")


def _largest_shift(first: npt.NDArray[Any], second: npt.NDArray[Any], shape: tuple[int, ...]) -> float:
    """Largest distance in mm between where two affines put a corner of the volume."""
    corners = np.array(np.meshgrid(*([0.0, n - 1.0] for n in shape))).reshape(3, -1)
    moved = (first - second)[:3, :3] @ corners + (first - second)[:3, 3:]
    return float(np.sqrt((moved**2).sum(axis=0)).max())


def check_same_geometry(image: Volume, label: Volume, tolerance: float = 1e-3) -> None:
    """Refuse a label map that is not on the grid of its image.

    Args:
        image: The image.
        label: Its label map.
        tolerance: Largest difference of an entry of the two affines, in mm.

    Raises:
        DataError: Shapes or affines differ.
    """
    if image.array.shape != label.array.shape:
        raise DataError(
            f"{label.path} has shape {label.array.shape} but its image {image.path} has {image.array.shape}; expected "
            f"the same grid, export the label map on the image"
        )
    if float(np.abs(image.affine - label.affine).max()) > tolerance:
        shift = _largest_shift(image.affine, label.affine, image.array.shape)
        spacings = " and ".join(" x ".join(f"{s:.4g}" for s in volume.spacing_mm) for volume in (label, image))
        raise DataError(
            f"{label.path} is not on the grid of its image {image.path}: corners are up to {shift:.3g} mm apart "
            f"(voxels {spacings} mm, affines {_rows(label.affine)} and {_rows(image.affine)}); export the label map on "
            f"the image"
        )


def _rows(affine: npt.NDArray[np.float64]) -> str:
    return "[" + "; ".join(" ".join(f"{value:.4g}" for value in row) for row in affine[:3]) + "]"


def phi_fields(header: Any) -> dict[str, str]:
    """Non-empty header fields that may hold names of people or places.

    Returns:
        Field to text; extensions as ``extension 1`` and so on, with their code and length only.
    """
    found = {}
    for field in (name for name in _TEXT_FIELDS if name in header):
        text = bytes(header[field].item()).strip(b"\0 ").decode("latin-1")
        if text:
            found[field] = text
    for number, extension in enumerate(header.extensions, start=1):
        found[f"extension {number}"] = f"code {extension.get_code()}, {len(extension.get_content())} bytes"
    return found
