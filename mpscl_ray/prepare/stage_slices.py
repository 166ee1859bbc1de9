"""Reading and checking the slices of one case that a publisher has normalised before."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from mpscl_ray.data.compatibility import structure_width
from mpscl_ray.data.scaling import unscale
from mpscl_ray.data.volumes.label_maps import whole_ids
from mpscl_ray.data.volumes.preprocess import intensity_range, prepare_volume
from mpscl_ray.data.volumes.recipe import Recipe
from mpscl_ray.errors import DataError
from mpscl_ray.prepare.file_listing import printable
from mpscl_ray.prepare.pictures.case import picture
from mpscl_ray.prepare.released_slices import ReleasedSlices, read_released
from mpscl_ray.prepare.source_cases import SourceCase
from mpscl_ray.prepare.staged_case import (
    Request,
    Settings,
    StagedCase,
    content_hash,
    count_class_voxels,
    save_slices,
    to_class_indices,
)
from mpscl_ray.runs.wording import counted


def stage_slices(request: Request, settings: Settings) -> StagedCase | list[str]:
    """Read and check the slices of a case; returns the staged case, or everything that is wrong with its files.

    Raises:
        DataError: its slices or labels, once read, cannot be used.
    """
    source = request.source
    parts, problems = _read(request, settings)
    if problems:
        return problems
    image, notices = _stack(source, parts)
    label, label_notices = _labels(request, settings, parts)
    notices += label_notices
    content = content_hash(image)
    steps, scaled_by = parts[0].steps, parts[0].scaled_by
    if scaled_by is None and float(image.min()) >= -1.0001 and float(image.max()) <= 1.0001:
        notices.append("intensities are within [-1, 1] though z-scored ones were expected; they are scaled again")
    size = settings.recipe.size
    if size is not None and size != image.shape[1:]:
        image, label = _resized(image, label, size)
        steps = [*steps, f"resized to {size[0]} x {size[1]}; image linear, labels nearest"]
    save_slices(request, image, label)
    depth, height, width = image.shape
    return StagedCase(
        request=request,
        shape=(depth, height, width),
        class_voxels=count_class_voxels(label, settings.table),
        intensity_range=intensity_range(image if scaled_by is None else unscale(image, *scaled_by)),
        scaled_by=scaled_by,
        sketch=(),
        content_sha256=content,
        geometry={},
        spacing_mm=None,
        structure_width=structure_width(label),
        cropped_around_labels=False,
        sources=_hashes(source, label is not None),
        steps=tuple(steps),
        notices=tuple(notices),
        picture=picture(image, label, None, None) if settings.pictures else None,
    )


def _read(request: Request, settings: Settings) -> tuple[list[ReleasedSlices], list[str]]:
    """Slices of each file, and what is wrong with the files."""
    source = request.source
    parts: list[ReleasedSlices] = []
    problems: list[str] = []
    for index, path in enumerate(source.images):
        try:
            label_path = source.labels[index] if source.labels and request.keep_labels else None
            parts.append(read_released(source, path, label_path, settings.flip, settings.geometry))
        except DataError as error:
            problems.append(str(error))
    return parts, problems


def _stack(source: SourceCase, parts: list[ReleasedSlices]) -> tuple[NDArray[np.float32], list[str]]:
    """All slices (D, H, W) of a case, and notices on them."""
    shapes = sorted({image.shape for part in parts for image in part.images})
    if len(shapes) > 1:
        raise DataError(f"case {source.id}: its slices have different sizes: {', '.join(map(str, shapes))}")
    image = np.stack([image for part in parts for image in part.images])
    broken = int(image.size - np.count_nonzero(np.isfinite(image)))
    if broken:
        raise DataError(
            f"{source.images[0]}: NaN or infinite in {counted(broken, 'pixel')} of its slices; expected finite "
            "intensities"
        )
    constant = int(sum(plane.min() == plane.max() for plane in image))
    if constant == len(image) and source.kind in ("npz", "released_nifti"):
        raise DataError(
            f"{source.images[0]}: every pixel has the intensity {image.flat[0]:g}, so it shows nothing; leave it out"
        )
    return image, [f"one intensity throughout in {counted(constant, 'slice')}"] if constant else []


def _labels(
    request: Request, settings: Settings, parts: list[ReleasedSlices]
) -> tuple[NDArray[np.uint8] | None, list[str]]:
    """Class indices (D, H, W) of a case and notices; None if it has none or they are not wanted."""
    source = request.source
    raw = [plane for part in parts for plane in part.labels]
    planes = [plane for plane in raw if plane is not None]
    if not request.keep_labels or not planes:
        return None, []
    if len(planes) < len(raw):
        raise DataError(f"case {source.id}: some of its slices have a label and some have none")
    path = source.labels[0] if source.labels else source.images[0]
    values = np.stack(planes)
    whole, good = whole_ids(values)
    if not good.all():
        raise DataError(f"{path}: label values that are no whole numbers of 32 bits, e.g. {values[~good][0]:g}")
    return to_class_indices(whole.astype(np.int32), settings.table, path)


def _resized(
    image: NDArray[np.float32], label: NDArray[np.uint8] | None, size: tuple[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None]:
    """Slices on another grid, intensities unchanged: prepared like a volume, the normalisation undone."""
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
        sources[kind] = printable(paths[0].name if len(paths) == 1 else f"{paths[0].name} to {paths[-1].name}")
        sources[f"{kind}_sha256"] = digest.hexdigest()
    return sources
