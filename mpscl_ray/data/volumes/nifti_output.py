"""Writing label maps and other whole numbers to NIfTI files, in the geometry of an image."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mpscl_ray.data.volumes.file_names import has_ending
from mpscl_ray.data.volumes.nifti import Volume
from mpscl_ray.errors import DataError
from mpscl_ray.runs.atomic_files import write_atomically

_GEOMETRY_FIELDS = (
    *("dim", "pixdim", "xyzt_units", "qform_code", "sform_code"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z"),
)


def write_label_map(path: Path, labels: npt.NDArray[np.uint8], like: Volume, classes: Sequence[str]) -> None:
    """Write class indices as a label map in the geometry of an image, without its texts.

    Affine, sform and qform with their codes, voxel sizes, units and shape are copied from the image file. Nothing else
    is: text fields and extensions may name the patient. The file appears whole or not at all.

    Args:
        path: ``.nii.gz`` or ``.nii``.
        labels: Class indices in the shape of the image's array.
        like: The image that was segmented.
        classes: Names by class index, background first.

    Raises:
        DataError: The labels have another shape than the image, or an index beyond the classes.
        StorageError: The file cannot be written.
    """
    if labels.shape != like.array.shape:
        raise DataError(f"labels of shape {labels.shape} do not fit {like.path}, which has {like.array.shape} voxels")
    if int(labels.max(initial=0)) >= len(classes):
        raise DataError(
            f"label {int(labels.max())} for {like.path} is none of the {len(classes)} classes {', '.join(classes)}"
        )
    _write(path, np.asarray(labels, dtype=np.uint8), like, brightest=len(classes) - 1, intent="label")


def write_values(
    path: Path, values: npt.NDArray[np.generic], like: Volume, slope: float = 1.0, intent: str = "none"
) -> None:
    """Write whole numbers in the geometry of an image, without its texts.

    Args:
        path: ``.nii.gz`` or ``.nii``.
        values: Shape of the image's array, in a type that NIfTI has.
        like: The image.
        slope: Factor that readers multiply stored numbers by.
        intent: What the values are, one of NIfTI's intents.

    Raises:
        StorageError: The file cannot be written; it appears whole or not at all.
    """
    _write(path, values, like, slope=slope, intent=intent)


def _write(
    path: Path,
    values: npt.NDArray[np.generic],
    like: Volume,
    *,
    slope: float = 1.0,
    brightest: float = 0.0,
    intent: str = "none",
) -> None:
    header = type(like.header)(endianness="<")
    for field in _GEOMETRY_FIELDS:
        header[field] = like.header[field]
    header.set_data_dtype(values.dtype)
    header["scl_slope"], header["scl_inter"] = slope, 0.0
    header["cal_min"], header["cal_max"] = 0.0, brightest
    header.set_intent(intent)
    header["vox_offset"] = header.single_vox_offset
    stored = values.astype(values.dtype.newbyteorder("<"), copy=False)
    content = header.binaryblock + b"\0\0\0\0" + stored.tobytes(order="F")
    if has_ending(path.name, (".gz",)):
        content = gzip.compress(content, compresslevel=6, mtime=0)
    write_atomically(path, content)
