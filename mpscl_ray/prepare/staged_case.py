"""One case between reading and writing: what is asked for, and its normalised slices on disk."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.data.label_values import count_voxels
from mpscl_ray.data.volumes.intensities import kind_of
from mpscl_ray.data.volumes.label_maps import map_labels
from mpscl_ray.data.volumes.recipe import GeometryFrom, NanPolicy, Recipe
from mpscl_ray.prepare.copies import Sketch
from mpscl_ray.prepare.label_table import LabelTable
from mpscl_ray.prepare.pictures.case import CasePicture
from mpscl_ray.prepare.source_cases import Flip, SourceCase
from mpscl_ray.runs.atomic_files import storage_errors

MAX_VOXELS = 2**31
"""Largest volume that is read."""


@dataclass(frozen=True)
class Settings:
    """What is the same for every case of a run."""

    recipe: Recipe
    table: LabelTable | None
    assume_spacing_mm: tuple[float, float, float] | None = None
    copy_geometry_from_image: bool = False
    geometry: GeometryFrom | None = None
    """Part of the header that is right, if its parts contradict each other."""
    nan_policy: NanPolicy = "error"
    any_modality: bool = False
    """Accept images whose intensities look like another modality."""
    flip: Flip = "auto"
    pictures: bool = False
    """Draw a picture of each case."""

    def recipe_of(self, modality: str) -> Recipe:
        """The recipe of a modality: CT is in Hounsfield units unless any intensities are accepted."""
        hounsfield = kind_of(modality) == "ct" and not self.any_modality
        return replace(self.recipe, hounsfield=hounsfield)


@dataclass(frozen=True)
class Request:
    """One case to prepare, for one split."""

    source: SourceCase
    split: str
    keep_labels: bool
    folder: Path | None
    """Folder for the staged slices, which the caller makes; None: the case is only checked."""
    number: int

    @property
    def image_file(self) -> Path:
        """Normalised slices (D, H, W)."""
        assert self.folder is not None
        return self.folder / f"{self.number:06d}_image.npy"

    @property
    def label_file(self) -> Path:
        """Class indices (D, H, W)."""
        assert self.folder is not None
        return self.folder / f"{self.number:06d}_label.npy"

    @property
    def label_map_file(self) -> Path:
        """Class indices on the grid of the image file, as compressed NIfTI; there is none for slices."""
        assert self.folder is not None
        return self.folder / f"{self.number:06d}_label_map.nii.gz"


@dataclass(frozen=True)
class StagedCase:
    """A case whose z-scored slices are on disk, not yet scaled to [-1, 1]."""

    request: Request
    shape: tuple[int, int, int]
    class_voxels: tuple[int, ...] | None
    """Voxels of each class; None if the case is not labelled."""
    intensity_range: tuple[float, float]
    """Range of the z-scored intensities."""
    scaled_by: tuple[float, float] | None
    """The range by which the staged slices are scaled already; None unless the input was in [-1, 1]."""
    content_sha256: str
    sketch: Sketch
    """By which copies of the scan are found, however they are stored; empty for slices."""
    geometry: dict[str, Any]
    spacing_mm: tuple[float, float, float] | None
    structure_width: float | None
    cropped_around_labels: bool
    sources: dict[str, str]
    steps: tuple[str, ...]
    notices: tuple[str, ...]
    picture: CasePicture | None
    """None unless pictures are wanted."""
    private: tuple[str, ...] = ()
    """Kinds of texts in the headers of its files that may name a person."""


def with_split(staged: StagedCase, split: str) -> StagedCase:
    """The same case in a split."""
    return replace(staged, request=replace(staged.request, split=split))


def content_hash(image: NDArray[np.float32]) -> str:
    """SHA-256 of the voxels and their shape."""
    digest = hashlib.sha256(repr(image.shape).encode())
    # Volumes come in Fortran order; their transpose needs no copy.
    digest.update(np.ascontiguousarray(image.T if image.flags.f_contiguous else image).data)
    return digest.hexdigest()


def count_class_voxels(label: NDArray[np.uint8] | None, table: LabelTable | None) -> tuple[int, ...] | None:
    """Voxels of each class; None without a label."""
    if label is None or table is None:
        return None
    return count_voxels(label, len(table.classes))


def save_slices(request: Request, image: NDArray[np.float32], label: NDArray[np.uint8] | None) -> None:
    """Write image and label as the npy files of a request, unless it only checks."""
    if request.folder is None:
        return
    for path, array in ((request.image_file, image), (request.label_file, label)):
        if array is None:
            continue
        with storage_errors(path, needed=array.nbytes), path.open("wb") as stream:
            # Not np.save: its errors do not say that the disk is full.
            plain = np.ascontiguousarray(array)
            np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(plain))
            stream.write(plain.data)


def to_class_indices(array: NDArray[Any], table: LabelTable | None, path: Path) -> tuple[NDArray[np.uint8], list[str]]:
    """Class indices of raw label ids, ``NOT_ANNOTATED`` where nobody annotated, and notices."""
    assert table is not None, "labels without a label table"
    mapped, notices = map_labels(array, table.effective(), table.ignored, path, table.unknown)
    # That nothing is labelled is reported for all cases together.
    kept = [notice.removeprefix(f"{path.name}: ") for notice in notices if mapped.any() or "no voxel" not in notice]
    if table.not_annotated and (voxels := int(np.count_nonzero(mapped == NOT_ANNOTATED))):
        kept.append(
            f"{100 * voxels / mapped.size:.1f} % of the voxels have the ignore label (not annotated) and count nowhere"
        )
    return mapped, kept
