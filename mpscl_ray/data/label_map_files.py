"""Label maps on the grid of the image files: what scores are taken on.

``FOLDER/label_maps/<split>/<case>.nii.gz`` holds the class indices of a labelled case, in the array order and geometry
of its image file, whatever ids and orientation its label file had. ``labels.json`` beside them names the classes, so
the score command takes the folder as it is.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.spatialimages import HeaderDataError

from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.data.dataset import LABEL_MAPS, Case, StoredFile, label_map_file, stored_file
from mpscl_ray.errors import DataError
from mpscl_ray.runs.atomic_files import write_atomically
from mpscl_ray.runs.storage import S3Path, cached_file, read_limited

_LARGEST_MAP = 1 << 31
"""Bytes of a label map, unpacked."""
_AGAIN = "prepare the dataset again"


def encode_label_map(labels: npt.NDArray[np.uint8], affine: npt.NDArray[np.float64]) -> bytes:
    """Content of a ``.nii.gz`` file.

    Args:
        labels: (X, Y, Z) class indices in the order of the image file.
        affine: (4, 4), voxel index to RAS+ millimetres.
    """
    make: Any = nib.Nifti1Image
    image = make(labels, affine)
    image.header.set_xyzt_units("mm")
    image.header.set_intent("label")
    return gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)


def write_label_map_file(folder: Path, split: str, case: str, content: bytes) -> StoredFile:
    """Write the label map of a case into its dataset folder; returns its entry for the manifest."""
    file = label_map_file(split, case)
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
    return StoredFile(file, hashlib.sha256(content).hexdigest(), len(content))


def write_class_names(folder: Path, split: str, classes: Sequence[str], *, partly: bool) -> None:
    """Write ``labels.json`` beside the label maps of a split, if it has any; ``partly``: some voxels have no label."""
    maps = folder / LABEL_MAPS / split
    if maps.is_dir():
        names = {name: index for index, name in enumerate(classes) if index}
        names |= {"ignore": NOT_ANNOTATED} if partly else {}
        write_atomically(maps / "labels.json", (json.dumps(names, indent=1, ensure_ascii=False) + "\n").encode())


def read_label_map(dataset: Path | S3Path | str, case: Case) -> npt.NDArray[np.uint8]:
    """(X, Y, Z) class indices of a case on the grid of its image file.

    Raises:
        DataError: the file is missing, damaged or not the one that was prepared.
    """
    stored = case.label_map
    assert stored is not None, f"{case.id} has no label map"
    path = stored_file(dataset, stored.file)
    try:
        local = cached_file(path, stored.sha256, stored.bytes) if isinstance(path, S3Path) else path
        content = read_limited(local, stored.bytes)
    except FileNotFoundError:
        raise DataError(f"{path}: missing, though the manifest lists it; {_AGAIN}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {_AGAIN}") from error
    except ValueError as error:
        raise DataError(f"{path}: damaged or replaced: {error}, as in the manifest; {_AGAIN}") from None
    if hashlib.sha256(content).hexdigest() != stored.sha256:
        raise DataError(f"{path}: damaged or replaced: its SHA-256 is not the manifest's; {_AGAIN}")
    try:
        return _decode_label_map(content)
    except (ValueError, OSError, zlib.error, nib.filebasedimages.ImageFileError, HeaderDataError) as error:
        raise DataError(f"{path}: no label map that prepare wrote ({error}); {_AGAIN}") from error


def _decode_label_map(content: bytes) -> npt.NDArray[np.uint8]:
    decompressor = zlib.decompressobj(wbits=31)
    data = decompressor.decompress(content, _LARGEST_MAP)
    if not decompressor.eof:
        raise ValueError(f"it unpacks to more than {_LARGEST_MAP} bytes, or ends too early")
    image: Any = nib.Nifti1Image.from_bytes(data)
    if image.get_data_dtype() != np.uint8 or math.prod(image.shape) > len(data):
        raise ValueError(f"its header says {image.get_data_dtype()} voxels of shape {image.shape}")
    return np.asarray(image.dataobj)
