"""A run's segmenter, and the labelled volumes of a prepared dataset that it is scored on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mpscl_ray.data import SPLITS
from mpscl_ray.data.dataset import Case, Manifest, load_manifest
from mpscl_ray.data.volumes.recipe import Recipe
from mpscl_ray.errors import DataError
from mpscl_ray.evaluate.evaluation import Protocol
from mpscl_ray.predict.model import Checkpoint, Domain, Model, find_checkpoint, read_model
from mpscl_ray.predict.predictor import Predictor, load_weights
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.runs.storage import S3Path, parse_location


@dataclass(frozen=True)
class Subject:
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


def load_subject(
    home: RunDirectory,
    checkpoint: str,
    data: Path | S3Path | str | None,
    split: str,
    device: str | None,
    *,
    labelled: bool = True,
) -> Subject:
    """Read a checkpoint and a manifest: the labelled cases of a split of a dataset, None for the run's target.

    Without ``labelled`` all of them, as if none had a label.

    Raises:
        ConfigError: no such run, checkpoint or device.
        DataError: the checkpoint or the dataset is damaged, they do not fit, or no case of the split is labelled.
    """
    model = read_model(home)
    weights, notices = find_checkpoint(home, checkpoint)
    folder, manifest, domain = find_dataset(home.display_path, model, data)
    cases = _labelled_cases(folder, manifest, split) if labelled else _without_labels(manifest, split)
    notices += _dataset_notices(manifest, domain, cases, len(manifest.split(split)), data is None)
    predictor = load_weights(model, weights, device)
    assert predictor.weights is not None
    weights = predictor.weights
    if weights.oracle:
        notices.append("oracle: labels of target volumes chose this checkpoint, which is not possible without them")
    is_target = domain is model.domains["target"]
    return Subject(predictor, weights, folder, manifest, split, cases, domain, is_target, tuple(notices))


def choose_protocol(protocol: Protocol | None, subject: Subject) -> tuple[Protocol, list[str]]:
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


def validation_cases(model: Model, domain: str) -> tuple[Case, ...]:
    """Cases of the validation split of ``source`` or ``target``. Raises DataError where the dataset is not there."""
    dataset = model.domains[domain].dataset
    if dataset is None or not dataset.exists():
        raise DataError(f"the {domain} dataset of the run, {dataset}, no longer exists; put it back")
    return load_manifest(dataset).split("val")


def find_dataset(
    run: str, model: Model, data: Path | S3Path | str | None
) -> tuple[Path | S3Path, Manifest, Domain | None]:
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


def weights_of(home: RunDirectory, phases: Sequence[str]) -> list[str]:
    """Names of the checkpoints at the ends of phases, and of ``best`` where there is one."""
    return [*phases, *(name for name in home.store.checkpoint_names() if name == "best")]


def _without_labels(manifest: Manifest, split: str) -> list[Case]:
    return [replace(case, labelled=False, label_map=None) for case in manifest.split(split)]


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


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
