"""Small NIfTI files, with headers patched as no library would write them."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest

from mpscl_ray.data.volumes.nifti import read_image
from mpscl_ray.errors import DataError

SHAPE = (5, 4, 3)
AFFINE = np.array([[-1.5, 0, 0, 10], [0, 2.0, 0, -20], [0, 0, 3.0, 30], [0, 0, 0, 1.0]])


def ramp(dtype: str = "i2", shape: tuple[int, ...] = SHAPE) -> npt.NDArray[Any]:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def save(
    path: Path,
    array: npt.NDArray[Any] | None = None,
    affine: npt.NDArray[np.float64] = AFFINE,
    patch: dict[int, bytes] | None = None,
    **fields: Any,
) -> Path:
    """A NIfTI-1 file with both forms, then bytes of its header patched as no library would write them."""
    image = nib.Nifti1Image(ramp() if array is None else array, affine, dtype=None if array is None else array.dtype)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    for name, value in fields.items():
        image.header[name] = value
    content = bytearray(image.to_bytes())
    for offset, piece in (patch or {}).items():
        content[offset : offset + len(piece)] = piece
    path.write_bytes(gzip.compress(bytes(content), mtime=0) if path.suffix == ".gz" else bytes(content))
    return path


def rotated(degrees: float) -> npt.NDArray[np.float64]:
    angle = np.deg2rad(degrees)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    affine = AFFINE.copy()
    affine[:3, :3] = turn @ AFFINE[:3, :3]
    return affine


OFFSETS_1 = {"dim": 40, "datatype": 70, "pixdim": 76, "vox_offset": 108, "slope": 112, "inter": 116, "forms": 252}


def refusal(path: Path, **options: Any) -> str:
    """The error for a file: a single sentence that names it."""
    with pytest.raises(DataError) as caught:
        read_image(path, **options)
    sentence = str(caught.value)
    assert str(path) in sentence
    assert "\n" not in sentence
    return sentence
