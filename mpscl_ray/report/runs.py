"""What a report reads: runs as they are now, and one case of their target as their segmenters see it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from mpscl_ray.config import config_from_dict
from mpscl_ray.config.titles import phase_title, system_of, title_of
from mpscl_ray.data import SPLITS
from mpscl_ray.data.dataset import Case, load_manifest
from mpscl_ray.data.parquet_reader import read_case
from mpscl_ray.data.slice_selection import evenly_spaced, labelled_slices
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.methods.prototypes import downsample_labels, initial_prototypes, prototype_sums
from mpscl_ray.networks.deeplab import DeepLabV2, network_input
from mpscl_ray.predict.model import Checkpoint, Model, find_checkpoint, read_model
from mpscl_ray.predict.predictor import Predictor, load_weights
from mpscl_ray.report.figures.feature_space import FeatureSample, sample_of
from mpscl_ray.report.figures.segmentations import Segmented
from mpscl_ray.runs import checkpoint as checkpoints
from mpscl_ray.runs.run_directory import RunDirectory, open_run
from mpscl_ray.train.feature_log import FeatureRecord
from mpscl_ray.train.validation import weighted_mean

FEATURE_SLICES = 12
"""Slices of each domain from which features are drawn."""


@dataclass(frozen=True)
class ReportedRun:
    """A run as it is when the report is made.

    Attributes:
        folder: of the run.
        title: its system, with the run's name where another run of the report has the same.
        system: see :func:`mpscl_ray.config.titles.system_of`.
        config: nested plain values.
        model: what it says of its segmenter.
        records: of metrics.jsonl.
        looks: of features.jsonl.
        state: finished, running, stopped or failed, in words.
        ends: the checkpoints to show: the end of each phase, then the newest one if it is beyond them.
    """

    folder: RunDirectory
    title: str
    system: str
    config: Mapping[str, Any]
    model: Model
    records: Sequence[Mapping[str, Any]]
    looks: Sequence[Mapping[str, Any]]
    state: str
    ends: tuple[Checkpoint, ...]

    @property
    def direction(self) -> str:
        """Source and target modality."""
        domains = self.model.domains
        return f"{domains['source'].modality} to {domains['target'].modality}".upper().replace(" TO ", " to ")


def read_runs(places: Sequence[Path | str]) -> list[ReportedRun]:
    """Read runs by their folders or URLs; those of the same system get their names into their titles.

    Raises:
        ConfigError: one is not the folder of a run, or is named twice.
        DataError: one is damaged, or has not begun to train.
    """
    folders = [open_run(place) for place in places]
    addresses = [str(Path(folder.path).resolve()) for folder in folders]
    for folder, address in zip(folders, addresses, strict=True):
        if addresses.count(address) > 1:
            raise ConfigError(f"the run {folder.display_path} is given twice; give each once")
    runs = [_read(folder) for folder in folders]
    titles = [run.title for run in runs]
    return [
        dataclasses.replace(run, title=f"{run.title} ({run.folder.name})") if titles.count(run.title) > 1 else run
        for run in runs
    ]


def _read(folder: RunDirectory) -> ReportedRun:
    config = yaml.safe_load(folder.read_config())
    system = system_of(config)
    looks = {(look["global_step"], look["iteration"]): look for look in FeatureRecord(folder.path).read()}
    return ReportedRun(
        folder=folder,
        title=title_of(system),
        system=system,
        config=config,
        model=read_model(folder),
        records=folder.read_metrics(),
        looks=list(looks.values()),
        state=_state(folder),
        ends=_ends(folder, config_from_dict(config, f"in {folder.config_file}").schedule),
    )


def _state(folder: RunDirectory) -> str:
    status = folder.read_status()
    state = str(status.get("state", "unknown"))
    if state == "running" and folder.store.lock_owner() is None:
        return "stopped without a word (killed); the same command goes on"
    place = f" (iteration {status['iteration']} of {status['phase']})" if status.get("phase") else ""
    return state if state == "finished" else f"{state}{place}"


def _ends(folder: RunDirectory, schedule: Sequence[tuple[str, int]]) -> tuple[Checkpoint, ...]:
    ends: list[Checkpoint] = []
    step = finished = 0
    for name, iterations in schedule:
        step += iterations
        if name in folder.store.finished_phases():
            ends.append(find_checkpoint(folder, name)[0])
            finished = step
    steps = folder.store.step_checkpoints()
    if steps and checkpoints.step_of(Path(steps[-1])) > finished:
        ends.append(find_checkpoint(folder, "last")[0])
    return tuple(ends)


def end_title(end: Checkpoint) -> str:
    """What a checkpoint of a run is called in a figure."""
    return "so far" if end.name == "last" else phase_title(end.name)


# ------------------------------------------------------------------------------------------------------- the case


@dataclass(frozen=True)
class ShownCase:
    """The volume of the target that the figures show.

    Attributes:
        case: its entry in the manifest.
        image: (D, H, W).
        label: (D, H, W); None where it has none.
    """

    case: Case
    image: NDArray[np.float32]
    label: NDArray[np.uint8] | None

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Of the voxels; all alike where it is not known."""
        return self.case.spacing_mm or (1.0, 1.0, 1.0)


def choose_case(run: ReportedRun, name: str | None) -> ShownCase:
    """The case of that name, or the first labelled one of the test split, else validation, else any test case.

    Training cases are only shown where they are asked for, and then without their labels.

    Raises:
        ConfigError: the target has no such case.
        DataError: the dataset is gone or damaged, or has no case to show.
    """
    dataset = run.model.domains["target"].dataset
    if dataset is None or not dataset.exists():
        raise DataError(f"the target dataset of the run {run.folder.display_path}, {dataset}, is not there any more")
    manifest = load_manifest(dataset)
    if name is not None:
        found = [case for case in manifest.cases if case.id == name]
        if not found:
            known = ", ".join(case.id for split in ("test", "val") for case in manifest.split(split))
            raise ConfigError(f"{dataset} has no case {name!r}; its test and validation cases are {known or 'none'}")
        case = found[0]
    else:
        held_out = [case for split in ("test", "val") for case in manifest.split(split)]
        held_out.sort(key=lambda case: not case.labelled)  # stable: labelled ones first, each kind in its order
        candidates = held_out or [case for split in SPLITS for case in manifest.split(split)]
        if not candidates:
            raise DataError(f"{dataset} has no case at all")
        case = candidates[0]
    arrays = read_case(dataset, case, ("image",) if case.split == "train" else ("image", "label"))
    return ShownCase(case, arrays["image"], arrays.get("label"))


@dataclass(frozen=True)
class Look:
    """One checkpoint's view of the shown case.

    Attributes:
        segmented: labels and entropies.
        step: iterations of all phases.
        cross_entropy: over the case, weighted by its classes; NaN without a label.
    """

    segmented: Segmented
    step: int | None
    cross_entropy: float


def look_at(predictor: Predictor, shown: ShownCase, title: str) -> Look:
    """Predict the whole case."""
    probabilities = predictor.predict_probabilities(shown.image)
    entropy = np.zeros(shown.image.shape, np.float32)
    for plane in probabilities:
        entropy -= plane * np.log(np.maximum(plane, 1e-12))
    entropy /= math.log(len(predictor.classes))
    labels = probabilities.argmax(axis=0).astype(np.uint8)
    loss = math.nan
    if shown.label is not None:
        of_label = np.take_along_axis(probabilities, shown.label[None].astype(np.intp), axis=0)[0]
        information = -np.log(np.maximum(of_label.astype(np.float64), 1e-12))
        number = len(predictor.classes)
        sums = np.bincount(shown.label.ravel(), information.ravel(), number)
        pixels = np.bincount(shown.label.ravel(), minlength=number)
        loss = weighted_mean(torch.from_numpy(np.stack([sums, pixels], axis=1)))
    step = predictor.weights.step if predictor.weights else None
    return Look(Segmented(title, labels, entropy), step, loss)


def load(run: ReportedRun, end: Checkpoint, device: str | None) -> Predictor:
    """The segmenter of a run at one checkpoint."""
    return load_weights(run.model, end, device)


# ------------------------------------------------------------------------------------------------------- features


def sample_features(
    run: ReportedRun, end: Checkpoint, predictor: Predictor, shown: ShownCase
) -> tuple[FeatureSample, str] | None:
    """Features of a few slices of a labelled source case and of the shown case, and where the prototypes come from.

    Returns:
        None where the network has no feature map to look at, or the source no labelled case.
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
    features, labels = {}, {}
    prototypes: torch.Tensor | None = None
    for domain, image, label in (
        ("source", source["image"], source["label"]),
        ("target", shown.image, target_labels),
    ):
        chosen = evenly_spaced(labelled_slices(label), FEATURE_SLICES)
        with torch.inference_mode():
            images = torch.from_numpy(np.array(image[chosen]))[:, None].to(predictor.device)
            maps = network(network_input(images, network.in_channels)).features.float()
        small = downsample_labels(torch.from_numpy(label[chosen]).long(), (maps.shape[2], maps.shape[3]))
        if domain == "source":
            sums, pixels = prototype_sums(maps.cpu(), small, len(predictor.classes))
            prototypes = initial_prototypes(sums, pixels)
        features[domain] = maps.permute(0, 2, 3, 1).flatten(0, 2).cpu().numpy()
        labels[domain] = small.flatten().numpy().astype(np.uint8)
    stored = checkpoints.load(end.path)["method"].get("prototypes") if end.path.is_dir() else None
    origin = "class means of the source pixels shown"
    if stored is not None and bool(stored.any()):
        prototypes, origin = stored, "the method's own"
    assert prototypes is not None
    return sample_of(features, labels, prototypes.float().cpu().numpy()), origin
