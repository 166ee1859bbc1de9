"""The same function over the cases of a dataset with one segmenter, in Ray tasks or in this process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

from mpscl_ray.config.titles import phase_title
from mpscl_ray.data.dataset import Case, Scaling
from mpscl_ray.distributed.parallel_map import map_volumes
from mpscl_ray.distributed.places import TaskPlace
from mpscl_ray.distributed.ray_session import connect
from mpscl_ray.evaluate.case_scores import CaseToScore
from mpscl_ray.evaluate.evaluation import Protocol
from mpscl_ray.evaluate.subject import Subject
from mpscl_ray.predict.ensemble import Member, cached_predictor
from mpscl_ray.predict.model import Domain
from mpscl_ray.predict.postprocessing import NO_POSTPROCESSING, Postprocessing
from mpscl_ray.predict.predictor import Predictor, num_inference_workers
from mpscl_ray.runs.progress import ProgressLine
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.runs.storage import S3Path

Result = TypeVar("Result")


@dataclass(frozen=True)
class CaseOptions:
    """What a process needs to segment a case of a dataset as predict does, and to compare it with its label."""

    member: Member
    device: str | None
    dataset: Path | S3Path
    scaling: Scaling
    """Scaling of the dataset."""
    domain: Domain | None
    """How the run prepared this modality; None if the run does not know it."""
    protocol: Protocol
    postprocessing: Postprocessing = NO_POSTPROCESSING

    @classmethod
    def of(cls, home: RunDirectory, subject: Subject, protocol: Protocol, device: str | None) -> Self:
        """Those of a segmenter and its dataset."""
        weights = replace(subject.weights, path=home.relative_to_run(subject.weights.path))
        return cls(
            Member(home.uri, weights, subject.weights.stamp()),
            device,
            subject.dataset,
            subject.manifest.scaling,
            subject.domain,
            protocol,
        )

    def case(self, case: Case) -> CaseToScore:
        """A case with how its slices become the input of the segmenter."""
        return CaseToScore(self.dataset, case, self.scaling, self.domain)


def map_cases(
    function: Callable[[Predictor, CaseOptions, Case], Result],
    subject: Subject,
    options: CaseOptions,
    *,
    label: str,
    workers: int | None,
    progress: bool,
    place: TaskPlace | None,
) -> dict[str, Result]:
    """Results of a function by case.

    Args:
        function: importable by workers, its results small.
        subject: segmenter and cases.
        options: for the function.
        label: what the progress line says before the number of volumes.
        workers: see :func:`mpscl_ray.evaluate.scoring.evaluate_checkpoint`, as ``progress`` and ``place``.
        progress: whether to show a progress line.
        place: where on the Ray that this process is connected to each volume is done.

    Raises:
        As :func:`mpscl_ray.distributed.parallel_map.map_volumes`.
    """
    if workers is None and place is None:
        workers = num_inference_workers(len(subject.cases), subject.predictor.device)
    if workers != 0:
        each = partial(_in_worker, function, options)
    else:
        each = partial(function, subject.predictor, options)
    line = (
        ProgressLine(len(subject.cases), f"{label} {phase_title(options.member.weights.name)}, volume")
        if progress
        else None
    )
    with line or nullcontext(), connect(workers) if workers else nullcontext():
        results = map_volumes(
            each,
            subject.cases,
            workers=workers,
            name=lambda case: f"case {case.id}",
            done=lambda count: line.update(count) if line else None,
            place=place,
        )
    return {case.id: result for case, result in zip(subject.cases, results, strict=True)}


def _in_worker(function: Callable[[Predictor, CaseOptions, Case], Result], options: CaseOptions, case: Case) -> Result:
    return function(cached_predictor((options.member,), options.device), options, case)
