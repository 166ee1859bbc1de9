"""Runs with the same target, and the one case of it on which a report compares them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpscl_ray.errors import DataError
from mpscl_ray.predict.model import Checkpoint
from mpscl_ray.report.figures.feature_space import FeatureSample
from mpscl_ray.report.runs import (
    Look,
    ReportedRun,
    ShownCase,
    choose_case,
    end_title,
    load,
    look_at,
    sample_features,
)

Tell = Callable[[str], None]


@dataclass
class Group:
    """Runs with the same target, which can be shown on the same case.

    Attributes:
        runs: in the order given.
        suffix: of the names of its figures; empty where there is one group alone.
        columns: title, run and checkpoint of each column of the figures.
        shown: the case; None where there is none to show.
        looks: what each column makes of it.
        samples: features of two columns, see :attr:`contrast`.
        origins: where the prototypes beside those come from.
        unsampled: columns that should be in ``samples`` and have no features to look at.
        notes: what kept any of this from being made.
    """

    runs: list[ReportedRun]
    suffix: str
    columns: list[tuple[str, ReportedRun, Checkpoint]]
    shown: ShownCase | None = None
    looks: list[Look] = field(default_factory=list)
    samples: dict[str, FeatureSample] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    unsampled: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def contrast(self) -> list[int]:
        """The columns in which a figure with room for two shows the most: the first, and the last that was adapted."""
        adapted = [at for at, (_, run, _) in enumerate(self.columns) if at and run.system != "supervised"]
        return [0, *(adapted or range(1, len(self.columns)))[-1:]]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, background first."""
        return self.runs[0].model.classes

    @property
    def name(self) -> str:
        """Modality of the target."""
        return self.runs[0].model.domains["target"].modality.upper()


def group_runs(runs: Sequence[ReportedRun]) -> list[Group]:
    """Put runs with the same target dataset and classes together, in the order in which they come."""
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
    """A single run by its phases; several by where each has come, and before them one that was not adapted."""
    if len(runs) == 1:
        return [(end_title(end), runs[0], end) for end in runs[0].ends]
    columns = [
        (run.title + (" so far" if run.ends[-1].name == "last" else ""), run, run.ends[-1]) for run in runs if run.ends
    ]
    if not any(run.system == "source_only" for run in runs):
        for run in runs:
            for end in run.ends[:-1]:
                if end.name == "source_only":
                    return [(f"source only ({run.title})", run, end), *columns]
    return columns


def look_at_group(group: Group, case: str | None, device: str | None, tell: Tell) -> None:
    """Predict the case that is shown by every column, and draw features for two of them."""
    for run in group.runs:
        if not run.ends:
            group.notes.append(f"{run.title} has no checkpoint yet, so only what it has measured is shown.")
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
    for number, (title, run, end) in enumerate(group.columns):
        tell(f"predicting {group.shown.case.id}: {title} ({run.folder.name})")
        predictor = load(run, end, device)
        group.looks.append(look_at(predictor, group.shown, title))
        if number in group.contrast:
            sampled = sample_features(run, end, predictor, group.shown)
            if sampled is None:
                group.unsampled.append(title)
            else:
                group.samples[title], group.origins[title] = sampled
