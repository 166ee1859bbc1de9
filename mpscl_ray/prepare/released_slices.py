"""Reading slices and volumes that were prepared by others: the releases of SIFA / PnP-AdaNet and of MPSCL."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpscl_ray.data.volumes.nifti import read_image, read_label
from mpscl_ray.data.volumes.recipe import RELEASED_RANGES, GeometryFrom
from mpscl_ray.data.volumes.same_grid import check_same_geometry
from mpscl_ray.errors import DataError
from mpscl_ray.prepare.source_cases import Flip, SourceCase
from mpscl_ray.prepare.tfrecord import read_slices
from mpscl_ray.runs import safe_npz

_MOST_VOXELS = 2**31


@dataclass
class ReleasedSlices:
    """Slices (H, W) of one file with their raw labels."""

    images: list[NDArray[np.float32]]
    labels: list[NDArray[Any] | None]
    steps: list[str]
    """What was done to them, by the publisher and here."""
    scaled_by: tuple[float, float] | None = None
    """The intensity range that was scaled to [-1, 1]; None for z-scored slices."""


def read_released(
    source: SourceCase, path: Path, label_path: Path | None, flip: Flip, geometry: GeometryFrom | None = None
) -> ReleasedSlices:
    """Slices of one file, with raw labels if it or its label file has any.

    Args:
        source: the case that the file belongs to.
        path: a TFRecord, npy, npz or NIfTI file.
        label_path: the label file of an npy slice or a NIfTI volume.
        flip: whether test volumes are flipped along rows and columns; auto: those named like the released test volumes.
        geometry: which part of a NIfTI header is right, if its parts contradict each other.

    Raises:
        DataError: the file is damaged or not in the format of the releases.
    """
    if source.kind == "tfrecord":
        records = read_slices(path)
        if not records:
            raise DataError(f"{path}: holds no record")
        return ReleasedSlices(
            [record.image for record in records],
            [record.label for record in records],
            ["middle slice of each record's three; z-scored volumes by the publisher"],
        )
    if source.kind == "npy":
        image = _load_npy(path)
        label = None if label_path is None else _load_npy(label_path)
        if label is not None and label.shape != image.shape:
            raise DataError(f"{label_path}: its shape {label.shape} is not that of its image, {image.shape}")
        low, high = float(image.min()), float(image.max())
        if low < -1.5 or high > 1.5:
            raise DataError(f"{path}: intensities from {low:g} to {high:g}; npy slices of the release lie in [-1, 1]")
        scaled_by = RELEASED_RANGES.get(source.modality)
        if scaled_by is None:
            raise DataError(f"{path}: no published range for the modality {source.modality!r}, only for ct and mr")
        steps = [f"npy slices in [-1, 1], scaled by the publisher with {scaled_by[0]:g} to {scaled_by[1]:g}"]
        return ReleasedSlices([image.astype(np.float32)], [label], steps, scaled_by)
    if source.kind == "released_nifti":
        volume = read_image(path, geometry=geometry)
        label_volume = None if label_path is None else read_label(label_path, geometry=geometry)
        if label_volume is not None:
            check_same_geometry(volume, label_volume)
        return _turned(path, volume.array, None if label_volume is None else label_volume.array, flip)
    return _turned(path, *_load_npz(path), flip)


def _load_npy(path: Path) -> NDArray[Any]:
    try:
        array = np.load(path, allow_pickle=False, mmap_mode="r")
        if not 0 < array.size <= _MOST_VOXELS or array.dtype.kind not in "fiub":
            raise ValueError(f"{array.size} values of type {array.dtype}")
        array = np.squeeze(np.array(array))
    except (ValueError, OverflowError, EOFError, OSError, SyntaxError, TokenError) as error:
        raise DataError(f"{path}: not a readable npy array of numbers ({error}); copy or download it again") from None
    if array.ndim != 2:
        raise DataError(f"{path}: an array of shape {array.shape}, expected one slice (H, W)")
    return array


def _load_npz(path: Path) -> tuple[NDArray[np.float32], NDArray[Any] | None]:
    """``arr_0``, the image, and ``arr_1``, its label."""
    try:
        arrays = safe_npz.read(path, 8 * _MOST_VOXELS)
        if "arr_0" not in arrays:
            found = ", ".join(sorted(arrays)) or "nothing"
            raise ValueError(f"it holds {found}, expected arr_0 (image) and arr_1 (label)")
        image = arrays["arr_0"]
        if image.dtype.kind not in "fiub":
            raise ValueError(f"arr_0 holds values of type {image.dtype}")
        return image.astype(np.float32), arrays.get("arr_1")
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: not a readable npz volume ({error}); copy or download it again") from None


def _turned(path: Path, image: NDArray[np.float32], label: NDArray[Any] | None, flip: Flip) -> ReleasedSlices:
    """Slices of a test volume (H, W, D), turned as the released evaluation turns them."""
    if (
        image.ndim != 3
        or image.size == 0
        or (label is not None and (label.shape != image.shape or label.dtype.kind not in "fiub"))
    ):
        found = "no label" if label is None else f"label {label.shape} {label.dtype}"
        raise DataError(f"{path}: image {image.shape}, {found}; expected two arrays of numbers (H, W, D)")
    steps = ["slices along axis 2 of the test volume; z-scored by the publisher"]
    if flip == "both" or (flip == "auto" and re.search(r"_\d+\.nii\.gz(\.npz)?$", path.name)):
        image = image[::-1, ::-1]
        label = None if label is None else label[::-1, ::-1]
        steps.append("axes 0 and 1 flipped to the orientation of the training slices")
    else:
        steps.append("not flipped")
    planes = [np.ascontiguousarray(image[:, :, k]) for k in range(image.shape[2])]
    labels: list[NDArray[Any] | None] = [None if label is None else label[:, :, k] for k in range(image.shape[2])]
    return ReleasedSlices(planes, labels, steps)
