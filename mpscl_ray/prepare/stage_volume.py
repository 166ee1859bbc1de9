"""Reading, checking and normalising one NIfTI volume with its label map."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpscl_ray.data.compatibility import structure_width
from mpscl_ray.data.label_map_files import encode_label_map
from mpscl_ray.data.volumes.geometry import Geometry, across_thick_voxels, closest_world_axes, covered_voxels
from mpscl_ray.data.volumes.header_geometry import NoPosition
from mpscl_ray.data.volumes.intensities import few_values, other_modality, unusual_intensities
from mpscl_ray.data.volumes.label_maps import check_segment_names, class_voxels
from mpscl_ray.data.volumes.nifti import SeveralVolumesError, Volume, read_image, read_label
from mpscl_ray.data.volumes.preprocess import PreparedVolume, intensity_range, prepare_volume
from mpscl_ray.data.volumes.same_grid import check_same_geometry, turned_to
from mpscl_ray.errors import DataError
from mpscl_ray.prepare.copies import sketch
from mpscl_ray.prepare.file_listing import printable
from mpscl_ray.prepare.label_content import better_placed, blank_slices, check_background
from mpscl_ray.prepare.masks import read_masks
from mpscl_ray.prepare.pictures.case import picture
from mpscl_ray.prepare.source_cases import SourceCase
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
from mpscl_ray.runs.atomic_files import storage_errors

_SMALL_MM = 20.0
"""Extent below which a volume shows no human heart."""
_NOTABLE_LOSS = 0.05
"""Part of a structure outside the crop that is worth a warning."""
_PLANE_OF_WORLD_AXIS = ("sagittal", "coronal", "axial")


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
        if mapped is not None:
            label = replace(label, array=mapped)  # the ids take four times as much memory
    if problems or image is None:
        return problems
    notices += [*image.notices_for(settings.recipe), *unusual_intensities(image.array, source.modality)]
    recipe = settings.recipe_of(source.modality)
    prepared = prepare_volume(image.array, image.affine, mapped, recipe, case=str(source.images[0]))
    if mapped is not None:
        notices += [*better_placed(image.array, mapped), *blank_slices(image.array, mapped)]
    notices += [*_hardly_a_heart(image), *_thick(image, prepared.geometry)]
    if request.folder is not None:  # A check knows no crop.
        notices += _mostly_padding(prepared.geometry)
        notices += _cut_off(mapped, prepared, settings) if mapped is not None else []
    save_slices(request, prepared.image, prepared.label)
    if mapped is not None and request.folder is not None:
        content = encode_label_map(mapped, image.affine)
        with storage_errors(request.label_map_file, needed=len(content)):
            request.label_map_file.write_bytes(content)
    sources = {"image": printable(source.images[0].name), "image_sha256": image.sha256}
    if label is not None:
        sources |= {"label": printable(",".join(path.name for path in source.labels)), "label_sha256": label.sha256}
    depth, height, width = prepared.image.shape
    cropped = recipe.crop is not None or recipe.crop_depth is not None
    return StagedCase(
        request=request,
        shape=(depth, height, width),
        class_voxels=count_class_voxels(prepared.label, settings.table),
        intensity_range=intensity_range(prepared.image),
        scaled_by=None,
        content_sha256=content_hash(image.array),
        sketch=sketch(image.array),
        geometry=prepared.geometry.to_json(),
        spacing_mm=prepared.geometry.spacing_mm,
        structure_width=structure_width(prepared.label),
        cropped_around_labels=cropped and prepared.geometry.centre_from == "labels",
        sources=sources,
        steps=(),
        notices=tuple(notices),
        picture=picture(
            prepared.image, prepared.label, prepared.geometry, prepared.geometry.spacing_mm, original=image.array
        )
        if settings.pictures
        else None,
        private=tuple(dict.fromkeys([*image.private, *(label.private if label is not None else ())])),
    )


def _read(request: Request, settings: Settings) -> tuple[Volume | None, Volume | None, list[str]]:
    """Image and label map of a case, and what is wrong with them: one run finds all problems of both files."""
    source = request.source
    problems: list[str] = []
    image = label = None
    try:
        image = read_image(
            source.images[0],
            assume_spacing_mm=settings.assume_spacing_mm,
            geometry=settings.geometry,
            frame=source.frame,
            nan_policy=settings.nan_policy,
            max_voxels=MAX_VOXELS,
        )
    except SeveralVolumesError as error:
        problems.append(f"{error}, or choose time points (--frames labelled, --frames 0,9)")
    except DataError as error:
        problems.append(str(error))
    if image is not None and not settings.any_modality:
        if wrong := other_modality(image.array, source.modality, image.scanner):
            problems.append(f"{source.images[0]}: {wrong}; take it out, or give --any-modality if it is none")
        elif found := few_values(image.array):
            problems.append(
                f"{source.images[0]} {found}, as a label map; give the image, or --any-modality if it is one"
            )
    if request.keep_labels and source.labels:
        try:
            label = _read_label(source, image, settings)
        except NoPosition as error:
            advice = "; or take the geometry of its image: --fix-geometry copy-from-image"
            problems.append(f"{error}{'' if image is None else advice}")
        except DataError as error:
            problems.append(str(error))
    return image, label, problems


def _read_label(source: SourceCase, image: Volume | None, settings: Settings) -> Volume:
    # A label whose own geometry is not trusted need not have any.
    copied = image.spacing_mm if image is not None and settings.copy_geometry_from_image else None
    read = partial(
        read_label,
        assume_spacing_mm=copied or settings.assume_spacing_mm,
        geometry=settings.geometry or ("sform" if copied else None),
        frame=source.frame,
        max_voxels=MAX_VOXELS,
    )
    paths = source.labels
    if settings.table is None or not settings.table.masks:
        return _on_grid(read(paths[0]), image, settings, refuse=False)
    label, overlaps = read_masks(paths, read, partial(_on_grid, image=image, settings=settings, refuse=True))
    return replace(label, notices=(*label.notices, *overlaps))


def _on_grid(label: Volume, image: Volume | None, settings: Settings, *, refuse: bool) -> Volume:
    """The label map turned to its image; with ``refuse``, a map on another grid is an error."""
    if image is None:
        return label
    if settings.copy_geometry_from_image:
        label = replace(label, affine=image.affine)
    label = turned_to(image, label)
    if refuse:
        check_same_geometry(image, label)
    return label


def _class_indices(
    image: Volume | None, label: Volume, path: Path, settings: Settings, problems: list[str]
) -> tuple[NDArray[np.uint8] | None, list[str]]:
    """Class indices of a label map and notices; what is wrong with the map is added to the problems."""
    try:
        if image is not None:
            check_same_geometry(image, label)
    except DataError as error:
        problems.append(str(error))
    on_grid = not problems
    try:
        assert settings.table is not None
        if not settings.table.masks:
            check_segment_names(path, label.segments, settings.table.classes, settings.table.effective())
        mapped, notices = to_class_indices(label.array, settings.table, path)
        if on_grid:  # Of another map nothing else is worth saying.
            notices += check_background(mapped, settings.table.classes, path)
        return mapped, [
            *notices,
            *(notice for notice in label.notices if "turned to the image" in notice or "overlaps" in notice),
        ]
    except DataError as error:
        problems.append(str(error))
        return None, []


def _cut_off(mapped: NDArray[np.uint8], prepared: PreparedVolume, settings: Settings) -> list[str]:
    """A warning on structures that the crop leaves out in part; they are lost to training and prediction alike."""
    assert settings.table is not None
    kept = mapped[covered_voxels(prepared.geometry)]
    whole, inside = (class_voxels(part, 256) for part in (mapped, kept))
    lost = {
        name: 1 - inside[index] / whole[index]
        for index, name in enumerate(settings.table.classes)
        if index and whole[index] and 1 - inside[index] / whole[index] >= _NOTABLE_LOSS
    }
    if not lost:
        return []
    listed = ", ".join(
        f"{100 * lost[name]:.0f} % of {name}" for name in sorted(lost, key=lost.__getitem__, reverse=True)
    )
    return [f"the crop leaves out {listed}: give a larger --crop or --crop-depth, or cut the scan to the heart"]


def _hardly_a_heart(image: Volume) -> list[str]:
    """Warnings on a volume that is a single picture, or smaller than a heart."""
    notices = []
    shape, sizes = image.array.shape, image.spacing_mm
    if min(shape) == 1:
        voxels = " x ".join(str(length) for length in shape)
        notices.append(f"the volume has one slice ({voxels} voxels); join the slices of a patient to a volume")
    extent = max(size * length for size, length in zip(sizes, shape, strict=True))
    if extent < _SMALL_MM:
        notices.append(
            f"by its header the whole volume is at most {extent:.3g} mm large, its voxels "
            f"{' x '.join(f'{size:.3g}' for size in sizes)} mm: no heart fits in; if the sizes are not in mm, correct "
            "xyzt_units or the voxel sizes of the header"
        )
    return notices


def _thick(image: Volume, geometry: Geometry) -> list[str]:
    """A warning on slices that run across thick voxels."""
    found = across_thick_voxels(image.affine, geometry)
    if found is None:
        return []
    said, axis = found
    plane = _PLANE_OF_WORLD_AXIS[closest_world_axes(image.affine)[axis][0]]
    return [
        f"{said}; --slice-axis {plane} (or --orientation stored --slice-axis {axis}) cuts slices as they were acquired"
    ]


def _mostly_padding(geometry: Geometry) -> list[str]:
    """A warning on slices of which less than half is in the volume."""
    _, rows, columns = geometry.axes
    inside = [len(range(axis.samples)[axis.inside()]) for axis in (rows, columns)]
    if 2 * inside[0] * inside[1] >= rows.samples * columns.samples:
        return []
    return [
        f"most of a slice is padding: {inside[0]} x {inside[1]} of {rows.samples} x {columns.samples} pixels are in "
        "the volume; give a smaller --crop"
    ]
