"""One case of a prepared dataset, segmented as predict does and scored on the grid that a protocol says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mpscl_ray.data.dataset import Case, Scaling
from mpscl_ray.data.label_map_files import read_label_map
from mpscl_ray.data.parquet_reader import read_case
from mpscl_ray.data.scaling import unscale
from mpscl_ray.data.volumes.geometry import Geometry
from mpscl_ray.evaluate.evaluation import Protocol
from mpscl_ray.evaluate.metrics import StructureScore, released_protocol_scores, volume_scores
from mpscl_ray.predict.model import Domain, Slices
from mpscl_ray.predict.postprocessing import NO_POSTPROCESSING, Labels, Postprocessing
from mpscl_ray.predict.predictor import Predictor
from mpscl_ray.predict.quality import SliceMaps
from mpscl_ray.predict.segmentation import millilitres, segment
from mpscl_ray.runs.storage import S3Path


@dataclass(frozen=True)
class CaseToScore:
    """A case and how its slices become the input of a run's segmenter."""

    dataset: Path | S3Path
    case: Case
    scaling: Scaling
    """Of the dataset."""
    domain: Domain | None
    """How the run prepared this modality; None if the run does not know it."""


def read_truth(dataset: Path | S3Path, case: Case) -> tuple[Labels, float | None]:
    """Labels of a case, on the grid of its file if the dataset keeps them there, and the volume of a voxel in ml.

    Raises:
        DataError: a file is missing or damaged.
    """
    if case.label_map is not None:
        return read_label_map(dataset, case), millilitres(Geometry.from_json(case.geometry).voxel_mm)
    voxel_ml = None if case.spacing_mm is None else millilitres(case.spacing_mm)
    return read_case(dataset, case, ("label",))["label"], voxel_ml


@dataclass(frozen=True)
class SegmentedCase:
    """A case with its label map on the grid that a protocol says."""

    labels: Labels
    truth: Labels | None
    """On the same grid; None without labels."""
    voxel_mm: tuple[float, float, float] | None
    """Of that grid; None where it is unknown."""
    slices: Labels
    """(D, H, W) class indices of the prepared slices."""
    maps: SliceMaps | None = None
    """Of these, as the network gives them; None for label maps from elsewhere."""

    @property
    def voxel_ml(self) -> float | None:
        """Volume of a voxel of the grid."""
        return None if self.voxel_mm is None else millilitres(self.voxel_mm)


def read_slices(subject: CaseToScore, *, label: bool) -> tuple[Slices, Labels | None]:
    """Slices (D, H, W) of a case as the run's segmenter takes them and, if wanted, their labels.

    Raises:
        DataError: the file is missing or damaged.
    """
    arrays = read_case(subject.dataset, subject.case, ("image", "label") if label else ("image",))
    slices, domain, low, high = arrays["image"], subject.domain, subject.scaling.low, subject.scaling.high
    if domain is not None and (low, high) != (domain.low, domain.high):
        slices = domain.scale(unscale(slices, low, high))
    return slices, arrays.get("label")


def segment_case(
    predictor: Predictor,
    subject: CaseToScore,
    protocol: Protocol,
    postprocessing: Postprocessing = NO_POSTPROCESSING,
) -> SegmentedCase:
    """Segment a case as predict does.

    Raises:
        DataError: a file is missing or damaged, or the weights give values that are not finite.
    """
    case = subject.case
    slices, label = read_slices(subject, label=case.labelled and protocol != "file")
    if protocol == "file":
        geometry = Geometry.from_json(case.geometry)
        found = segment(predictor, slices, geometry, postprocessing=postprocessing)
        truth = read_label_map(subject.dataset, case) if case.labelled else None
        return SegmentedCase(found.labels, truth, geometry.voxel_mm, found.slices, found.maps)
    voxel_ml = None if case.spacing_mm is None else millilitres(case.spacing_mm)
    maps = predictor.predict_maps(slices)
    labels = postprocessing(maps.labels, predictor.classes, voxel_ml)
    return SegmentedCase(labels, label, case.spacing_mm, labels, maps)


def segment_and_score(
    predictor: Predictor,
    subject: CaseToScore,
    protocol: Protocol,
    *,
    postprocessing: Postprocessing = NO_POSTPROCESSING,
) -> tuple[SegmentedCase, list[StructureScore] | None]:
    """Segment a case and score it.

    Returns:
        The segmentation, and the score of each structure; None without labels.

    Raises:
        DataError: as :func:`segment_case`.
    """
    found = segment_case(predictor, subject, protocol, postprocessing)
    if found.truth is None:
        return found, None
    if protocol == "released":
        return found, released_protocol_scores(found.labels, found.truth, predictor.classes)
    return found, volume_scores(found.labels, found.truth, predictor.classes, found.voxel_mm)
