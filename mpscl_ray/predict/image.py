"""The label map of an image file, on the grid of that file, with volumes, probabilities and a picture."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from mpscl_ray.data.slice_selection import evenly_spaced, labelled_slices
from mpscl_ray.data.volumes.nifti import read_image
from mpscl_ray.data.volumes.recipe import GeometryFrom, NanPolicy
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.predict.ensemble import Member, cached_predictor
from mpscl_ray.predict.label_files import write_labels
from mpscl_ray.predict.model import Domain, Model
from mpscl_ray.predict.output_names import (
    DISAGREEMENT_SUFFIX,
    PREVIEW_SUFFIX,
    mirrored_folder,
    probability_name,
    stem,
)
from mpscl_ray.predict.postprocessing import NO_POSTPROCESSING, Postprocessing
from mpscl_ray.predict.predictor import Predictor
from mpscl_ray.predict.quality import Quality
from mpscl_ray.predict.volume import refuse_probability_map, segment_volume, write_unit_map
from mpscl_ray.runs.atomic_files import storage_errors
from mpscl_ray.runs.plots import panel, save_png
from mpscl_ray.runs.storage import S3Path, output_directory

_PREVIEW_SLICES = 6


@dataclass(frozen=True)
class Job:
    """Settings of every image."""

    members: tuple[Member, ...]
    """The run, or those of an ensemble."""
    domain: str
    """``source`` or ``target``: decides how images are prepared."""
    out: Path | S3Path
    raw_ids: Mapping[str, int] | None = None
    """Label id of each structure in the output; None for class indices."""
    format: str = "nii.gz"
    """Of the label maps, one of :data:`mpscl_ray.predict.output_names.FORMATS`."""
    device: str | None = None
    postprocessing: Postprocessing = NO_POSTPROCESSING
    probabilities: bool = False
    preview: bool = False
    assume_spacing_mm: tuple[float, float, float] | None = None
    geometry: GeometryFrom | None = None
    """Part of a header that is right, if its parts contradict each other."""
    nan_policy: NanPolicy = "error"
    roots: tuple[Path, ...] = ()
    """Folders that were given; label maps of images below them keep the folders in between."""
    weights_sha256: tuple[str, ...] = ()
    """Of each member."""
    tta: bool = False
    """Average over slices that are moved a little."""
    disagreement: bool = False
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
    image_sha256: str = ""
    label_map_sha256: str = ""
    volumes_ml: Mapping[str, float] | None = None
    quality: Quality | None = None
    notices: tuple[str, ...] = ()


def outputs(image: Path, job: Job, classes: Sequence[str]) -> tuple[str, ...]:
    """Names of the output files of an image, below the output folder; the label map first."""
    base = mirrored_folder(image, job.roots) + stem(image)
    names = [f"{base}_prediction.{job.format}"]
    if job.probabilities:
        names += [probability_name(base, structure) for structure in classes[1:]]
    if job.disagreement:
        names.append(base + DISAGREEMENT_SUFFIX)
    if job.preview:
        names.append(base + PREVIEW_SUFFIX)
    return tuple(names)


def predict_in_worker(job: Job, image: Path) -> Prediction:
    """:func:`predict_image` with the cached segmenter of this worker process."""
    return predict_image(cached_predictor(job.members, job.device, tta=job.tta), job, image)


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
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)):
            raise
        return Prediction(image, error=f"{image} does not fit into memory; give fewer --workers, or crop it")


def _predict(predictor: Predictor, domain: Domain, job: Job, folder: Path, image: Path) -> Prediction:
    classes = predictor.classes
    volume = read_image(
        image, assume_spacing_mm=job.assume_spacing_mm, geometry=job.geometry, nan_policy=job.nan_policy
    )
    refuse_probability_map(volume)
    done = segment_volume(
        predictor,
        domain,
        volume.array,
        volume.affine,
        str(image),
        scanner=volume.scanner,
        any_modality=job.any_modality,
        postprocessing=job.postprocessing,
        probabilities=job.probabilities,
        disagreement=job.disagreement,
    )
    found = done.found
    names = outputs(image, job, classes)
    parent = (folder / names[0]).parent
    with storage_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
    if job.probabilities:
        assert found.probabilities is not None
        for name, values in zip(names[1:], found.probabilities[1:], strict=False):
            write_unit_map(folder / name, values, done.geometry, volume)
    if job.disagreement:
        assert found.maps.disagreement is not None
        name = mirrored_folder(image, job.roots) + stem(image) + DISAGREEMENT_SUFFIX
        write_unit_map(folder / name, found.maps.disagreement, done.geometry, volume)
    if job.preview:
        save_png(folder / names[-1], preview(done.slices, found.slices, classes))
    write_labels(folder / names[0], found.labels, volume, classes, job.raw_ids)
    voxel_ml = abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1000.0
    counts = np.bincount(found.labels.ravel(order="K"), minlength=len(classes))
    return Prediction(
        image,
        files=names,
        image_sha256=volume.sha256,
        label_map_sha256=hashlib.sha256((folder / names[0]).read_bytes()).hexdigest(),
        volumes_ml={name: float(count * voxel_ml) for name, count in zip(classes[1:], counts[1:], strict=True)},
        quality=done.quality,
        notices=(*volume.notices_for(domain.recipe), *done.notices),
    )


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
