"""Volumes in NRRD and MetaImage files, read by SimpleITK and described by a NIfTI header."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from mpscl_ray.errors import DataError

ITK_ENDINGS = (".nrrd", ".mha")
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
_UNIT_MM = 2


def read_itk(path: Path, max_voxels: int) -> tuple[Any, npt.NDArray[Any], tuple[int, ...], str]:
    """Read a whole file.

    Returns:
        nibabel header, flat voxels with the first axis fastest, shape, and SHA-256 of the file.

    Raises:
        DataError: The file is damaged, too large, or has vectors or complex numbers as voxels.
    """
    import SimpleITK  # Not at the top: few datasets need it, and it takes a while.

    itk: Any = SimpleITK
    reader = itk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        shape = tuple(int(length) for length in reader.GetSize())
        kind = itk.GetPixelIDValueAsString(reader.GetPixelID())
        if reader.GetNumberOfComponents() != 1 or "complex" in kind:
            raise DataError(f"{path} has voxels of type {kind}; expected one real number each")
        if math.prod(shape) > max_voxels:
            raise DataError(f"{path} has {math.prod(shape)} voxels, more than the limit of {max_voxels}; crop it first")
        image = reader.Execute()
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
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
        affine[:3, :3] = _LPS_TO_RAS @ directions * np.asarray(image.GetSpacing()[:3])
        affine[:3, 3] = _LPS_TO_RAS @ np.asarray(image.GetOrigin()[:3])
    header_class: Any = nib.Nifti1Header
    header = header_class()
    header.set_data_dtype(array.dtype)
    header.set_data_shape(shape)
    header["pixdim"][1 : len(shape) + 1] = image.GetSpacing()
    header.set_qform(affine, 1)
    header.set_sform(affine, 1)
    header["xyzt_units"] = _UNIT_MM
    header["scl_slope"], header["scl_inter"] = 1.0, 0.0
    return header, array.reshape(-1), shape, digest
