"""The held-out cases of a target one by one: their scores, worst first, and their volumes for the viewer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mpscl_ray.data.dataset import Case, Manifest, load_manifest
from mpscl_ray.data.label_map_files import encode_label_map
from mpscl_ray.data.parquet_reader import read_case
from mpscl_ray.errors import DataError
from mpscl_ray.evaluate.case_scores import CaseToScore, segment_and_score
from mpscl_ray.evaluate.evaluation import Protocol
from mpscl_ray.evaluate.metrics import StructureScore
from mpscl_ray.predict.predictor import Predictor
from mpscl_ray.predict.quality import assess
from mpscl_ray.report.runs import ReportedRun
from mpscl_ray.report.volumes import display_affine, encode_image, original_units, plane_of
from mpscl_ray.runs import safe_json
from mpscl_ray.runs.storage import S3Path

Scores = Sequence[StructureScore]


@dataclass
class CaseVolumes:
    """``.nii.gz`` files of one case, all on the grid of its prepared slices."""

    image: bytes
    label: bytes | None
    predictions: list[bytes] = field(default_factory=list)
    """Of each column of the report; label maps, as the label."""

    def size_on_page(self) -> int:
        """Bytes of all files as base64."""
        files = (self.image, self.label or b"", *self.predictions)
        return sum(4 * math.ceil(len(content) / 3) for content in files)


@dataclass
class HeldOutCase:
    """One case of the target that no training has seen."""

    case: Case
    scores: list[Scores | None]
    """Of each column; None where the case has no label, or no evaluation and no prediction was made."""
    volumes: CaseVolumes | None = None
    """None where they are left out."""
    estimates: dict[int, float] = field(default_factory=dict)
    """Of the mean Dice, by column; only where a segmenter was calibrated for that."""

    def mean_dice(self, column: int) -> float:
        """Mean over the structures that are there; NaN without scores."""
        scores = self.scores[column]
        values = [score.dice for score in scores or () if not math.isnan(score.dice)]
        return float(np.mean(values)) if values else math.nan


@dataclass
class HeldOut:
    """Cases of one target."""

    dataset: Path | S3Path
    manifest: Manifest
    split: str
    cases: list[HeldOutCase]
    protocol: Protocol
    """That scores are taken by, as in the tables of evaluate."""

    @property
    def scored(self) -> bool:
        """Whether any case has scores."""
        return any(scores for case in self.cases for scores in case.scores)


def held_out_cases(run: ReportedRun, columns: int) -> HeldOut:
    """Cases of the target's test split; of its validation split if a case is labelled there and no test case is.

    Raises:
        DataError: the dataset is missing or damaged.
    """
    dataset = run.model.domains["target"].dataset
    assert dataset is not None, "a case of it was chosen"
    manifest = load_manifest(dataset)
    filled = [name for name in ("test", "val") if manifest.split(name)]
    labelled = [name for name in filled if any(case.labelled for case in manifest.split(name))]
    split = next(iter(labelled + filled), "test")
    cases = manifest.split(split)
    on_files = all(case.label_map is not None for case in cases if case.labelled)
    found = [HeldOutCase(case, [None] * columns) for case in cases]
    return HeldOut(dataset, manifest, split, found, "file" if on_files else "prepared")


def read_scores(held_out: HeldOut, column: int, run: ReportedRun, phase: str) -> None:
    """Take the scores of a column from the run's evaluation of a finished phase, where it is of these data.

    Raises:
        DataError: the file of the evaluation is damaged.
    """
    suffix = "" if held_out.protocol == "file" else f"_{held_out.protocol}_protocol"
    file = run.folder.results / f"{phase}_{held_out.split}{suffix}" / "summary.json"
    try:
        content = safe_json.read(file)
        if content["dataset"]["fingerprint"] != held_out.manifest.fingerprint:
            return
        volumes = {name: [_score(row) for row in found["scores"]] for name, found in content["volumes"].items()}
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged: {error}; evaluate the run again") from error
    for entry in held_out.cases:
        entry.scores[column] = volumes.get(entry.case.id)


def _score(row: Mapping[str, Any]) -> StructureScore:
    values: dict[str, Any] = {name: math.nan if value is None else value for name, value in row.items()}
    return StructureScore(**values)


def predict_cases(held_out: HeldOut, column: int, run: ReportedRun, predictor: Predictor) -> None:
    """Predict every case with the segmenter of a column, for the viewer, and score those that have no scores yet."""
    for entry in held_out.cases:
        if entry.volumes is None:
            entry.volumes = _volumes(held_out, entry.case)
        subject = CaseToScore(held_out.dataset, entry.case, held_out.manifest.scaling, run.model.domains["target"])
        found, scores = segment_and_score(
            predictor,
            subject,
            held_out.protocol if entry.case.labelled else "prepared",
            postprocessing=predictor.postprocessing("chosen"),
        )
        entry.scores[column] = entry.scores[column] or scores
        assert found.maps is not None
        quality = assess(found.maps, predictor.classes, predictor.calibrations)
        if quality.estimate is not None:
            entry.estimates[column] = quality.estimate
        entry.volumes.predictions.append(_label_map(held_out, entry.case, found.slices))


def _volumes(held_out: HeldOut, case: Case) -> CaseVolumes:
    arrays = read_case(held_out.dataset, case)
    affine = display_affine(plane_of(case, held_out.manifest), case.spacing_mm)
    image = encode_image(original_units(arrays["image"], case, held_out.manifest), affine)
    label = arrays.get("label")
    return CaseVolumes(image, None if label is None else _label_map(held_out, case, label))


def _label_map(held_out: HeldOut, case: Case, labels: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    affine = display_affine(plane_of(case, held_out.manifest), case.spacing_mm)
    return encode_label_map(np.ascontiguousarray(labels.transpose(2, 1, 0)), affine)


def worst_first(held_out: HeldOut, column: int) -> None:
    """Sort the cases by their mean Dice in a column; those without scores come last, by their estimate."""

    def key(entry: HeldOutCase) -> tuple[bool, float]:
        scored = entry.mean_dice(column)
        return math.isnan(scored), entry.estimates.get(column, 1.0) if math.isnan(scored) else scored

    held_out.cases.sort(key=key)


def leave_out_volumes(cases: Sequence[HeldOutCase], limit: int) -> int:
    """Keep the volumes of the first cases, as many as fit into a number of bytes of a page; returns how many do not."""
    size = left_out = 0
    for entry in cases:
        if entry.volumes is None:
            continue
        size += entry.volumes.size_on_page()
        if size > limit:
            entry.volumes, left_out = None, left_out + 1
    return left_out
