"""One case of a prepared dataset, segmented as predict does and scored on the grid that a protocol says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mpscl_ray.data.dataset import Case, Scaling
from mpscl_ray.data.label_map_files import read_label_map
from mpscl_ray.data.parquet_reader import read_case
from mpscl_ray.data.volumes.geometry import Geometry
from mpscl_ray.data.volumes.preprocess import unscale
from mpscl_ray.evaluate.evaluation import Protocol
from mpscl_ray.evaluate.metrics import StructureScore, released_protocol_scores, volume_scores
from mpscl_ray.predict.model import Domain
from mpscl_ray.predict.predictor import Labels, Predictor, keep_largest_component
from mpscl_ray.predict.segmentation import segment
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


def segment_and_score(
    predictor: Predictor, subject: CaseToScore, protocol: Protocol, *, largest_component: bool = False
) -> tuple[Labels, list[StructureScore] | None]:
    """Segment a case and score it.

    Returns:
        (D, H, W) class indices of the prepared slices, and the score of each structure; None without labels.

    Raises:
        DataError: a file is missing or damaged, or the weights give values that are not finite.
    """
    case, domain = subject.case, subject.domain
    prepared_label = case.labelled and protocol != "file"
    arrays = read_case(subject.dataset, case, ("image", "label") if prepared_label else ("image",))
    slices, low, high = arrays["image"], subject.scaling.low, subject.scaling.high
    if domain is not None and (low, high) != (domain.low, domain.high):
        slices = domain.scale(unscale(slices, low, high))
    if protocol == "file":
        geometry = Geometry.from_json(case.geometry)
        found = segment(predictor, slices, geometry, largest_component=largest_component)
        if not case.labelled:
            return found.slices, None
        truth = read_label_map(subject.dataset, case)
        return found.slices, volume_scores(found.labels, truth, predictor.classes, geometry.voxel_mm)
    labels = predictor.predict_slices(slices)
    if largest_component:
        labels = keep_largest_component(labels, len(predictor.classes))
    if not case.labelled:
        return labels, None
    if protocol == "released":
        return labels, released_protocol_scores(labels, arrays["label"], predictor.classes)
    return labels, volume_scores(labels, arrays["label"], predictor.classes, case.spacing_mm)
