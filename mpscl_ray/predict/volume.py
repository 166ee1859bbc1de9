"""One volume in memory: does it fit the model, its label map, and what to beware of. For files and arrays alike."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mpscl_ray.data.volumes.geometry import Geometry, across_thick_voxels, restore_labels
from mpscl_ray.data.volumes.intensities import few_values, kind_of, other_modality, unusual_intensities
from mpscl_ray.data.volumes.nifti import Volume
from mpscl_ray.data.volumes.nifti_output import write_values
from mpscl_ray.data.volumes.preprocess import prepare_volume
from mpscl_ray.errors import DataError
from mpscl_ray.predict.model import Domain, Slices
from mpscl_ray.predict.postprocessing import NO_POSTPROCESSING, Postprocessing, largest_component
from mpscl_ray.predict.predictor import Predictor
from mpscl_ray.predict.quality import Quality, assess
from mpscl_ray.predict.segmentation import Segmentation, segment

PROBABILITY_STEPS = 255
"""Probabilities are stored as whole numbers, 0..255, with the slope that maps 255 to 1."""
PROBABILITY_INTENT = "estimate"
"""NIfTI's intent of a probability map. With the slope it tells one of predict, whatever its name; no text is needed."""
_NOTABLE_EDGE = 0.5
"""Part of the segmented organ's width, over all slices, that lies at the edge of the crop if it may be cut off."""


@dataclass(frozen=True)
class SegmentedVolume:
    """A volume with its label map."""

    found: Segmentation
    slices: Slices
    """(D, H, W), what the network saw."""
    geometry: Geometry
    notices: tuple[str, ...]
    """Warnings, each a sentence without the name of the volume."""
    quality: Quality
    """Judged by the network's own label map, before any postprocessing."""


def segment_volume(
    predictor: Predictor,
    domain: Domain,
    array: npt.NDArray[np.float32],
    affine: npt.NDArray[np.float64],
    name: str,
    *,
    scanner: str = "",
    any_modality: bool = False,
    option: str = "--any-modality",
    postprocessing: Postprocessing = NO_POSTPROCESSING,
    probabilities: bool = False,
    disagreement: bool = False,
) -> SegmentedVolume:
    """Prepare a volume as those of training, segment it, and compare it with what the model was trained on.

    Args:
        predictor: segmenter of the run.
        domain: of the run, whose preparation is repeated.
        array: (X, Y, Z) intensities in the order of the file.
        affine: (4, 4), voxel index to RAS+ millimetres.
        name: of the volume, for messages.
        scanner: modality that its DICOM header names, in capitals, if there is one.
        any_modality: whether what looks like another modality or a label map is segmented as well.
        option: what a user sets for that, for messages.
        postprocessing, probabilities, disagreement: see :func:`mpscl_ray.predict.segmentation.segment`.

    Raises:
        DataError: another modality, a label map, a crop without contrast, or weights that give no finite values.
    """
    if not any_modality:
        refuse_other_modality(array, domain, name, scanner, option)
        if few := few_values(array):
            raise DataError(f"{name} {few}, as a label map; give the image, or {option} if it is one")
    # Never by labels: a new image has none.
    prepared = prepare_volume(array, affine, None, replace(domain.recipe, centre="image"), case=name)
    geometry, slices = prepared.geometry, domain.scale(prepared.image)
    predictor = predictor.prepared_as(domain)
    found = segment(
        predictor,
        slices,
        geometry,
        postprocessing=postprocessing,
        probabilities=probabilities,
        disagreement=disagreement,
    )
    thick = across_thick_voxels(affine, geometry)
    notices = (
        *((f"{thick[0]}, as the model takes them: the scan was acquired in another direction",) if thick else ()),
        *unusual_intensities(array, domain.modality),
        *(domain.trained_on.unusual(geometry, hounsfield=domain.recipe.hounsfield) if domain.trained_on else ()),
        *_quality_warnings(found.slices, geometry),
    )
    quality = assess(found.maps, predictor.classes, predictor.calibrations)
    return SegmentedVolume(found, slices, geometry, notices, quality)


def write_unit_map(path: Path, values: npt.NDArray[np.float32], geometry: Geometry, image: Volume) -> None:
    """Write values (D, H, W) in [0, 1] of prepared slices as NIfTI on the grid of the image, 0 outside the crop."""
    steps = np.rint(values * PROBABILITY_STEPS).astype(np.uint8)
    slope = 1.0 / PROBABILITY_STEPS
    write_values(path, restore_labels(steps, geometry), image, slope=slope, intent=PROBABILITY_INTENT)


def refuse_probability_map(volume: Volume) -> None:
    """Refuse a file that predict wrote itself, also under another name.

    Raises:
        DataError: it is a probability map.
    """
    header = volume.header
    slope = np.float32(1.0 / PROBABILITY_STEPS)
    if header.get_intent()[0] == PROBABILITY_INTENT and np.float32(header["scl_slope"]) == slope:
        raise DataError(f"{volume.path} is a probability map that predict wrote; give the image")


def refuse_other_modality(
    array: npt.NDArray[np.float32], domain: Domain, name: str, scanner: str = "", option: str = "--any-modality"
) -> None:
    """Refuse an image of another modality than the model's.

    Raises:
        DataError: says what its intensities are.
    """
    # A model of CT whose intensities were no Hounsfield units expects none.
    judged = kind_of(domain.modality) != "ct" or domain.recipe.hounsfield
    if judged and (wrong := other_modality(array, domain.modality, scanner)):
        raise DataError(
            f"{name}: {wrong}, but the model expects {domain.modality}; give another modality, or {option} to segment "
            "it all the same"
        )


def _quality_warnings(labels: npt.NDArray[np.uint8], geometry: Geometry) -> list[str]:
    """Warnings on a segmentation that may be wrong."""
    warnings = []
    if not labels.any():
        warnings.append("no structure was found")
    elif _is_cut_off(labels, geometry):
        warnings.append("a structure reaches the edge of the crop and may be cut off; is the heart near the middle?")
    return warnings


def _is_cut_off(labels: npt.NDArray[np.uint8], geometry: Geometry) -> bool:
    """Whether much of the heart, the largest connected part, lies at an edge beyond which the image goes on."""
    heart = largest_component(labels > 0)
    width = float(np.sqrt(np.count_nonzero(heart, axis=(1, 2))).sum())
    rows, columns = geometry.axes[1:]
    at_edge = 0
    for axis, first, last in ((rows, heart[:, 0], heart[:, -1]), (columns, heart[:, :, 0], heart[:, :, -1])):
        before = axis.start > 0.5
        after = axis.start + axis.step * (axis.samples - 1) < axis.length - 1.5
        at_edge += int(np.count_nonzero(first)) * before + int(np.count_nonzero(last)) * after
    return at_edge > _NOTABLE_EDGE * width
