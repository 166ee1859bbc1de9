"""Reading images and label maps from NIfTI files; files that cannot be trusted are refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mpscl_ray.data.volumes.geometry import voxel_sizes
from mpscl_ray.data.volumes.header_geometry import OBLIQUE, header_affine
from mpscl_ray.data.volumes.label_maps import whole_ids
from mpscl_ray.data.volumes.nifti_file import StoredVolume, read_stored
from mpscl_ray.data.volumes.personal_data import private_fields
from mpscl_ray.data.volumes.recipe import GeometryFrom, NanPolicy, Recipe
from mpscl_ray.errors import DataError
from mpscl_ray.runs.wording import counted

_PIECE = 1 << 22


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
    private: tuple[str, ...] = ()
    """Kinds of texts in the header that may name a person; the texts themselves are not kept."""
    scanner: str = ""
    """Modality by the DICOM header, such as CT or MR; empty for files of other formats."""
    segments: Mapping[int, str] = field(default_factory=dict)
    """Names of label values, as a segmentation of 3D Slicer has them."""

    def notices_for(self, recipe: Recipe) -> tuple[str, ...]:
        """The warnings that matter to a recipe: slices that are taken as stored may be oblique."""
        stored = recipe.orientation == "stored"
        return tuple(notice for notice in self.notices if not (stored and notice.startswith(OBLIQUE)))


class SeveralVolumesError(DataError):
    """The file has more than one volume, such as time points."""


def read_image(
    path: Path | str,
    *,
    assume_spacing_mm: tuple[float, float, float] | None = None,
    geometry: GeometryFrom | None = None,
    frame: int | None = None,
    nan_policy: NanPolicy = "error",
    max_voxels: int = 2**31,
) -> Volume:
    """Read a grey-value image.

    Args:
        path: ``.nii`` or ``.nii.gz``, NIfTI-1 or NIfTI-2; ``.nrrd``, ``.mha``, or a folder with a DICOM series.
        assume_spacing_mm: Voxel size to assume, axes as right, anterior, superior, if the header has no usable one.
        geometry: Which part of the header is right; None refuses a header whose parts contradict each other.
        frame: Time point to read of a volume that has a time axis; None refuses one.
        nan_policy: What becomes of voxels that are not finite.
        max_voxels: Largest volume that is read.

    Returns:
        float32 intensities, slope and intercept applied.

    Raises:
        DataError: The file is damaged, no single volume of real numbers, lacks a usable geometry, holds a voxel that
            is not finite, or has one intensity throughout.
    """
    opened = _open(Path(path), assume_spacing_mm, geometry, frame, max_voxels)
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
            piece = piece[finite]
        if piece.size:
            low, high = min(low, float(piece.min())), max(high, float(piece.max()))
    notices: tuple[str, ...] = ()
    if broken and (nan_policy == "error" or broken == flat.size):
        raise DataError(
            f"{path} is NaN, infinite or beyond single precision in {counted(broken, 'voxel')}, the first at index "
            f"{opened.index(first)}; expected finite intensities, export it again, or give --nan-policy lowest or zero "
            "to set these voxels to the lowest finite intensity or to 0"
        )
    if broken:
        value = 0.0 if nan_policy == "zero" else low
        flat[~np.isfinite(flat)] = value
        low, high = min(low, value), max(high, value)
        notices = (f"NaN or infinite intensities were set to {value:g}: {counted(broken, 'voxel')}",)
    if low == high:
        raise DataError(f"{path} has the intensity {low:g} in every voxel and cannot be normalised; leave it out")
    return opened.volume(flat, notices)


def read_label(
    path: Path | str,
    *,
    assume_spacing_mm: tuple[float, float, float] | None = None,
    geometry: GeometryFrom | None = None,
    frame: int | None = None,
    max_voxels: int = 2**31,
) -> Volume:
    """Read a label map; ids may be stored as real numbers, such as 200.0.

    Args:
        path: ``.nii`` or ``.nii.gz``, NIfTI-1 or NIfTI-2; ``.nrrd``, ``.mha``, or a folder with a DICOM series.
        assume_spacing_mm: Voxel size to assume, axes as right, anterior, superior, if the header has no usable one.
        geometry: Which part of the header is right; None refuses a header whose parts contradict each other.
        frame: Time point to read of a volume that has a time axis; None refuses one.
        max_voxels: Largest volume that is read.

    Returns:
        int32 ids, as in the file.

    Raises:
        DataError: As `read_image`, but one id throughout is allowed; or an id is further than 0.001 from a whole
            number or beyond 32 bits.
    """
    opened = _open(Path(path), assume_spacing_mm, geometry, frame, max_voxels)
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
            f"{path} has labels that are no whole numbers of 32 bits in {counted(wrong, 'voxel')}, the first is "
            f"{example:g} at index "
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

    def volume(self, flat: npt.NDArray[Any], notices: tuple[str, ...] = ()) -> Volume:
        array = flat.reshape(self.shape, order="F")
        told = (*self.notices, *notices)
        stored = self.stored
        private = stored.private or private_fields(stored.header)
        return Volume(
            array,
            self.affine,
            self.spacing_mm,
            self.path,
            stored.sha256,
            stored.header,
            told,
            private,
            stored.scanner,
            stored.segments,
        )


def _open(
    path: Path,
    assume_spacing_mm: tuple[float, float, float] | None,
    geometry: GeometryFrom | None,
    frame: int | None,
    max_voxels: int,
) -> _Opened:
    stored = read_stored(path, max_voxels)
    shape, notices = _volume_shape(path, stored, frame)
    if frame is not None and math.prod(stored.shape[3:]) > 1:
        size = math.prod(shape)
        if frame >= stored.shape[3]:
            raise DataError(f"{path} has {stored.shape[3]} time points, and none with the number {frame}")
        stored = replace(stored, voxels=stored.voxels[frame * size : (frame + 1) * size])
    affine = header_affine(path, stored.header, shape, assume_spacing_mm, geometry, notices)
    slope, intercept = _slope(path, stored.header, notices)
    return _Opened(path, stored, shape, affine, voxel_sizes(affine), slope, intercept, tuple(notices))


def _volume_shape(path: Path, stored: StoredVolume, frame: int | None) -> tuple[tuple[int, int, int], list[str]]:
    notices = list(stored.notices)
    shape = stored.shape
    text = " x ".join(str(n) for n in shape)
    if len(shape) < 3:
        raise DataError(
            f"{path} is a single picture of {text} pixels, expected a volume with three axes; join the slices of a "
            f"patient to a volume"
        )
    if math.prod(shape[3:]) > 1 and (frame is None or len(shape) != 4):
        raise SeveralVolumesError(
            f"{path} has {len(shape)} axes ({text}), expected one volume with three axes; extract one time point "
            f"or channel as a separate file"
        )
    if len(shape) > 3 and math.prod(shape[3:]) == 1:
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
