"""What a report reads: the current state of runs, and their predictions of one case of the target."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpscl_ray.config import config_from_dict
from mpscl_ray.config.titles import system_of, title_of
from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.data.dataset import Case, load_manifest
from mpscl_ray.data.parquet_reader import read_case
from mpscl_ray.data.slice_selection import evenly_spaced, labelled_slices
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.methods.prototypes import downsample_labels, initial_prototypes, prototype_sums
from mpscl_ray.networks.deeplab import DeepLabV2, network_input
from mpscl_ray.predict.model import Checkpoint, Model, find_checkpoint, read_model
from mpscl_ray.predict.predictor import Predictor
from mpscl_ray.predict.segmentation import millilitres
from mpscl_ray.report.figures.feature_space import FeatureSample, sample_of
from mpscl_ray.report.figures.segmentations import Segmented
from mpscl_ray.runs import checkpoint, safe_yaml
from mpscl_ray.runs.run_directory import RunDirectory, open_run
from mpscl_ray.train.feature_log import FeatureRecord
from mpscl_ray.train.validation import weighted_mean

FEATURE_SLICES = 12
"""Slices of each domain whose features are sampled."""


@dataclass(frozen=True)
class ReportedRun:
    """A run as it is when the report is made."""

    folder: RunDirectory
    title: str
    """Its system, with the run's name where several runs of the report have the same system."""
    system: str
    """See :func:`mpscl_ray.config.titles.system_of`."""
    config: Mapping[str, Any]
    """Nested plain values."""
    model: Model
    records: Sequence[Mapping[str, Any]]
    """Records of metrics.jsonl."""
    feature_records: Sequence[Mapping[str, Any]]
    """Records of features.jsonl."""
    state: str
    """finished, running, stopped or failed, in words."""
    checkpoints: tuple[Checkpoint, ...]
    """Those to show: the end of each phase, then the newest one if it is later."""

    @property
    def direction(self) -> str:
        """Source and target modality."""
        return " to ".join(self.model.domains[domain].modality.upper() for domain in ("source", "target"))


def read_runs(runs: Sequence[Path | str]) -> list[ReportedRun]:
    """Read runs by their folders or URLs; runs of the same system get their names into their titles.

    Raises:
        ConfigError: one is not the folder of a run, or is named twice.
        DataError: one is damaged, or has not started to train.
    """
    folders = [open_run(run) for run in runs]
    addresses = [str(Path(folder.path).resolve()) for folder in folders]
    for folder, address in zip(folders, addresses, strict=True):
        if addresses.count(address) > 1:
            raise ConfigError(f"the run {folder.display_path} is given twice; give each once")
    found = [_read(folder) for folder in folders]
    titles = [run.title for run in found]
    return [
        dataclasses.replace(run, title=f"{run.title} ({run.folder.name})") if titles.count(run.title) > 1 else run
        for run in found
    ]


def _read(folder: RunDirectory) -> ReportedRun:
    config = safe_yaml.load(folder.read_config())
    system = system_of(config)
    features = {(record["global_step"], record["iteration"]): record for record in FeatureRecord(folder.path).read()}
    return ReportedRun(
        folder=folder,
        title=title_of(system),
        system=system,
        config=config,
        model=read_model(folder),
        records=folder.read_metrics(),
        feature_records=list(features.values()),
        state=_state(folder),
        checkpoints=_checkpoints(folder, config_from_dict(config, f"in {folder.config_file}").schedule),
    )


def _state(folder: RunDirectory) -> str:
    status = folder.read_status()
    state = str(status.get("state", "unknown"))
    position = f" (iteration {status['iteration']} of {status['phase']})" if status.get("phase") else ""
    if state == "running" and folder.store.lock_owner() is None:
        return f"killed{position}; the same command resumes it"
    return state if state == "finished" else f"{state}{position}"


def _checkpoints(folder: RunDirectory, schedule: Sequence[tuple[str, int]]) -> tuple[Checkpoint, ...]:
    found: list[Checkpoint] = []
    step = finished = 0
    for name, iterations in schedule:
        step += iterations
        if name in folder.store.finished_phases():
            found.append(find_checkpoint(folder, name)[0])
            finished = step
    steps = folder.store.step_checkpoints()
    if steps and checkpoint.step_of(Path(steps[-1])) > finished:
        found.append(find_checkpoint(folder, "last")[0])
    return tuple(found)


# ------------------------------------------------------------------------------------------------------- the case


@dataclass(frozen=True)
class ShownCase:
    """The volume of the target that the figures show."""

    case: Case
    """Its entry in the manifest."""
    image: NDArray[np.float32]
    """(D, H, W)."""
    label: NDArray[np.uint8] | None
    """(D, H, W); None where it has none."""


def choose_case(run: ReportedRun, name: str | None) -> ShownCase:
    """The case of that name, or the first labelled one of the test split, else validation, else any test case.

    A training case is only shown where it is asked for, and without its labels.

    Raises:
        ConfigError: the target has no such case.
        DataError: the dataset is missing or damaged, or has no case to show.
    """
    dataset = run.model.domains["target"].dataset
    if dataset is None or not dataset.exists():
        raise DataError(f"the target dataset of the run {run.folder.display_path}, {dataset}, does not exist any more")
    manifest = load_manifest(dataset)
    held_out = [case for split in ("test", "val") for case in manifest.split(split)]
    if name is None:
        # Sorting is stable: labelled cases come first, in the order of the splits.
        cases = sorted(held_out, key=lambda case: not case.labelled) or manifest.split("train")
        if not cases:
            raise DataError(f"{dataset} has no case")
    else:
        cases = [case for case in manifest.cases if case.id == name]
        if not cases:
            known = ", ".join(case.id for case in held_out) or "none"
            raise ConfigError(f"{dataset} has no case {name!r}; its test and validation cases are {known}")
    case = cases[0]
    arrays = read_case(dataset, case, ("image",) if case.split == "train" else ("image", "label"))
    return ShownCase(case, arrays["image"], arrays.get("label"))


@dataclass(frozen=True)
class Prediction(Segmented):
    """The prediction of one checkpoint for the shown case."""

    step: int | None
    """Iterations of all phases."""
    cross_entropy: float
    """Over the case, weighted by its classes; NaN without a label."""


def predict_case(predictor: Predictor, shown: ShownCase, title: str) -> Prediction:
    """Predict the whole case."""
    probabilities = predictor.predict_probabilities(shown.image)
    entropy = np.zeros(shown.image.shape, np.float32)
    for plane in probabilities:
        entropy -= plane * np.log(np.maximum(plane, 1e-12))
    entropy /= math.log(len(predictor.classes))
    spacing_mm = shown.case.spacing_mm
    labels = predictor.postprocessing("chosen")(
        probabilities.argmax(axis=0).astype(np.uint8),
        predictor.classes,
        None if spacing_mm is None else millilitres(spacing_mm),
    )
    loss = math.nan
    if shown.label is not None:
        annotated = shown.label != NOT_ANNOTATED
        label = shown.label[annotated].astype(np.intp)
        of_label = np.take_along_axis(probabilities[:, annotated], label[None], axis=0)[0]
        information = -np.log(np.maximum(of_label.astype(np.float64), 1e-12))
        number = len(predictor.classes)
        sums = np.bincount(label, information, number)
        pixels = np.bincount(label, minlength=number)
        loss = weighted_mean(torch.from_numpy(np.stack([sums, pixels], axis=1)))
    step = predictor.weights.step if predictor.weights else None
    return Prediction(title, labels, entropy, step, loss)


# ------------------------------------------------------------------------------------------------------- features


def sample_features(
    run: ReportedRun, saved: Checkpoint, predictor: Predictor, shown: ShownCase
) -> FeatureSample | None:
    """Features of a few slices of a labelled source case and of the shown case, and prototypes.

    Returns:
        None where the network has no single feature map, or the source no labelled case.
    """
    network = predictor.network
    dataset = run.model.domains["source"].dataset
    if not isinstance(network, DeepLabV2) or dataset is None or not dataset.exists():
        return None
    manifest = load_manifest(dataset)
    case = next((case for split in ("val", "train") for case in manifest.split(split) if case.labelled), None)
    if case is None:
        return None
    source = read_case(dataset, case)
    target_labels = shown.label if shown.label is not None else predictor.predict_slices(shown.image)

    def features_and_labels(image: NDArray[Any], label: NDArray[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, d, h, w) features of a few slices and (N, h, w) labels at their resolution."""
        chosen = evenly_spaced(labelled_slices(label), FEATURE_SLICES)
        with torch.inference_mode():
            images = torch.from_numpy(np.array(image[chosen]))[:, None].to(predictor.device)
            maps = network(network_input(images, network.in_channels)).features.float().cpu()
        return maps, downsample_labels(torch.from_numpy(label[chosen]).long(), (maps.shape[2], maps.shape[3]))

    shown_pixels = {
        "source": features_and_labels(source["image"], source["label"]),
        "target": features_and_labels(shown.image, target_labels),
    }
    prototypes = initial_prototypes(*prototype_sums(*shown_pixels["source"], len(predictor.classes)))
    origin = "class means of the source pixels shown"
    stored = checkpoint.load(saved.path)["method"].get("prototypes") if saved.path.is_dir() else None
    if stored is not None and bool(stored.any()):
        prototypes, origin = stored, "those of the method"
    features = {name: maps.permute(0, 2, 3, 1).flatten(0, 2).numpy() for name, (maps, _) in shown_pixels.items()}
    labels = {name: small.flatten().numpy().astype(np.uint8) for name, (_, small) in shown_pixels.items()}
    return sample_of(features, labels, prototypes.float().cpu().numpy(), origin)
