"""Reading, checking and normalising one NIfTI volume with its label map."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpscl_ray.data.volumes.nifti import Volume, check_same_geometry, phi_fields, read_image, read_label
from mpscl_ray.data.volumes.preprocess import intensity_range, prepare_volume
from mpscl_ray.errors import DataError
from mpscl_ray.prepare.file_listing import printable
from mpscl_ray.prepare.staged_case import (
    MAX_VOXELS,
    Request,
    Settings,
    StagedCase,
    content_hash,
    count_class_voxels,
    save_slices,
    to_class_indices,
)

_LUNG_HU = (-1200.0, -700.0)


def stage_volume(request: Request, settings: Settings) -> StagedCase | list[str]:
    """Read, check and normalise a volume; returns the staged case, or everything that is wrong with its files.

    Raises:
        DataError: the volume cannot be made into slices.
    """
    source = request.source
    image, label, problems = _read(request, settings)
    mapped: NDArray[np.uint8] | None = None
    notices: list[str] = []
    if label is not None:
        mapped, notices = _class_indices(image, label, source.labels[0], settings, problems)
    if problems or image is None:
        return problems
    notices += [*image.notices, *_unusual_intensities(image.array, source.modality)]
    private = phi_fields(image.header)
    if private:
        notices.append(
            f"the header has texts that may name a person ({', '.join(sorted(private))}); they are not copied"
        )
    recipe = settings.recipe
    prepared = prepare_volume(image.array, image.affine, mapped, recipe, case=str(source.images[0]))
    save_slices(request, prepared.image, prepared.label)
    sources = {"image": printable(source.images[0].name), "image_sha256": image.sha256}
    if label is not None:
        sources |= {"label": printable(source.labels[0].name), "label_sha256": label.sha256}
    depth, height, width = prepared.image.shape
    cropped = recipe.crop is not None or recipe.crop_depth is not None
    return StagedCase(
        request=request,
        shape=(depth, height, width),
        class_voxels=count_class_voxels(prepared.label, settings.table),
        intensity_range=intensity_range(prepared.image),
        scaled_by=None,
        content_sha256=content_hash(image.array),
        geometry=prepared.geometry.to_json(),
        spacing_mm=prepared.geometry.spacing_mm,
        cropped_around_labels=cropped and prepared.geometry.centre_from == "labels",
        sources=sources,
        steps=(),
        notices=tuple(notices),
    )


def _read(request: Request, settings: Settings) -> tuple[Volume | None, Volume | None, list[str]]:
    """Image and label map of a case, and what is wrong with them: one run finds all problems of both files."""
    source = request.source
    problems: list[str] = []
    image = label = None
    try:
        image = read_image(source.images[0], assume_spacing_mm=settings.assume_spacing_mm, max_voxels=MAX_VOXELS)
    except DataError as error:
        problems.append(str(error))
    if image is not None and not settings.any_modality and _is_ct_among_mr(image.array, source.modality):
        problems.append(
            f"{source.images[0]}: the intensities, which begin at {image.array.min():g}, are Hounsfield units: a CT "
            f"image among the {source.modality} ones; take it out, or give --any-modality if it is none"
        )
    if request.keep_labels and source.labels:
        # A label whose own geometry is not trusted need not have any.
        copied = image.spacing_mm if image is not None and settings.copy_geometry_from_image else None
        assumed = copied or settings.assume_spacing_mm
        try:
            label = read_label(source.labels[0], assume_spacing_mm=assumed, max_voxels=MAX_VOXELS)
        except DataError as error:
            problems.append(str(error))
    return image, label, problems


def _class_indices(
    image: Volume | None, label: Volume, path: Path, settings: Settings, problems: list[str]
) -> tuple[NDArray[np.uint8] | None, list[str]]:
    """Class indices of a label map and notices; what is wrong with the map is added to the problems."""
    if settings.copy_geometry_from_image and image is not None:
        label = replace(label, affine=image.affine)
    try:
        if image is not None:
            check_same_geometry(image, label)
    except DataError as error:
        problems.append(str(error))
    try:
        return to_class_indices(label.array, settings.table, path)
    except DataError as error:
        problems.append(str(error))
        return None, []


def _is_ct_among_mr(image: NDArray[np.float32], modality: str) -> bool:
    """Whether an MR image has whole numbers that begin like the Hounsfield units of air and lung."""
    if not modality.lower().startswith("mr") or image.min() > _LUNG_HU[1]:
        return False
    sample = image.ravel(order="K")[:: image.size // 100_000 + 1]
    return bool(np.all(sample == np.rint(sample))) and _LUNG_HU[0] < float(np.percentile(sample, 1)) < _LUNG_HU[1]


def _unusual_intensities(image: NDArray[np.float32], modality: str) -> list[str]:
    """Warnings on intensities that a raw volume of this modality does not have."""
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
        notices.append("intensities are whole numbers within 0..255, as if reduced to 8 bits")
    return notices
