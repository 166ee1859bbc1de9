"""The scores of a trained segmenter on the labelled volumes of a prepared dataset.

Every slice of a volume is predicted, and measured is the whole volume on the grid that it was prepared on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mpscl_ray import __version__
from mpscl_ray.data import SPLITS
from mpscl_ray.data.dataset import Case, Manifest, Scaling, load_manifest, read_case
from mpscl_ray.data.volumes.preprocess import unscale
from mpscl_ray.distributed.parallel_map import map_volumes
from mpscl_ray.distributed.ray_session import connect
from mpscl_ray.errors import DataError
from mpscl_ray.evaluate.metrics import StructureScore, released_protocol_scores, volume_scores
from mpscl_ray.evaluate.tables import (
    LEGEND,
    Style,
    Summary,
    default_measures,
    format_table,
    scores_csv,
    summarise,
    summary_csv,
)
from mpscl_ray.predict.predictor import (
    Checkpoint,
    Domain,
    Model,
    Predictor,
    find_checkpoint,
    keep_largest_component,
    load_weights,
    read_model,
    segmenter_of_worker,
    volumes_at_a_time,
)
from mpscl_ray.runs.atomic_files import storage_errors, write_atomically
from mpscl_ray.runs.bucket_run import open_run
from mpscl_ray.runs.progress import ProgressLine
from mpscl_ray.runs.run_directory import RunFolder
from mpscl_ray.runs.storage import Remote, locate, written_to

RELEASED_PROTOCOL = (
    "RELEASED PROTOCOL, for comparison with published numbers alone: the last (slices mod 32) slices of each volume "
    "are left background, ASD is in voxels (mean of two means), a structure missing in prediction or truth has ASD 1, "
    "and Dice of a structure that is in neither is 0."
)


@dataclass(frozen=True)
class Evaluation:
    """Scores of one checkpoint on the labelled volumes of one split."""

    name: str
    """Also the name of its folder in the run's results."""
    run: str
    weights: Checkpoint
    dataset: Path | Remote
    modality: str
    fingerprint: str
    """Of the dataset."""
    split: str
    largest_component: bool
    released_protocol: bool
    classes: tuple[str, ...]
    slices: Mapping[str, int]
    """Slices of each case, all of which are predicted."""
    scores: Mapping[str, Sequence[StructureScore]]
    """By case, one for each structure."""
    summary: Summary
    notices: tuple[str, ...]
    """What one should know beside the numbers."""

    @property
    def row_label(self) -> str:
        """What this is called in a table; names a choice by target labels as such."""
        return self.weights.name + (" (oracle)" if self.weights.oracle else "")

    def table(self, style: Style = "text", measures: Sequence[str] | None = None) -> str:
        """The summary as a table with one row."""
        rows = {self.row_label: self.summary}
        if self.released_protocol:
            chosen = ("dice", "asd_voxel_mean_of_means")
            table = format_table(rows, chosen, style, legend=False)
            return f"{table}\n\n{RELEASED_PROTOCOL}"
        return format_table(rows, measures, style)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values; an undefined number is null."""
        return {
            "name": self.name,
            "product_version": __version__,
            "run": self.run,
            "checkpoint": {**asdict(self.weights), "path": str(self.weights.path), "oracle": self.weights.oracle},
            "dataset": {"path": str(self.dataset), "modality": self.modality, "fingerprint": self.fingerprint},
            "split": self.split,
            "largest_component": self.largest_component,
            "protocol": "released" if self.released_protocol else "every slice, empty masks counted",
            "explanation": RELEASED_PROTOCOL if self.released_protocol else LEGEND,
            "classes": list(self.classes),
            "notices": list(self.notices),
            "summary": self.summary.to_json(),
            "volumes": {
                case: {"slices": self.slices[case], "scores": [_without_nan(asdict(score)) for score in rows]}
                for case, rows in self.scores.items()
            },
        }


def evaluate_checkpoint(
    run: RunFolder | Path | str,
    checkpoint: str = "last",
    *,
    data: Path | str | None = None,
    split: str = "test",
    out: Path | Remote | str | None = None,
    device: str | None = None,
    workers: int | None = None,
    largest_component: bool = False,
    released_protocol: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Predict every labelled volume of a split, score it, and write the tables.

    Args:
        run: folder of the run, or its URL.
        checkpoint: see :func:`mpscl_ray.predict.predictor.find_checkpoint`.
        data: prepared dataset; None for the run's target.
        split: train, val or test.
        out: folder, or URL, for the tables; None for ``RUN/results/NAME``.
        device: None takes a GPU where there is one.
        workers: volumes at a time, on Ray; 0 in this process; None decides by their number.
        largest_component: whether only the largest connected part of each structure is kept.
        released_protocol: whether to count as the released code does, for comparison with published numbers.
        progress: whether to show a progress line.

    Returns:
        Scores and summary.

    Raises:
        ConfigError: no such run, checkpoint, split or device.
        DataError: the checkpoint or the dataset is damaged, they do not fit, or no volume of the split is labelled.
        StorageError: the tables cannot be written.
    """
    home = open_run(run)
    model = read_model(home)
    weights, notices = find_checkpoint(home, checkpoint)
    folder, manifest, domain = find_dataset(home.place, model, data)
    cases = _labelled_cases(folder, manifest, split)
    notices += _dataset_notices(manifest, domain, cases, len(manifest.split(split)), data is None)
    predictor = load_weights(model, weights, device)
    assert predictor.weights is not None
    weights = predictor.weights
    if weights.oracle:
        notices.append("oracle: labels of target volumes chose this checkpoint, which is not possible without them")
    parts = [weights.name, split] if domain is model.domains["target"] else [weights.name, manifest.modality, split]
    parts += ["largest_component"] * largest_component + ["released_protocol"] * released_protocol
    options = _Options(
        run=home.address,
        weights=replace(weights, path=home.relative(weights.path)),
        stamp=weights.stamp(),
        dataset=folder,
        device=device,
        scaling=manifest.scaling,
        domain=domain,
        largest_component=largest_component,
        released_protocol=released_protocol,
    )
    place = locate(out or home.results / "_".join(parts))
    if isinstance(place, Remote):  # before the work, not after it
        place.require_bucket()
    with written_to(place):
        pass
    scores = _score(predictor, options, cases, workers, progress)
    evaluation = Evaluation(
        name="_".join(parts),
        run=home.place,
        weights=weights,
        dataset=folder,
        modality=manifest.modality,
        fingerprint=manifest.fingerprint,
        split=split,
        largest_component=largest_component,
        released_protocol=released_protocol,
        classes=model.classes,
        slices={case.id: case.slices for case in cases},
        scores=scores,
        summary=summarise(scores),
        notices=tuple(notices),
    )
    with written_to(place) as written:
        _write(evaluation, written)
    if out is None:
        home.publish(home.results / place.name)
    return evaluation


# ------------------------------------------------------------------------------------------------------ dataset


def find_dataset(run: str, model: Model, data: Path | str | None) -> tuple[Path | Remote, Manifest, Domain | None]:
    """The dataset to score on, and the domain of the run that it belongs to."""
    target = model.domains["target"]
    if data is None:
        if target.dataset is None or not target.dataset.exists():
            raise DataError(
                f"the target dataset of the run {run}, {target.dataset}, is not there any more; give its folder with "
                "--data"
            )
        folder = target.dataset
    else:
        folder = locate(data)
    if isinstance(folder, Path):
        folder = folder.absolute()
    manifest = load_manifest(folder)
    if manifest.classes and manifest.classes != model.classes:  # none: an unlabelled dataset without a label table
        raise DataError(
            f"{folder} has the classes {', '.join(manifest.classes) or 'none'}, but the run {run} was trained on "
            f"{', '.join(model.classes)}; prepare it with the label table of the training data"
        )
    if manifest.size != model.size:
        raise DataError(
            f"slices of {folder} are {_by(manifest.size)}, those of the run {run} {_by(model.size)}; prepare the "
            "dataset with the crop and size of the training data"
        )
    domains = [target, model.domains["source"]]
    same = [domain for domain in domains if domain.dataset == folder]
    return folder, manifest, next(iter(same + [d for d in domains if d.modality == manifest.modality]), None)


def _labelled_cases(folder: Path | Remote, manifest: Manifest, split: str) -> list[Case]:
    cases = [case for case in manifest.split(split) if case.labelled]
    if cases:
        return cases
    counts = {name: sum(case.labelled for case in manifest.split(name)) for name in SPLITS}
    there = [f"{name} ({count})" for name, count in counts.items() if count]
    raise DataError(
        f"no case of the split {split} of {folder} is labelled ({len(manifest.split(split))} cases), so there is "
        f"nothing to compare predictions with; "
        + (f"choose a split with labelled cases: {', '.join(there)}" if there else "no other split has labels either")
    )


def _dataset_notices(manifest: Manifest, domain: Domain | None, cases: list[Case], total: int, own: bool) -> list[str]:
    notices = []
    if len(cases) < total:
        notices.append(f"{total - len(cases)} of {total} cases have no label and are left out")
    leaking = sum(case.cropped_around_labels for case in cases)
    if leaking:
        notices.append(f"the crop of {leaking} volumes was placed by their own labels, which flatters a little")
    if any(case.spacing_mm is None for case in cases):
        notices.append("the voxel size of some volumes is not known, so they have no distance in mm, only in voxels")
    if domain is None:
        notices.append(f"the run was not trained on the modality {manifest.modality}")
    else:
        low, high = manifest.scaling.low, manifest.scaling.high
        if (low, high) != (domain.low, domain.high):
            notices.append(
                f"the dataset is scaled by the range {low:g} to {high:g}; its slices were brought to {domain.low:g} to "
                f"{domain.high:g}, by which the run's {domain.modality} is scaled"
            )
        if own and domain.fingerprint not in (None, manifest.fingerprint):
            notices.append("the dataset was prepared anew since the run used it")
    return notices


# ------------------------------------------------------------------------------------------------------ scoring


@dataclass(frozen=True)
class _Options:
    """What scoring a case needs beside the case."""

    run: str
    weights: Checkpoint
    stamp: int
    dataset: Path | Remote
    device: str | None
    scaling: Scaling
    """Of the dataset."""
    domain: Domain | None
    """How the run prepared this modality; None where it does not know it."""
    largest_component: bool
    released_protocol: bool


def _score(
    predictor: Predictor, options: _Options, cases: Sequence[Case], workers: int | None, progress: bool
) -> dict[str, list[StructureScore]]:
    if workers is None:
        workers = volumes_at_a_time(len(cases), predictor.device)
    function: Callable[[Case], list[StructureScore]]
    if workers:
        function = partial(_score_in_worker, options)
    else:
        function = partial(_score_case, predictor, options)
    label = f"evaluating {options.weights.name.replace('_', ' ')}, volume"
    line = ProgressLine(len(cases), label) if progress else None
    with line or nullcontext(), connect(workers) if workers else nullcontext():
        rows = map_volumes(
            function,
            cases,
            workers=workers,
            name=lambda case: f"case {case.id}",
            done=lambda count: line.update(count) if line else None,
        )
    return {case.id: scores for case, scores in zip(cases, rows, strict=True)}


def _score_case(predictor: Predictor, options: _Options, case: Case) -> list[StructureScore]:
    arrays = read_case(options.dataset, case)
    slices, low, high = arrays["image"], options.scaling.low, options.scaling.high
    if options.domain is not None and (low, high) != (options.domain.low, options.domain.high):
        slices = options.domain.scale(unscale(slices, low, high))
    labels = predictor.predict_slices(slices)
    if options.largest_component:
        labels = keep_largest_component(labels, len(predictor.classes))
    if options.released_protocol:
        return released_protocol_scores(labels, arrays["label"], predictor.classes)
    return volume_scores(labels, arrays["label"], predictor.classes, case.spacing_mm)


def _score_in_worker(options: _Options, case: Case) -> list[StructureScore]:
    predictor = segmenter_of_worker(options.run, options.weights, options.stamp, options.device)
    return _score_case(predictor, options, case)


# ------------------------------------------------------------------------------------------------------- output


def _write(evaluation: Evaluation, folder: Path) -> None:
    about = [
        f"# {evaluation.name}",
        f"Run `{evaluation.run}`, checkpoint `{evaluation.weights.path}`"
        + (f" (iteration {evaluation.weights.step})" if evaluation.weights.step is not None else "")
        + f", {len(evaluation.scores)} volumes ({sum(evaluation.slices.values())} slices, all predicted) of the split "
        f"{evaluation.split} of `{evaluation.dataset}` ({evaluation.modality}).",
        *(f"Note: {notice}." for notice in evaluation.notices),
        evaluation.table("markdown", (*default_measures([evaluation.summary]), *_FURTHER)),
    ]
    write_tables(
        folder,
        {
            "per_volume.csv": scores_csv(evaluation.scores),
            "summary.csv": summary_csv({evaluation.row_label: evaluation.summary}),
            "summary.md": "\n\n".join(about) + "\n",
            "summary.json": json_text(evaluation.to_json()),
        },
    )


_FURTHER = ("asd_mm_mean_of_means", "asd_voxel", "asd_voxel_mean_of_means", "hd95_mm")


def write_tables(folder: Path, files: Mapping[str, str]) -> None:
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_atomically(folder / name, text.encode())


def json_text(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    return {name: None if value != value else value for name, value in values.items()}


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
