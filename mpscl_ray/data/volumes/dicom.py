"""Volumes in DICOM series: the slices of a folder put together, or one sentence on why they are no volume."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mpscl_ray.data.volumes.dicom_files import Series, Slice, find_series
from mpscl_ray.data.volumes.dicom_paths import is_dicom, series_files
from mpscl_ray.data.volumes.geometry import FloatArray
from mpscl_ray.data.volumes.itk_file import LPS_TO_RAS, nifti_header
from mpscl_ray.errors import DataError
from mpscl_ray.runs.wording import counted

_SAME_POSITION_MM = 1e-3
_UNEVEN = 0.05
"""Part of the distance of slices by which one may be off: positions are rounded in headers."""
_TILT = 0.01
"""Sine of the gantry's tilt from which slices are no regular grid."""
_SAME_DIRECTION = 1e-3
_CONVERT = "dcm2niix -ba y"


def volumes_in(folder: Path, found: Sequence[Series]) -> tuple[list[Path], list[Series]]:
    """Paths of the volumes among the DICOM series of a folder, and the series that are none, such as localisers.

    Returns:
        The folder itself if it holds one volume, ``folder/seriesNUMBER`` for each of several.

    Raises:
        DataError: No series is a volume.
    """
    good = [series for series in found if not series.no_volume]
    if not good:
        held = f"no volume among its DICOM series: {_some(found)}" if found else "no image among its DICOM files"
        raise DataError(f"{folder}: {held}; give the folder of a series of parallel slices")
    paths = [folder] if len(good) == 1 else [folder / series.name for series in good]
    return paths, [series for series in found if series.no_volume]


def read_dicom(
    path: Path, max_voxels: int
) -> tuple[Any, npt.NDArray[Any], tuple[int, ...], str, tuple[str, ...], tuple[str, ...], str]:
    """Read a whole series; slopes and intercepts are applied, so that CT is in Hounsfield units.

    Args:
        path: Folder, or ``folder/seriesNUMBER``.
        max_voxels: Largest volume that is read.

    Returns:
        NIfTI header, flat voxels with the first axis fastest, shape, SHA-256 of the files in the order of the slices,
        warnings, fields with texts that may name a person, and the modality in capitals, such as CT or MR.

    Raises:
        DataError: The folder has no volume or several, or the slices are no regular grid.
    """
    series, notices = _choose(path)
    if len(series.slices) == 1:
        raise DataError(
            f"{path}: a DICOM file of {series.slices[0].frames} frames (an enhanced object), which is not read; "
            f"convert it to NIfTI first, e.g. with {_CONVERT}"
        )
    slices = _in_order(path, series)
    if unusable := [one.unusable for one in series.slices if one.unusable]:
        notices = (*notices, f"files of the DICOM series that are left out, {len(unusable)}: {unusable[0]}")
    columns, rows = slices[0].size
    shape = (columns, rows, len(slices))
    if math.prod(shape) > max_voxels:
        raise DataError(f"{path} has {math.prod(shape)} voxels, more than the limit of {max_voxels}; crop it first")
    digest = hashlib.sha256()
    planes = [_pixels(one.path, digest) for one in slices]
    voxels = np.stack(planes)
    first, last = slices[0], slices[-1]
    assert first.spacing is not None
    affine = np.eye(4)
    affine[:3, :2] = LPS_TO_RAS @ first.directions * np.asarray(first.spacing)
    affine[:3, 2] = LPS_TO_RAS @ (last.origin - first.origin) / (len(slices) - 1)
    affine[:3, 3] = LPS_TO_RAS @ first.origin
    header = nifti_header(voxels.dtype, shape, affine)
    private = tuple(dict.fromkeys(name for one in slices for name in one.private))
    return header, voxels.reshape(-1), shape, digest.hexdigest(), notices, private, first.modality


def series_sha256(path: Path) -> str:
    """SHA-256 of the files of a series, as :func:`read_dicom` gives it. Raises DataError and OSError."""
    digest = hashlib.sha256()
    for one in _in_order(path, _choose(path)[0]):
        digest.update(one.path.read_bytes())
    return digest.hexdigest()


def _choose(path: Path) -> tuple[Series, tuple[str, ...]]:
    """The series that a path names, and a warning on series of its folder that are no volumes."""
    folder = path if path.is_dir() else path.parent
    files = [file for file in series_files(path) if is_dicom(file)]
    if not files:
        raise DataError(
            f"{path} is a folder without DICOM files, expected a DICOM series or a .nii.gz file; check the path"
        )
    found = find_series(files)
    paths, others = volumes_in(folder, found)
    if path != folder:
        named = [series for series in found if series.name == path.name]
        if not named:
            raise DataError(f"{path}: no such DICOM series; {folder} holds {_some(found)}")
        if named[0].no_volume:
            raise DataError(f"{path}: no volume: {named[0].describe()}; give a series of parallel slices")
        return named[0], ()
    if len(paths) > 1:
        raise DataError(f"{path} {several(found)}; name one, e.g. {paths[0]}, or take the others out")
    left_out = (f"DICOM series that are no volumes are left out: {_some(others)}",) if others else ()
    return next(series for series in found if not series.no_volume), left_out


def several(found: Sequence[Series]) -> str:
    """That a folder holds several series, with their sizes."""
    return f"holds {len(found)} DICOM series: {_some(found)}"


def _some(found: Sequence[Series]) -> str:
    shown = ", ".join(series.describe() for series in found[:6])
    return shown if len(found) <= 6 else f"{shown} and {len(found) - 6} more"


def _in_order(path: Path, series: Series) -> list[Slice]:
    """The slices from the first to the last along their normal.

    Raises:
        DataError: They differ in size or direction, or are not at equal distances.
    """
    slices = [one for one in series.slices if not one.unusable]
    sizes = Counter(one.size for one in slices)
    if len(sizes) > 1 or any(one.frames > 1 for one in slices):
        counts = ", ".join(f"{count} of {columns} x {rows}" for (columns, rows), count in sizes.most_common(4))
        raise DataError(f"{path}: slices of different sizes in a DICOM series ({counts}); keep those of one size")
    first = slices[0]
    if any(np.abs(one.directions - first.directions).max() > _SAME_DIRECTION for one in slices):
        raise DataError(
            f"{path}: slices in different directions in a DICOM series, as in a localiser or in views of several "
            "planes; keep those of one direction"
        )
    spacings = {one.spacing for one in slices}
    if first.spacing is None or any(
        one is None or not np.allclose(one, first.spacing, rtol=1e-3) or min(one) <= 0 for one in spacings
    ):
        raise DataError(
            f"{path}: the DICOM headers have no pixel spacing, or several; export the series again, or convert it to "
            f"NIfTI and give its voxel size (--assume-spacing X,Y,Z)"
        )
    normal = np.cross(first.directions[:, 0], first.directions[:, 1])
    slices = sorted(slices, key=lambda one: float(one.origin @ normal))
    positions = np.array([one.origin @ normal for one in slices])
    _refuse_repeated(path, slices, positions)
    _refuse_uneven(path, slices, positions)
    along = slices[-1].origin - slices[0].origin
    tilt = math.sqrt(max(0.0, 1 - float(along @ normal / np.linalg.norm(along)) ** 2))
    if tilt > _TILT:
        raise DataError(
            f"{path}: the slices are tilted by {math.degrees(math.asin(tilt)):.1f} degrees against their stack (gantry "
            f"tilt), so they are no grid of right angles; resample them first, e.g. with {_CONVERT}"
        )
    return slices


def _refuse_repeated(path: Path, slices: Sequence[Slice], positions: FloatArray) -> None:
    """Refuse several slices at one position: time points, echoes, or copies."""
    new = np.diff(positions, prepend=-np.inf) > _SAME_POSITION_MM
    counts = np.bincount(np.cumsum(new) - 1)
    if counts.max() == 1:
        return
    if counts.min() == counts.max():
        raise DataError(
            f"{path}: {counts[0]} slices at each of {len(counts)} positions in a DICOM series, as in a 4-D scan "
            f"(phases, echoes); put each volume into its own folder, or convert it with {_CONVERT} and choose time "
            "points (--frames)"
        )
    second = int(np.flatnonzero(~new)[0])
    raise DataError(
        f"{path}: {int(np.sum(counts > 1))} of {len(counts)} positions of a DICOM series have several slices, e.g. "
        f"{slices[second - 1].path.name} and {slices[second].path.name}; take the copies or other phases out"
    )


def _refuse_uneven(path: Path, slices: Sequence[Slice], positions: FloatArray) -> None:
    gaps = np.diff(positions)
    usual = float(np.median(gaps))
    odd = np.flatnonzero(np.abs(gaps - usual) > _UNEVEN * usual)
    if odd.size == 0:
        return
    at = int(odd[np.argmax(gaps[odd])])
    missing = int(np.sum(np.maximum(np.rint(gaps / usual) - 1, 0)))
    raise DataError(
        f"{path}: the slices of a DICOM series are {usual:.4g} mm apart, but {gaps[at]:.4g} mm between "
        f"{slices[at].path.name} and {slices[at + 1].path.name}"
        + (f" ({odd.size} such gaps)" if odd.size > 1 else "")
        + (
            f"; {counted(missing, 'slice')} missing, it seems: export the series again"
            if missing
            else "; resample it to even distances first"
        )
    )


def _pixels(path: Path, digest: hashlib._Hash) -> npt.NDArray[Any]:
    """Pixels (rows, columns) of a file with its slope and intercept applied; the file is added to the digest."""
    import SimpleITK

    itk: Any = SimpleITK
    reader = itk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        image = reader.Execute()
        digest.update(path.read_bytes())
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].removeprefix("ITK ERROR: ")
        raise DataError(
            f"{path} cannot be read by SimpleITK ({reason}): damaged, or compressed in a way that it does not know; "
            f"copy it again, or convert the series with {_CONVERT}"
        ) from None
    array: npt.NDArray[Any] = itk.GetArrayFromImage(image)
    return array.reshape(array.shape[-2:])
