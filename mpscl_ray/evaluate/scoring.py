"""Scoring a trained segmenter on the labelled volumes of a prepared dataset.

What is scored is what predict writes: every slice of a volume is predicted, the labels are put back on the grid of its
image file, and all voxels there are counted. Two other protocols score the prepared slices, for comparison with papers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mpscl_ray.config.titles import phase_title
from mpscl_ray.data import SPLITS
from mpscl_ray.data.dataset import Case, Manifest, Scaling, load_manifest
from mpscl_ray.data.volumes.recipe import Recipe
from mpscl_ray.distributed.parallel_map import map_volumes
from mpscl_ray.distributed.places import TaskPlace
from mpscl_ray.distributed.ray_session import connect
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.evaluate.case_scores import CaseToScore, segment_and_score
from mpscl_ray.evaluate.evaluation import Evaluation, Protocol, write_evaluation
from mpscl_ray.evaluate.metrics import StructureScore
from mpscl_ray.evaluate.tables import summarise
from mpscl_ray.predict.model import Checkpoint, Domain, Model, find_checkpoint, read_model
from mpscl_ray.predict.predictor import (
    Predictor,
    cached_predictor,
    load_weights,
    num_inference_workers,
)
from mpscl_ray.runs.model_store import ModelStore, open_model
from mpscl_ray.runs.progress import ProgressLine
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.runs.storage import S3Path, output_directory, parse_location


def evaluate_checkpoint(
    run: RunDirectory | Path | str,
    checkpoint: str = "last",
    *,
    data: Path | str | None = None,
    split: str = "test",
    out: Path | S3Path | str | None = None,
    device: str | None = None,
    workers: int | None = None,
    largest_component: bool = False,
    protocol: Protocol | None = None,
    progress: bool = True,
    place: TaskPlace | None = None,
) -> Evaluation:
    """Predict every labelled volume of a split, score it, and write the tables.

    Args:
        run: folder of the run, a model file, or the URL of either.
        checkpoint: see :func:`mpscl_ray.predict.model.find_checkpoint`.
        data: prepared dataset; None for the run's target.
        split: train, val or test.
        out: folder, or URL, for the tables; None for ``RUN/results/NAME``.
        device: None takes a GPU if there is one.
        workers: volumes at a time, on Ray; 0 in this process; None decides by their number.
        largest_component: whether only the largest connected part of each structure is kept.
        protocol: ``file``: the label maps that predict writes, on the grid of the image files. ``prepared``: the
            prepared slices, resampled and cropped, as papers do. ``released``: these as the released code does. None:
            ``file``, or ``prepared`` for a dataset without label maps on that grid, and a notice says so.
        progress: whether to show a progress line.
        place: where on the Ray that this process is connected to each volume is scored; it decides the device. At most
            ``workers`` at a time, None: as many as the cluster has room for. Run and dataset must be readable there.

    Raises:
        ConfigError: no such run, checkpoint, split or device.
        DataError: the checkpoint or the dataset is damaged, they do not fit, or no volume of the split is labelled.
        StorageError: the tables cannot be written.
    """
    home = open_model(run)
    if out is None and isinstance(home.store, ModelStore):
        raise ConfigError(
            f"{home.display_path} is a model file, which keeps no results; give a folder for them: --out DIR"
        )
    device = place.device if place else device
    # Elsewhere this process only checks the weights, before tasks start.
    subject = _load(home, checkpoint, data, split, "cpu" if place else device)
    protocol, notices = _choose_protocol(protocol, subject)
    subject = replace(subject, notices=(*subject.notices, *notices))
    name = _result_name(subject, largest_component, protocol)
    location = parse_location(out or home.results / name)
    _check_writable(location)
    options = _Options(
        run=home.uri,
        weights=replace(subject.weights, path=home.relative_to_run(subject.weights.path)),
        stamp=subject.weights.stamp(),
        dataset=subject.dataset,
        device=device,
        scaling=subject.manifest.scaling,
        domain=subject.domain,
        largest_component=largest_component,
        protocol=protocol,
    )
    scores = _score(subject.predictor, options, subject.cases, workers, progress, place)
    evaluation = _evaluation(name, home.display_path, subject, options, scores)
    with output_directory(location) as written:
        write_evaluation(evaluation, written)
    if out is None:
        home.store.upload(home.results / location.name)
    return evaluation


def _check_writable(location: Path | S3Path) -> None:
    """Find out before the work whether the tables can be written."""
    if isinstance(location, S3Path):
        location.require_bucket()
    with output_directory(location):
        pass


# ------------------------------------------------------------------------------------------ segmenter and dataset


@dataclass(frozen=True)
class _Subject:
    """A segmenter, and the volumes that it is scored on."""

    predictor: Predictor
    weights: Checkpoint
    dataset: Path | S3Path
    manifest: Manifest
    split: str
    cases: Sequence[Case]
    domain: Domain | None
    """How the run prepared this modality; None if the run does not know it."""
    is_target: bool
    notices: tuple[str, ...]


def _load(home: RunDirectory, checkpoint: str, data: Path | str | None, split: str, device: str | None) -> _Subject:
    model = read_model(home)
    weights, notices = find_checkpoint(home, checkpoint)
    folder, manifest, domain = find_dataset(home.display_path, model, data)
    cases = _labelled_cases(folder, manifest, split)
    notices += _dataset_notices(manifest, domain, cases, len(manifest.split(split)), data is None)
    predictor = load_weights(model, weights, device)
    assert predictor.weights is not None
    weights = predictor.weights
    if weights.oracle:
        notices.append("oracle: labels of target volumes chose this checkpoint, which is not possible without them")
    is_target = domain is model.domains["target"]
    return _Subject(predictor, weights, folder, manifest, split, cases, domain, is_target, tuple(notices))


def _choose_protocol(protocol: Protocol | None, subject: _Subject) -> tuple[Protocol, list[str]]:
    """The protocol of an evaluation, and notices on it.

    Raises:
        DataError: the grid of the files is asked for, and the dataset does not keep it.
    """
    without = [case.id for case in subject.cases if case.label_map is None]
    if protocol is None:
        protocol = "prepared" if without else "file"
        if not without:
            return protocol, []
        return protocol, [
            "scored on the prepared slices, not on the grid of image files, because the dataset keeps no label maps "
            "there: it was made from slices, or by an earlier version"
        ]
    if protocol == "file" and without:
        raise DataError(
            f"{subject.dataset} keeps no label map on the grid of the image file for {len(without)} of "
            f"{len(subject.cases)} cases ({', '.join(without[:5])}): it was made from slices or by an earlier version; "
            f"prepare it again from volumes, or give --protocol prepared"
        )
    return protocol, []


def _result_name(subject: _Subject, largest_component: bool, protocol: Protocol) -> str:
    parts = [subject.weights.name, *([] if subject.is_target else [subject.manifest.modality]), subject.split]
    parts += ["largest_component"] * largest_component
    parts += [] if protocol == "file" else [f"{protocol}_protocol"]
    return "_".join(parts)


def find_dataset(run: str, model: Model, data: Path | str | None) -> tuple[Path | S3Path, Manifest, Domain | None]:
    """The dataset to score on, and the domain of the run that it belongs to."""
    target = model.domains["target"]
    if data is None:
        if target.dataset is None:
            raise DataError(f"{run} names no dataset; give the folder of one with --data")
        if not target.dataset.exists():
            raise DataError(
                f"the target dataset of the run {run}, {target.dataset}, no longer exists; give its folder with --data"
            )
        folder = target.dataset
    else:
        folder = parse_location(data)
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
    same = [domain for domain in domains if domain.dataset == folder or domain.fingerprint == manifest.fingerprint]
    return folder, manifest, next(iter(same + [d for d in domains if d.modality == manifest.modality]), None)


def _labelled_cases(folder: Path | S3Path, manifest: Manifest, split: str) -> list[Case]:
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
        notices.append(
            f"the crop of {leaking} volumes was placed by their own labels, as in papers; predict has none, so these "
            "scores are better than its own"
        )
    if manifest.labels.get("not_annotated"):
        notices.append("voxels that are not annotated count nowhere")
    if any(case.spacing_mm is None for case in cases):
        notices.append("the voxel size of some volumes is unknown, so they have distances in voxels only, not in mm")
    if domain is None:
        notices.append(f"the run was not trained on the modality {manifest.modality}")
    else:
        low, high = manifest.scaling.low, manifest.scaling.high
        if (low, high) != (domain.low, domain.high):
            notices.append(
                f"the dataset is scaled by the range {low:g} to {high:g}; its slices were rescaled to {domain.low:g} "
                f"to {domain.high:g}, the range of the run's {domain.modality}"
            )
        recipe = replace(Recipe.from_json(manifest.recipe), centre="image", hounsfield=False)
        if recipe != replace(domain.recipe, centre="image", hounsfield=False):
            notices.append(
                "the dataset was prepared by another recipe than the training data, by which predict prepares images"
            )
        if own and domain.fingerprint not in (None, manifest.fingerprint):
            notices.append("the dataset was prepared again since the run used it")
    return notices


# ------------------------------------------------------------------------------------------------------ scoring


@dataclass(frozen=True)
class _Options:
    """What a worker needs to score a case."""

    run: str
    weights: Checkpoint
    stamp: int
    dataset: Path | S3Path
    device: str | None
    scaling: Scaling
    """Scaling of the dataset."""
    domain: Domain | None
    """How the run prepared this modality; None if the run does not know it."""
    largest_component: bool
    protocol: Protocol


def _score(
    predictor: Predictor,
    options: _Options,
    cases: Sequence[Case],
    workers: int | None,
    progress: bool,
    place: TaskPlace | None,
) -> dict[str, list[StructureScore]]:
    if workers is None and place is None:
        workers = num_inference_workers(len(cases), predictor.device)
    function: Callable[[Case], list[StructureScore]]
    if workers != 0:
        function = partial(_score_in_worker, options)
    else:
        function = partial(_score_case, predictor, options)
    label = f"evaluating {phase_title(options.weights.name)}, volume"
    line = ProgressLine(len(cases), label) if progress else None
    with line or nullcontext(), connect(workers) if workers else nullcontext():
        rows = map_volumes(
            function,
            cases,
            workers=workers,
            name=lambda case: f"case {case.id}",
            done=lambda count: line.update(count) if line else None,
            place=place,
        )
    return {case.id: scores for case, scores in zip(cases, rows, strict=True)}


def _score_case(predictor: Predictor, options: _Options, case: Case) -> list[StructureScore]:
    subject = CaseToScore(options.dataset, case, options.scaling, options.domain)
    _, scores = segment_and_score(predictor, subject, options.protocol, largest_component=options.largest_component)
    assert scores is not None, f"{case.id} was chosen because it has labels"
    return scores


def _score_in_worker(options: _Options, case: Case) -> list[StructureScore]:
    predictor = cached_predictor(options.run, options.weights, options.stamp, options.device)
    return _score_case(predictor, options, case)


def _evaluation(
    name: str, run: str, subject: _Subject, options: _Options, scores: dict[str, list[StructureScore]]
) -> Evaluation:
    return Evaluation(
        name=name,
        run=run,
        weights=subject.weights,
        dataset=subject.dataset,
        modality=subject.manifest.modality,
        fingerprint=subject.manifest.fingerprint,
        split=subject.split,
        largest_component=options.largest_component,
        protocol=options.protocol,
        classes=subject.predictor.classes,
        slices={case.id: case.slices for case in subject.cases},
        scores=scores,
        summary=summarise(scores),
        notices=subject.notices,
    )


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
