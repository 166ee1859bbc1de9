"""Volumes in NRRD and MetaImage files, read by SimpleITK and described by a NIfTI header."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from mpscl_ray.data.volumes.file_names import SEGMENTATION_ENDING, has_ending
from mpscl_ray.data.volumes.geometry import FloatArray
from mpscl_ray.data.volumes.personal_data import is_private_key
from mpscl_ray.errors import DataError

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
DEFLATE_LIMIT = 1040
"""No deflate stream holds more than this many bytes per compressed byte."""
_UNIT_MM = 2
_LARGEST_HEADER = 1 << 20
_NO_DIRECTIONS = "the header has no directions; its axes are taken as left, posterior, superior"


def read_itk(
    path: Path, max_voxels: int
) -> tuple[Any, npt.NDArray[Any], tuple[int, ...], str, tuple[str, ...], tuple[str, ...], str, dict[int, str]]:
    """Read a whole file.

    Returns:
        nibabel header, flat voxels with the first axis fastest, shape, SHA-256 of the file, warnings, keys with texts
        that may name a person, the modality (unknown, empty), and the names of label values in a segmentation of 3D
        Slicer. A header without voxel sizes has none here either.

    Raises:
        DataError: The file is damaged, too large, keeps its voxels in another file, or has vectors or complex numbers
            as voxels.
    """
    start = _check_one_file(path)
    import SimpleITK  # Not at the top: few datasets need it, and it takes a while.

    itk: Any = SimpleITK
    reader = itk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        shape = tuple(int(length) for length in reader.GetSize())
        kind = itk.GetPixelIDValueAsString(reader.GetPixelID())
        if reader.GetNumberOfComponents() != 1 or "complex" in kind:
            layers = "; overlapping segments of 3D Slicer are in layers: export them as one label map"
            hint = layers if has_ending(path.name, (SEGMENTATION_ENDING,)) else ""
            raise DataError(f"{path} has voxels of type {kind}; expected one real number each{hint}")
        if math.prod(shape) > max_voxels:
            raise DataError(f"{path} has {math.prod(shape)} voxels, more than the limit of {max_voxels}; crop it first")
        size_in_bytes = path.stat().st_size
        if math.prod(shape) > size_in_bytes * DEFLATE_LIMIT:
            raise DataError(
                f"{path} is truncated or its header is wrong: its {size_in_bytes} bytes cannot hold "
                f"{math.prod(shape)} voxels; copy or export it again"
            )
        image = reader.Execute()
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].removeprefix("ITK ERROR: ")
        raise DataError(f"{path} cannot be read by SimpleITK ({reason}); copy or export it again") from None
    array = itk.GetArrayFromImage(image)
    if array.dtype.kind == "b":
        array = array.astype(np.uint8)
    affine = np.eye(4)
    if len(shape) >= 3:
        size = image.GetDimension()
        directions = np.reshape(image.GetDirection(), (size, size))[:3, :3]
        affine[:3, :3] = LPS_TO_RAS @ directions * np.asarray(image.GetSpacing()[:3])
        affine[:3, 3] = LPS_TO_RAS @ np.asarray(image.GetOrigin()[:3])
    header = nifti_header(array.dtype, shape, affine)
    header["pixdim"][1 : len(shape) + 1] = image.GetSpacing()
    sizes, directions_given = _stated(start)
    if not sizes:  # SimpleITK makes them 1 mm
        header["pixdim"][1:4], header["sform_code"], header["qform_code"] = 0, 0, 0
    notices = () if directions_given or not sizes else (_NO_DIRECTIONS,)
    private = tuple(key for key in reader.GetMetaDataKeys() if is_private_key(key) and reader.GetMetaData(key).strip())
    return header, array.reshape(-1), shape, digest, notices, private, "", _segments(reader)


def _stated(start: bytes) -> tuple[bool, bool]:
    """Whether a header has voxel sizes, and whether it has directions."""
    nrrd = start.startswith(b"NRRD")
    end = re.search(rb"\n\r?\n" if nrrd else rb"ElementDataFile", start)
    keys = {
        re.sub(r"[\s_]", "", key.decode("latin-1")).lower()
        for key in re.findall(rb"^\s*([A-Za-z _]+?)\s*[:=]", start[: end.start() if end else None], re.MULTILINE)
    }
    if nrrd:
        return bool(keys & {"spacings", "spacedirections"}), "spacedirections" in keys
    return bool(keys & {"elementspacing", "elementsize"}), bool(keys & {"transformmatrix", "rotation", "orientation"})


def _segments(reader: Any) -> dict[int, str]:
    """Label value -> name, as 3D Slicer writes them."""
    keys, found = set(reader.GetMetaDataKeys()), {}
    for key in keys:
        named = re.fullmatch(r"(Segment\d+)_LabelValue", key)
        value = reader.GetMetaData(key).strip() if named else ""
        if named and re.fullmatch(r"\d{1,9}", value) and f"{named[1]}_Name" in keys:
            found[int(value)] = reader.GetMetaData(f"{named[1]}_Name").strip()
    return found


def _check_one_file(path: Path) -> bytes:
    """Begin of the file; a header whose voxels are in another file, which could be any of this machine, is refused."""
    with path.open("rb") as file:
        start = file.read(_LARGEST_HEADER)
    if start.startswith(b"NRRD"):
        others = re.findall(rb"^\s*data ?file\s*:\s*([^\r\n]*)", start, re.MULTILINE | re.IGNORECASE)
        whole = re.search(rb"\n\r?\n", start) is not None
    else:
        named = re.findall(rb"^\s*ElementDataFile\s*[=:]\s*([^\r\n]*)", start, re.MULTILINE | re.IGNORECASE)
        others = [name for name in named if name.strip().lower() != b"local"]
        whole = bool(named)
    if others:
        raise DataError(
            f"{path} keeps its voxels in another file ({others[0].decode('utf-8', 'replace').strip()!r}), which is not "
            "read; export it as one file"
        )
    if not whole:
        raise DataError(f"{path} has no whole header of an NRRD or MetaImage file; copy or export it again")
    return start


def nifti_header(dtype: np.dtype[Any], shape: tuple[int, ...], affine: FloatArray) -> Any:
    """A NIfTI header without texts.

    Args:
        dtype: Of the voxels.
        shape: Of the volume.
        affine: (4, 4), voxel index to RAS+ millimetres; becomes sform and qform.
    """
    header_class: Any = nib.Nifti1Header
    header = header_class()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header.set_qform(affine, 1)
    header.set_sform(affine, 1)
    header["xyzt_units"] = _UNIT_MM
    header["scl_slope"], header["scl_inter"] = 1.0, 0.0
    return header
