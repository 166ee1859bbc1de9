"""The label map of an image file, on the grid of that file, with volumes, probabilities and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mpscl_ray.data.slice_selection import evenly_spaced, labelled_slices
from mpscl_ray.data.volumes.dicom_paths import is_series
from mpscl_ray.data.volumes.geometry import Geometry, restore_labels, restore_most_probable
from mpscl_ray.data.volumes.intensities import few_values, kind_of, other_modality, unusual_intensities
from mpscl_ray.data.volumes.itk_file import ITK_ENDINGS
from mpscl_ray.data.volumes.label_maps import write_itksnap_labels
from mpscl_ray.data.volumes.nifti import Volume, read_image
from mpscl_ray.data.volumes.nifti_output import write_label_map, write_values
from mpscl_ray.data.volumes.preprocess import prepare_volume
from mpscl_ray.data.volumes.recipe import GeometryFrom, NanPolicy
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.predict.model import Checkpoint, Domain, Model
from mpscl_ray.predict.predictor import Predictor, cached_predictor, keep_largest_component
from mpscl_ray.runs.atomic_files import write_atomically
from mpscl_ray.runs.palette import colour
from mpscl_ray.runs.plots import panel, save_png
from mpscl_ray.runs.storage import S3Path, output_directory

SUFFIX = "_prediction.nii.gz"
"""A label map's name is the stem of the image's with this suffix."""
ITKSNAP_LABELS = "itksnap_labels.txt"
SLICER_LABELS = "slicer_labels.ctbl"
PROBABILITY_STEPS = 255
"""Probabilities are stored as whole numbers, 0..255, with the slope that maps 255 to 1."""
_PREVIEW_SLICES = 6
_NOTABLE_EDGE = 0.25
"""Part of the segmented organ's width, over all slices, that lies at the edge of the crop if it may be cut off."""


@dataclass(frozen=True)
class Job:
    """Settings of every image."""

    run: str
    weights: Checkpoint
    stamp: int
    """Stamp of the weights, see :meth:`Checkpoint.stamp`."""
    domain: str
    """``source`` or ``target``: decides how images are prepared."""
    out: Path | S3Path
    raw_ids: Mapping[str, int] | None = None
    """Label id of each structure in the output; None for class indices."""
    device: str | None = None
    largest_component: bool = False
    probabilities: bool = False
    preview: bool = False
    assume_spacing_mm: tuple[float, float, float] | None = None
    geometry: GeometryFrom | None = None
    """Part of a header that is right, if its parts contradict each other."""
    nan_policy: NanPolicy = "error"
    any_modality: bool = False
    """Segment images whose intensities look like another modality."""


@dataclass(frozen=True)
class Prediction:
    """The result for one image."""

    image: Path
    error: str | None = None
    """Reason why there is no label map."""
    files: tuple[str, ...] = ()
    """Names in the output folder, the label map first."""
    volumes_ml: Mapping[str, float] | None = None
    notices: tuple[str, ...] = ()


def stem(image: Path) -> str:
    """Name of an image without ``.nii``, ``.nii.gz``, ``.nrrd`` or ``.mha``; of a DICOM series that of its folder."""
    if image.is_dir():
        return image.absolute().name
    name = f"{image.absolute().parent.name}_{image.name}" if is_series(image) else image.name
    for ending in (".nii.gz", ".nii", *ITK_ENDINGS):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def outputs(image: Path, job: Job, classes: Sequence[str]) -> tuple[str, ...]:
    """Names of the output files of an image, the label map first."""
    base = stem(image)
    names = [base + SUFFIX]
    if job.probabilities:
        names += [f"{base}_probability_{_plain(structure)}.nii.gz" for structure in classes[1:]]
    if job.preview:
        names.append(f"{base}_preview.png")
    return tuple(names)


def predict_in_worker(job: Job, image: Path) -> Prediction:
    """:func:`predict_image` with the cached segmenter of this worker process."""
    return predict_image(cached_predictor(job.run, job.weights, job.stamp, job.device), job, image)


def predict_image(predictor: Predictor, job: Job, image: Path) -> Prediction:
    """Segment one image and write its files, the label map last.

    Args:
        predictor: segmenter of the run.
        job: settings.
        image: NIfTI file.

    Returns:
        What was written; an error, and no label map, if the image cannot be read or does not fit into memory.

    Raises:
        StorageError: the output folder cannot be written.
    """
    assert predictor.model is not None
    try:
        with output_directory(job.out) as folder:
            return _predict(predictor, predictor.model.domain(job.domain), job, folder, image)
    except DataError as error:
        return Prediction(image, error=str(error))
    except MemoryError:
        return Prediction(image, error=f"{image} does not fit into memory; give fewer --workers, or crop it")


def _predict(predictor: Predictor, domain: Domain, job: Job, folder: Path, image: Path) -> Prediction:
    classes = predictor.classes
    volume = read_image(
        image, assume_spacing_mm=job.assume_spacing_mm, geometry=job.geometry, nan_policy=job.nan_policy
    )
    if not job.any_modality:
        _refuse_other_modality(volume, domain)
    # Never by labels: a new image has none.
    prepared = prepare_volume(
        volume.array, volume.affine, None, replace(domain.recipe, centre="image"), case=str(image)
    )
    geometry = prepared.geometry
    slices = domain.scale(prepared.image)
    resampled = any(axis.step != 1.0 for axis in geometry.axes)
    probabilities: npt.NDArray[np.float32] | None = None
    if resampled or job.probabilities:
        probabilities = predictor.predict_probabilities(slices)
        labels = probabilities.argmax(axis=0).astype(np.uint8)
    else:
        labels = predictor.predict_slices(slices)
    if probabilities is not None and resampled:
        # Smoother than the nearest label if slices are coarser than the image.
        restored = restore_most_probable(probabilities, geometry)
    else:
        restored = restore_labels(labels, geometry)
    if job.largest_component:
        labels = keep_largest_component(labels, len(classes))
        restored = keep_largest_component(restored, len(classes))
    names = outputs(image, job, classes)
    if job.probabilities:
        assert probabilities is not None
        for name, values in zip(names[1:], probabilities[1:], strict=False):
            steps = np.rint(values * PROBABILITY_STEPS).astype(np.uint8)
            write_values(folder / name, restore_labels(steps, geometry), volume, slope=1.0 / PROBABILITY_STEPS)
    if job.preview:
        save_png(folder / names[-1], preview(slices, labels, classes))
    if job.raw_ids is None:
        write_label_map(folder / names[0], restored, volume, classes)
    else:
        table = np.array([0, *(job.raw_ids[name] for name in classes[1:])])
        kind = np.int16 if np.abs(table).max() < 2**15 else np.int32
        write_values(folder / names[0], table.astype(kind)[restored], volume)
    voxel_ml = abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1000.0
    counts = np.bincount(restored.ravel(order="K"), minlength=len(classes))
    return Prediction(
        image,
        files=names,
        volumes_ml={name: float(count * voxel_ml) for name, count in zip(classes[1:], counts[1:], strict=True)},
        notices=(
            *volume.notices,
            *((f"the image {few}: is it a label map?",) if (few := few_values(volume.array)) else ()),
            *unusual_intensities(volume.array, domain.modality),
            *_quality_warnings(labels, geometry),
        ),
    )


def _refuse_other_modality(volume: Volume, domain: Domain) -> None:
    """Refuse an image of another modality than the model's."""
    # A model of CT whose intensities were no Hounsfield units expects none.
    judged = kind_of(domain.modality) != "ct" or domain.recipe.hounsfield
    if judged and (wrong := other_modality(volume.array, domain.modality, volume.scanner)):
        raise DataError(
            f"{volume.path}: {wrong}, but the model expects {domain.modality}; give --modality, or --any-modality to "
            "segment it all the same"
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
    heart = keep_largest_component((labels > 0).astype(np.uint8), 2)
    width = float(np.sqrt(np.count_nonzero(heart, axis=(1, 2))).sum())
    rows, columns = geometry.axes[1:]
    at_edge = 0
    for axis, first, last in ((rows, heart[:, 0], heart[:, -1]), (columns, heart[:, :, 0], heart[:, :, -1])):
        before = axis.start > 0.5
        after = axis.start + axis.step * (axis.samples - 1) < axis.length - 1.5
        at_edge += int(np.count_nonzero(first)) * before + int(np.count_nonzero(last)) * after
    return at_edge > _NOTABLE_EDGE * width


def preview(
    slices: npt.NDArray[np.float32], labels: npt.NDArray[np.uint8], classes: Sequence[str]
) -> npt.NDArray[np.uint8]:
    """Picture (height, width, 3) of some slices, without and with their labels.

    Args:
        slices: (D, H, W).
        labels: (D, H, W) class indices.
        classes: names, background first.

    Returns:
        Evenly spaced slices from the first to the last one with labels; of all if there are none.
    """
    shown = labelled_slices(labels)
    chosen = evenly_spaced(np.arange(shown[0], shown[-1] + 1), _PREVIEW_SLICES)
    return panel(slices[chosen], {"prediction": labels[chosen]}, classes)


def output_ids(model: Model, domain: Domain) -> dict[str, int]:
    """Label ids of the files that the run's data was made from, for each structure.

    Raises:
        ConfigError: the run does not know them.
    """
    for known in (domain, *model.domains.values()):
        if all(name in known.raw_ids for name in model.classes[1:]):
            return {name: known.raw_ids[name] for name in model.classes[1:]}
    raise ConfigError(
        "the run does not know the label ids of the files its data was made from; leave out --label-values raw"
    )


def write_label_tables(out: Path | S3Path, classes: Sequence[str], raw_ids: Mapping[str, int] | None) -> None:
    """Write names and colours for 3D Slicer and, if label maps have class indices, for ITK-SNAP."""
    with output_directory(out) as folder:
        if raw_ids is None:
            write_itksnap_labels(folder / ITKSNAP_LABELS, classes)
        write_atomically(folder / SLICER_LABELS, slicer_table(classes, raw_ids).encode())


def slicer_table(classes: Sequence[str], raw_ids: Mapping[str, int] | None = None) -> str:
    """Colour table for 3D Slicer: id, name, red, green, blue and opacity on each line."""
    lines = ["# label names and colours for 3D Slicer"]
    for index, name in enumerate(classes):
        value = index if raw_ids is None else raw_ids.get(name, 0)
        red, green, blue = colour(index)
        lines.append(f"{value} {_plain(name)} {red} {green} {blue} {255 if index else 0}")
    return "\n".join(lines) + "\n"


def _plain(name: str) -> str:
    """A name without blanks and path separators."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
