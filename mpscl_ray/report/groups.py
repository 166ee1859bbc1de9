"""Runs with the same target, and the case of it on which a report compares them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mpscl_ray.config.titles import phase_title
from mpscl_ray.errors import DataError
from mpscl_ray.predict.model import Checkpoint
from mpscl_ray.predict.predictor import load_weights
from mpscl_ray.report.cases import HeldOut, held_out_cases, predict_cases, read_scores, worst_first
from mpscl_ray.report.figures.feature_space import FeatureSample
from mpscl_ray.report.runs import (
    Prediction,
    ReportedRun,
    ShownCase,
    choose_case,
    predict_case,
    sample_features,
)
from mpscl_ray.runs.wording import counted


@dataclass
class Group:
    """Runs with the same target, which can be shown on the same case."""

    runs: list[ReportedRun]
    """In the order given."""
    suffix: str
    """End of the names of its figures; empty if it is the only group."""
    columns: list[tuple[str, ReportedRun, Checkpoint]]
    """Title, run and checkpoint of each column of the figures."""
    shown: ShownCase | None = None
    """The case; None where there is none to show."""
    predictions: list[Prediction] = field(default_factory=list)
    """Of each column."""
    held_out: HeldOut | None = None
    """All cases of the test split, worst first; None where there is no dataset."""
    samples: dict[str, FeatureSample] = field(default_factory=dict)
    """Title -> features of the columns of :attr:`contrast` that have any."""
    images: bool = True
    """Whether images of patients may be shown."""
    notes: list[str] = field(default_factory=list)
    """What is missing and why."""

    @property
    def contrast(self) -> list[int]:
        """The two columns of a figure that shows only two: the first, and the last one that is not supervised."""
        later = [at for at, (_, run, _) in enumerate(self.columns) if at and run.system != "supervised"]
        return [0, *(later or range(1, len(self.columns)))[-1:]]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, background first."""
        return self.runs[0].model.classes

    @property
    def name(self) -> str:
        """Modality of the target."""
        return self.runs[0].model.domains["target"].modality.upper()


def group_runs(runs: Sequence[ReportedRun]) -> list[Group]:
    """Group runs by target dataset and classes, in the order given."""
    by_target: dict[Any, list[ReportedRun]] = {}
    for run in runs:
        target = run.model.domains["target"]
        by_target.setdefault((target.fingerprint, target.dataset, run.model.classes), []).append(run)
    several = len(by_target) > 1
    names = [members[0].model.domains["target"].modality for members in by_target.values()]
    groups = []
    for number, members in enumerate(by_target.values()):
        suffix = f"-{names[number]}" + (f"-{number + 1}" if names.count(names[number]) > 1 else "") if several else ""
        groups.append(Group(members, suffix, _columns(members)))
    return groups


def _columns(runs: Sequence[ReportedRun]) -> list[tuple[str, ReportedRun, Checkpoint]]:
    """The phases of a single run; of several runs the newest checkpoint of each, after a source-only one."""
    if len(runs) == 1:
        titles = ["so far" if saved.name == "last" else phase_title(saved.name) for saved in runs[0].checkpoints]
        return [(title, runs[0], saved) for title, saved in zip(titles, runs[0].checkpoints, strict=True)]
    columns = [
        (run.title + (" so far" if run.checkpoints[-1].name == "last" else ""), run, run.checkpoints[-1])
        for run in runs
        if run.checkpoints
    ]
    if not any(run.system == "source_only" for run in runs):
        for run in runs:
            for saved in run.checkpoints[:-1]:
                if saved.name == "source_only":
                    return [(f"{phase_title(saved.name)} ({run.title})", run, saved), *columns]
    return columns


def read_group(group: Group) -> None:
    """What a page without images has: the scores that the runs have of their held-out cases."""
    group.images = False
    group.notes.append(
        "There are no images of patients, and nothing was predicted: the page was made with --no-images."
    )
    if not group.columns or group.runs[0].model.domains["target"].dataset is None:
        return
    try:
        group.held_out = held_out_cases(group.runs[0], len(group.columns))
    except DataError as error:
        group.notes.append(f"No cases are listed: {error}.")
        return
    for number, (_, run, saved) in enumerate(group.columns):
        if saved.name != "last":
            read_scores(group.held_out, number, run, saved.name)
    worst_first(group.held_out, group.contrast[-1])


def predict_group(group: Group, case: str | None, device: str | None, volumes: bool) -> None:
    """Choose a case, predict it for every column, and sample features for two of them.

    With ``volumes`` all held-out cases are predicted, for the viewer; scores are those of the run's evaluation, or of
    these predictions where there is none.
    """
    for run in group.runs:
        if not run.checkpoints:
            group.notes.append(f"{run.title} has no checkpoint yet, so only its metrics are shown.")
    if not group.columns:
        return
    try:
        group.shown = choose_case(group.runs[0], case)
    except DataError as error:
        group.notes.append(f"No segmentations are shown: {error}.")
        return
    if group.shown.label is None:
        group.notes.append(
            f"The case {group.shown.case.id} is shown without ground truth"
            + (" because labels of training cases are not read." if group.shown.case.split == "train" else ".")
        )
    group.held_out = held_out_cases(group.runs[0], len(group.columns))
    cases = group.shown.case.id
    if volumes:
        cases = f"{counted(len(group.held_out.cases), f'{group.held_out.split} case')}"
    for number, (title, run, saved) in enumerate(group.columns):
        print(f"predicting {cases}: {title} ({run.folder.name})", flush=True)
        if saved.name != "last":
            read_scores(group.held_out, number, run, saved.name)
        predictor = load_weights(run.model, saved, device)
        if rules := predictor.postprocessing("chosen"):
            oracle = " (oracle: chosen with labels of the target)" if rules.oracle else ""
            group.notes.append(f"Postprocessing of {title}: {rules}{oracle}.")
        group.predictions.append(predict_case(predictor, group.shown, title))
        if volumes:
            predict_cases(group.held_out, number, run, predictor)
        if number in group.contrast:
            sample = sample_features(run, saved, predictor, group.shown)
            if sample is not None:
                group.samples[title] = sample
    worst_first(group.held_out, group.contrast[-1])
