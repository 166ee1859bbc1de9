"""One case from its files to normalised slices on disk, before the intensity range of its modality is known.

This runs in a worker of its own for each case; what crosses processes is small, the voxels go through files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpscl_ray.data.dataset import Case, Scaling
from mpscl_ray.data.parquet_writer import write_case
from mpscl_ray.data.volumes.label_maps import whole_ids
from mpscl_ray.data.volumes.nifti import check_same_geometry, map_labels, phi_fields, read_image, read_label
from mpscl_ray.data.volumes.preprocess import intensity_range, prepare_volume, scale, unscale
from mpscl_ray.data.volumes.recipe import Recipe
from mpscl_ray.errors import DataError, StorageError
from mpscl_ray.prepare.file_listing import spelt_out
from mpscl_ray.prepare.label_table import LabelTable
from mpscl_ray.prepare.released_slices import ReleasedSlices, read_released
from mpscl_ray.prepare.source_cases import Flip, SourceCase
from mpscl_ray.runs.atomic_files import storage_errors

_MOST_VOXELS = 2**31
_LUNG_HU = (-1200.0, -700.0)


@dataclass(frozen=True)
class Settings:
    """What is the same for every case of a run."""

    recipe: Recipe
    table: LabelTable | None
    assume_spacing_mm: tuple[float, float, float] | None = None
    copy_geometry_from_image: bool = False
    any_modality: bool = False
    """Take images whose intensities are those of another modality."""
    flip: Flip = "auto"


@dataclass(frozen=True)
class Request:
    """One case to prepare, for one split."""

    source: SourceCase
    split: str
    keep_labels: bool
    folder: Path
    """Where the slices wait; made by the caller."""
    number: int

    @property
    def image_file(self) -> Path:
        """Normalised slices (D, H, W)."""
        return self.folder / f"{self.number:06d}_image.npy"

    @property
    def label_file(self) -> Path:
        """Class indices (D, H, W)."""
        return self.folder / f"{self.number:06d}_label.npy"


@dataclass(frozen=True)
class Staged:
    """A case whose slices wait on disk, z-scored but not scaled."""

    request: Request
    shape: tuple[int, int, int]
    class_voxels: tuple[int, ...] | None
    """Voxels of each class; None where the case is not labelled."""
    intensity_range: tuple[float, float]
    """Of the z-scored intensities."""
    scaled_by: tuple[float, float] | None
    """The range that the waiting slices are scaled by already, where the input was in [-1, 1]."""
    content_sha256: str
    geometry: dict[str, Any]
    spacing_mm: tuple[float, float, float] | None
    cropped_around_labels: bool
    sources: dict[str, str]
    steps: tuple[str, ...]
    notices: tuple[str, ...]


def stage_case(request: Request, settings: Settings) -> Staged | list[str]:
    """Read, check and normalise one case.

    Returns:
        The staged case, or everything that is wrong with its files.

    Raises:
        StorageError: where the waiting slices cannot be written.
    """
    try:
        if request.source.kind == "nifti":
            return _stage_volume(request, settings)
        return _stage_slices(request, settings)
    except DataError as error:
        return [str(error)]
    except MemoryError:
        return [f"{request.source.images[0]}: does not fit into memory; give fewer --workers, or a smaller --crop"]


def finish_case(staged: Staged, scaling: Scaling, classes: Sequence[str], folder: Path) -> Case:
    """Scale the waiting slices to [-1, 1] and write them as the case's Parquet file.

    Raises:
        StorageError: where the waiting slices are gone, or the file cannot be written.
    """
    request = staged.request
    try:
        image = np.load(request.image_file, allow_pickle=False)
    except FileNotFoundError:
        raise StorageError(
            f"{request.image_file}: written by another worker and not visible here; --out has to be on storage that "
            "all nodes of the cluster share"
        ) from None
    if staged.scaled_by != (scaling.low, scaling.high):
        if staged.scaled_by is not None:
            image = unscale(image, *staged.scaled_by)
        image = scale(image, scaling.low, scaling.high)
    label = np.load(request.label_file, allow_pickle=False) if staged.class_voxels is not None else None
    with storage_errors(folder, needed=image.nbytes):
        case = write_case(
            folder,
            id=request.source.id,
            patient=request.source.patient,
            split=request.split,
            image=image,
            label=label,
            classes=classes,
            content_sha256=staged.content_sha256,
            geometry=staged.geometry,
            spacing_mm=staged.spacing_mm,
            cropped_around_labels=staged.cropped_around_labels,
            sources=staged.sources,
            notices=staged.notices,
        )
    request.image_file.unlink()
    request.label_file.unlink(missing_ok=True)
    return case


def _content_hash(image: NDArray[np.float32]) -> str:
    digest = hashlib.sha256(repr(image.shape).encode())
    # Volumes come in Fortran order; their transpose needs no copy.
    digest.update(np.ascontiguousarray(image.T if image.flags.f_contiguous else image).data)
    return digest.hexdigest()


def _class_voxels(label: NDArray[np.uint8] | None, table: LabelTable | None) -> tuple[int, ...] | None:
    if label is None or table is None:
        return None
    return tuple(int(count) for count in np.bincount(label.reshape(-1), minlength=len(table.classes)))


def _save(request: Request, image: NDArray[np.float32], label: NDArray[np.uint8] | None) -> None:
    for path, array in ((request.image_file, image), (request.label_file, label)):
        if array is None:
            continue
        with storage_errors(path, needed=array.nbytes), path.open("wb") as stream:
            # Not np.save: its errors do not say that the disk is full.
            plain = np.ascontiguousarray(array)
            np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(plain))
            stream.write(plain.data)


# ------------------------------------------------------------------------------------------------------- volumes


def _stage_volume(request: Request, settings: Settings) -> Staged | list[str]:
    source = request.source
    problems: list[str] = []
    image = label = None
    # Both files are looked at before giving up, so that one run finds all that is wrong.
    try:
        image = read_image(source.images[0], assume_spacing_mm=settings.assume_spacing_mm, max_voxels=_MOST_VOXELS)
    except DataError as error:
        problems.append(str(error))
    if image is not None and not settings.any_modality and _is_ct_among_mr(image.array, source.modality):
        problems.append(
            f"{source.images[0]}: the intensities, from {image.array.min():g} on, are Hounsfield units: a CT image "
            f"among the {source.modality} ones; take it out, or give --any-modality if it is none"
        )
    if request.keep_labels and source.labels:
        # A label whose own geometry is not trusted need not have any.
        copied = image.spacing_mm if image is not None and settings.copy_geometry_from_image else None
        assumed = copied or settings.assume_spacing_mm
        try:
            label = read_label(source.labels[0], assume_spacing_mm=assumed, max_voxels=_MOST_VOXELS)
        except DataError as error:
            problems.append(str(error))
    mapped: NDArray[np.uint8] | None = None
    notices: list[str] = []
    if label is not None:
        if settings.copy_geometry_from_image and image is not None:
            label = replace(label, affine=image.affine)
        try:
            if image is not None:
                check_same_geometry(image, label)
        except DataError as error:
            problems.append(str(error))
        try:
            mapped, found = _map(label.array, settings.table, source.labels[0])
            notices += found
        except DataError as error:
            problems.append(str(error))
    if problems or image is None:
        return problems
    notices += image.notices
    notices += _looks_odd(image.array, source.modality)
    private = phi_fields(image.header)
    if private:
        notices.append(
            f"the header has texts that may name a person ({', '.join(sorted(private))}); they are not copied"
        )
    prepared = prepare_volume(image.array, image.affine, mapped, settings.recipe, case=str(source.images[0]))
    _save(request, prepared.image, prepared.label)
    from_labels = prepared.geometry.centre_from == "labels" and (
        settings.recipe.crop is not None or settings.recipe.crop_depth is not None
    )
    sources = {"image": spelt_out(source.images[0].name), "image_sha256": image.sha256}
    if label is not None:
        sources |= {"label": spelt_out(source.labels[0].name), "label_sha256": label.sha256}
    depth, height, width = prepared.image.shape
    return Staged(
        request=request,
        shape=(depth, height, width),
        class_voxels=_class_voxels(prepared.label, settings.table),
        intensity_range=intensity_range(prepared.image),
        scaled_by=None,
        content_sha256=_content_hash(image.array),
        geometry=prepared.geometry.to_json(),
        spacing_mm=prepared.geometry.spacing_mm,
        cropped_around_labels=from_labels,
        sources=sources,
        steps=(),
        notices=tuple(notices),
    )


def _map(array: NDArray[Any], table: LabelTable | None, path: Path) -> tuple[NDArray[np.uint8], list[str]]:
    assert table is not None, "labels without a label table"
    mapped, notices = map_labels(array, table.effective(), table.ignored, path, table.unknown)
    # That nothing is labelled is told for all cases together.
    told = [notice for notice in notices if mapped.any() or "no voxel" not in notice]
    return mapped, [notice.removeprefix(f"{path.name}: ") for notice in told]


def _is_ct_among_mr(image: NDArray[np.float32], modality: str) -> bool:
    """Whether an image of MR is made of whole numbers that begin where the Hounsfield units of air and lung lie."""
    if not modality.lower().startswith("mr") or image.min() > _LUNG_HU[1]:
        return False
    sample = image.ravel(order="K")[:: image.size // 100_000 + 1]
    return bool(np.all(sample == np.rint(sample))) and _LUNG_HU[0] < float(np.percentile(sample, 1)) < _LUNG_HU[1]


def _looks_odd(image: NDArray[np.float32], modality: str) -> list[str]:
    """Intensities that are not those of a raw volume of this modality."""
    low, high = float(image.min()), float(image.max())
    notices = []
    if modality.lower().startswith("mr") and low <= -500:
        notices.append(
            f"intensities from {low:g} to {high:g} look like Hounsfield units: a CT image among the {modality} ones?"
        )
    elif modality.lower() == "ct" and low >= 0:
        notices.append("no intensity is below 0, so they are no Hounsfield units: an MR image among the ct ones?")
    mean, deviation = float(image.mean(dtype=np.float64)), float(image.std(dtype=np.float64))
    if -1.0001 <= low < 0 and high <= 1.0001:
        notices.append("intensities are within [-1, 1], as if scaled already; they are normalised again")
    elif low >= 0 and high <= 1.0001:
        notices.append("intensities are within [0, 1], as if scaled already; they are normalised again")
    elif abs(mean) < 0.02 and abs(deviation - 1) < 0.02:
        notices.append("intensities have mean 0 and deviation 1, as if z-scored already; they are normalised again")
    elif low >= 0 and high <= 255 and bool(np.all(image == np.rint(image))):
        notices.append("intensities are whole numbers within 0..255, as if reduced to 8 bits before")
    return notices


# -------------------------------------------------------------------------------------------------------- slices


def _stage_slices(request: Request, settings: Settings) -> Staged | list[str]:
    source = request.source
    problems: list[str] = []
    parts: list[ReleasedSlices] = []
    for index, path in enumerate(source.images):
        try:
            label_path = source.labels[index] if source.labels and request.keep_labels else None
            parts.append(read_released(source, path, label_path, settings.flip))
        except DataError as error:
            problems.append(str(error))
    if problems:
        return problems
    shapes = sorted({image.shape for part in parts for image in part.images})
    if len(shapes) > 1:
        return [f"case {source.id}: its slices have different sizes: {', '.join(map(str, shapes))}"]
    image = np.stack([image for part in parts for image in part.images])
    steps = parts[0].steps
    notices: list[str] = []
    broken = int(image.size - np.count_nonzero(np.isfinite(image)))
    if broken:
        return [f"{source.images[0]}: {broken} pixels of its slices are NaN or infinite; expected finite intensities"]
    constant = int(sum(plane.min() == plane.max() for plane in image))
    if constant == len(image) and source.kind in ("npz", "released_nifti"):
        return [
            f"{source.images[0]}: every pixel has the intensity {image.flat[0]:g}, so it shows nothing; leave it out"
        ]
    if constant:
        notices.append(f"{constant} slices have one intensity throughout")
    label: NDArray[np.uint8] | None = None
    raw = [plane for part in parts for plane in part.labels]
    if request.keep_labels and any(plane is not None for plane in raw):
        if any(plane is None for plane in raw):
            return [f"case {source.id}: some of its slices have a label and some have none"]
        path = source.labels[0] if source.labels else source.images[0]
        values = np.stack([plane for plane in raw if plane is not None])
        whole, good = whole_ids(values)
        if not good.all():
            return [f"{path}: label values that are no whole numbers of 32 bits, e.g. {values[~good][0]:g}"]
        try:
            label, found = _map(whole.astype(np.int32), settings.table, path)
            notices += found
        except DataError as error:
            return [str(error)]
    content = _content_hash(image)
    scaled_by = parts[0].scaled_by
    if scaled_by is None and float(image.min()) >= -1.0001 and float(image.max()) <= 1.0001:
        notices.append("intensities are within [-1, 1] though z-scored ones were expected; they are scaled again")
    size = settings.recipe.size
    if size is not None and size != image.shape[1:]:
        image, label = _resized(image, label, size)
        steps = [*steps, f"resized to {size[0]} x {size[1]}; image linear, labels nearest"]
    _save(request, image, label)
    depth, height, width = image.shape
    return Staged(
        request=request,
        shape=(depth, height, width),
        class_voxels=_class_voxels(label, settings.table),
        intensity_range=intensity_range(image if scaled_by is None else unscale(image, *scaled_by)),
        scaled_by=scaled_by,
        content_sha256=content,
        geometry={},
        spacing_mm=None,
        cropped_around_labels=False,
        sources=_hashes(source, label is not None),
        steps=tuple(steps),
        notices=tuple(notices),
    )


def _resized(
    image: NDArray[np.float32], label: NDArray[np.uint8] | None, size: tuple[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None]:
    """Slices on another grid, intensities as they were: the volume steps with their normalisation undone."""
    if image.min() == image.max():
        shape = (len(image), *size)
        return np.full(shape, image.flat[0]), None if label is None else np.zeros(shape, dtype=np.uint8)
    recipe = Recipe(orientation="stored", slice_axis="0", crop=None, centre="image", size=size, clip_percentile=100.0)
    prepared = prepare_volume(image, np.eye(4), label, recipe)
    geometry = prepared.geometry
    return prepared.image * np.float32(geometry.standard_deviation) + np.float32(geometry.mean), prepared.label


def _hashes(source: SourceCase, labelled: bool) -> dict[str, str]:
    sources = {}
    for kind, paths in (("image", source.images), ("label", source.labels if labelled else ())):
        if not paths:
            continue
        digest = hashlib.sha256()
        for path in paths:
            digest.update(path.read_bytes())
        sources[kind] = spelt_out(paths[0].name if len(paths) == 1 else f"{paths[0].name} to {paths[-1].name}")
        sources[f"{kind}_sha256"] = digest.hexdigest()
    return sources
