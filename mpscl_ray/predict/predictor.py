"""From the folder of a run to labels: the trained segmenter with all that a new volume needs to be prepared alike."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import scipy.ndimage
import torch
from torch import Tensor

from mpscl_ray.data.volumes.preprocess import scale
from mpscl_ray.data.volumes.recipe import Recipe
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.networks import Segmenter, build
from mpscl_ray.networks.pretrained import load_pretrained
from mpscl_ray.runs import checkpoint as checkpoints
from mpscl_ray.runs.run_directory import RunDirectory, open_run
from mpscl_ray.runs.storage import S3Path, parse_location

Labels = npt.NDArray[np.uint8]
Slices = npt.NDArray[np.float32]

_BATCH_SLICES = {"cuda": 32, "cpu": 8}
_VOLUMES_PER_WORKER = 4
"""So many volumes are worth the start of a worker."""


@dataclass(frozen=True)
class Domain:
    """How volumes of one modality become slices, as ``model.json`` has it."""

    modality: str
    low: float
    high: float
    """Normalised intensities that -1 and 1 stand for."""
    recipe: Recipe
    dataset: Path | S3Path | None
    """Prepared folder that the run used; it may have moved since."""
    fingerprint: str | None
    raw_ids: Mapping[str, int]
    """Label id of each class in the files that the dataset was made from; empty where that is not known."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """From an entry of ``model.json``; raises KeyError, TypeError or ValueError where it is not one."""
        raw_ids: dict[str, int] = {}
        for raw, name in sorted(values.get("labels", {}).get("values", {}).items(), key=lambda item: int(item[0])):
            raw_ids.setdefault(name, int(raw))
        return cls(
            modality=str(values["modality"]),
            low=float(values["scaling"]["low"]),
            high=float(values["scaling"]["high"]),
            recipe=Recipe.from_json(values["recipe"]),
            dataset=parse_location(values["dataset"]) if values.get("dataset") else None,
            fingerprint=values.get("fingerprint"),
            raw_ids=raw_ids,
        )

    def scale(self, image: Slices) -> Slices:
        """Normalised slices as the segmenter takes them."""
        return scale(image, self.low, self.high)


@dataclass(frozen=True)
class Model:
    """What ``model.json`` of a run says: all about the segmenter but its weights."""

    classes: tuple[str, ...]
    """Background first."""
    size: tuple[int, int]
    """Height and width of a slice."""
    network: Mapping[str, Any]
    """What :func:`mpscl_ray.networks.build` makes it from."""
    domains: Mapping[str, Domain]
    """``source`` and ``target``."""
    phases: tuple[str, ...]

    def domain(self, name: str) -> Domain:
        """The domain called ``source`` or ``target``, or by its modality.

        Raises:
            ConfigError: neither.
        """
        for role in ("target", "source"):
            if name in (role, self.domains[role].modality):
                return self.domains[role]
        known = ", ".join(f"{role} ({domain.modality})" for role, domain in self.domains.items())
        raise ConfigError(f"the run knows no modality {name!r}; choose one of {known}")


@dataclass(frozen=True)
class Checkpoint:
    """Which weights: where they are and what the run knows of them."""

    name: str
    """As results are called by it: ``last``, ``best``, the name of a phase, or of the folder or file."""
    path: Path
    phase: str | None = None
    step: int | None = None
    """Iterations of all phases; None for weights that come from elsewhere."""
    selected_by: str | None = None
    """What chose it among the checkpoints of its run, if anything: ``label_free`` or ``oracle``."""

    @property
    def oracle(self) -> bool:
        """Whether target labels chose it, which a user without such labels cannot repeat."""
        return self.selected_by == "oracle"

    def stamp(self) -> int:
        """Changes when other weights take the same place."""
        return self.path.stat().st_mtime_ns


class Predictor:
    """A segmenter in evaluation mode.

    Every slice of a volume is predicted, in batches; logits are brought to the size of the slices and the softmax is
    taken in float32. The same slices give the same labels on the same machine.

    Args:
        network: trained segmenter; it is moved to the device and stays in evaluation mode.
        classes: names, background first.
        device: None takes a GPU where there is one.
        batch_slices: slices at a time; None for 32 on a GPU and 8 on a CPU.
        model: what else the run knows; None for a segmenter without a run.
        weights: which checkpoint the network has.
    """

    def __init__(
        self,
        network: Segmenter,
        classes: tuple[str, ...] | list[str],
        *,
        device: torch.device | str | None = None,
        batch_slices: int | None = None,
        model: Model | None = None,
        weights: Checkpoint | None = None,
    ) -> None:
        if network.num_classes != len(classes):
            raise ValueError(f"the segmenter tells {network.num_classes} classes apart, but {len(classes)} are named")
        self.device = choose_device(device)
        self.network = network.to(self.device).eval()
        self.classes = tuple(classes)
        self.batch_slices = batch_slices or _BATCH_SLICES.get(self.device.type, 8)
        self.model = model
        self.weights = weights

    def predict_slices(self, slices: Slices) -> Labels:
        """Labels of all slices of a volume.

        Args:
            slices: (D, H, W), scaled to [-1, 1].

        Returns:
            (D, H, W) class indices.

        Raises:
            DataError: the weights give values that are not finite.
        """
        labels = np.empty(slices.shape, dtype=np.uint8)
        for start, probabilities in self._batches(slices):
            labels[start : start + len(probabilities)] = probabilities.argmax(1).cpu().numpy()
        return labels

    def predict_probabilities(self, slices: Slices) -> npt.NDArray[np.float32]:
        """Probabilities (C, D, H, W) of all slices (D, H, W) of a volume, which take C times their memory."""
        result = np.empty((len(self.classes), *slices.shape), dtype=np.float32)
        for start, probabilities in self._batches(slices):
            result[:, start : start + len(probabilities)] = probabilities.transpose(0, 1).cpu().numpy()
        return result

    def _batches(self, slices: Slices) -> Iterator[tuple[int, Tensor]]:
        """Position of the first slice and probabilities (B, C, H, W) of each batch."""
        if slices.ndim != 3:
            raise ValueError(f"slices must have shape (D, H, W), got {slices.shape}")
        for start in range(0, len(slices), self.batch_slices):
            batch = np.array(slices[start : start + self.batch_slices], dtype=np.float32)  # torch wants its own memory
            # For this call alone: TF32 rounding and the search for the fastest kernel would make results vary.
            exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
            with exact, torch.inference_mode():
                images = torch.from_numpy(batch)[:, None].to(self.device)
                probabilities = torch.softmax(self.network.logits(images), dim=1)
                finite = bool(torch.isfinite(probabilities).all())
            if not finite:
                origin = f"the weights in {self.weights.path}" if self.weights else "the segmenter's weights"
                raise DataError(f"{origin} give values that are not finite; choose an earlier checkpoint")
            yield start, probabilities


def load_segmenter(
    run: RunDirectory | Path | str,
    checkpoint: str = "last",
    device: torch.device | str | None = None,
    batch_slices: int | None = None,
) -> Predictor:
    """The segmenter of a run, ready to predict.

    Args:
        run: folder of the run, or its URL.
        checkpoint: see :func:`find_checkpoint`.
        device: see :class:`Predictor`.
        batch_slices: see :class:`Predictor`.

    Raises:
        ConfigError: no such run or checkpoint.
        DataError: the run has no checkpoint yet, or one that is damaged or does not fit the network.
    """
    folder = open_run(run)
    model = read_model(folder)
    weights, _ = find_checkpoint(folder, checkpoint)
    return load_weights(model, weights, device, batch_slices)


def read_model(run: RunDirectory | Path | str) -> Model:
    """What a run says of its segmenter. Raises ConfigError where there is no run, DataError for a damaged one."""
    folder = open_run(run)
    folder.require()
    values = folder.read_model()
    try:
        model = Model(
            classes=tuple(str(name) for name in values["classes"]),
            size=(int(values["size"][0]), int(values["size"][1])),
            network={"num_classes": len(values["classes"]), **values["network"]},
            domains={"source": Domain.from_json(values["source"]), "target": Domain.from_json(values["target"])},
            phases=tuple(values.get("phases", ())),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{folder.model_file} is not what a run writes ({type(error).__name__}: {error}); restore it from a copy, "
            "or run the training command again, which writes it anew"
        ) from error
    if model.network["num_classes"] != len(model.classes):
        raise DataError(
            f"{folder.model_file} names {len(model.classes)} classes for a network with "
            f"{model.network['num_classes']}; restore it from a copy"
        )
    return model


def find_checkpoint(run: RunDirectory | Path | str, checkpoint: str = "last") -> tuple[Checkpoint, list[str]]:
    """Where the weights are.

    Args:
        run: folder of the run, or its URL.
        checkpoint: ``last``, the newest that is intact; ``best``, the one with the best validation score; the name of a
            phase (``source_only``, ``warm_up``, ``adaptation``) for its end; the name of one in ``checkpoints/``; or a
            path: the folder of a checkpoint, or a file with released weights.

    Returns:
        The checkpoint, not read yet, and a sentence for each damaged one that was passed over.

    Raises:
        ConfigError: no run, or no checkpoint of that name in it; says which there are.
        DataError: ``last`` of a run that has none yet.
    """
    folder = open_run(run)
    folder.require()
    if checkpoint == "last":
        path, notices = folder.store.latest_checkpoint()
        if path is None:
            reason = "; ".join(notices) or "training has not come to its first one"
            raise DataError(f"the run {folder.display_path} has no intact checkpoint: {reason}")
        return Checkpoint("last", path), notices
    there = folder.store.checkpoint_names()
    if checkpoint in there:
        parents = {"best": folder.path} | dict.fromkeys(folder.store.step_checkpoints(), folder.checkpoints)
        return Checkpoint(checkpoint, folder.store.localize(parents.get(checkpoint, folder.phases) / checkpoint)), []
    path = Path(checkpoint)
    if checkpoint != "best" and path.exists():
        return Checkpoint(path.name, path.absolute()), []  # whoever predicts may stand in another folder
    raise ConfigError(
        f"the run {folder.display_path} has no checkpoint {checkpoint!r} and there is no such path; it has "
        f"{', '.join(['last', *there]) if there else 'none yet'}"
    )


def load_weights(
    model: Model, weights: Checkpoint, device: torch.device | str | None = None, batch_slices: int | None = None
) -> Predictor:
    """Build the segmenter and read its weights.

    Raises:
        DataError: damaged, or of another network.
    """
    if weights.path.is_file():
        network = _build(model.network, "model.json")
        report = load_pretrained(network, weights.path)
        missing = [key for key in report.untouched if not key.endswith("num_batches_tracked")]
        if missing:
            raise DataError(
                f"{weights.path} has no weights for {len(missing)} tensors of the segmenter, such as {missing[0]}; it "
                "can start a training (network.pretrained) but not predict"
            )
        return Predictor(network, model.classes, device=device, batch_slices=batch_slices, model=model, weights=weights)
    state = checkpoints.load(weights.path)
    # The network of a phase may differ from the one that the run ends with.
    network = _build(state.get("network", model.network), str(weights.path))
    try:
        tensors = state["method"]["networks"]["segmenter"]
        network.load_state_dict(tensors)
    except KeyError as error:
        raise DataError(f"{weights.path} is no checkpoint of a training: it has no entry {error}") from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{weights.path} does not fit the network of this run: {reason[:500]}; give a checkpoint of this run"
        ) from error
    stored = state.get("classes")
    if stored is not None and tuple(stored) != model.classes:
        raise DataError(
            f"{weights.path} was trained on the classes {', '.join(stored)}, the run has {', '.join(model.classes)}"
        )
    weights = Checkpoint(
        name=weights.name,
        path=weights.path,
        phase=state.get("phase"),
        step=state.get("position", {}).get("step"),
        selected_by=state.get("selected_by"),
    )
    return Predictor(network, model.classes, device=device, batch_slices=batch_slices, model=model, weights=weights)


def _build(description: Mapping[str, Any], origin: str) -> Segmenter:
    try:
        return build(description)
    except (TypeError, ValueError) as error:
        raise DataError(f"{origin} describes no network of this version: {error}") from error


@lru_cache(maxsize=1)
def segmenter_of_worker(run: str, weights: Checkpoint, stamp: int, device: str | None) -> Predictor:
    """The segmenter for the many volumes that one worker process is given; read again when the stamp is another.

    Args:
        run: address of the run.
        weights: their path may be the way from the run's folder, which need not be the same on every node.
        stamp: see :meth:`Checkpoint.stamp`.
        device: see :class:`Predictor`.
    """
    folder = open_run(run)
    return load_weights(read_model(folder), replace(weights, path=folder.store.localize(weights.path)), device)


def volumes_at_a_time(volumes: int, device: torch.device) -> int:
    """How many workers to spread volumes over; 0 for this process alone, which on a CPU uses all cores as well."""
    workers = min(os.cpu_count() or 1, volumes // _VOLUMES_PER_WORKER)
    return workers if workers > 1 and device.type == "cpu" else 0


def choose_device(device: torch.device | str | None = None) -> torch.device:
    """The device asked for; without one a GPU where there is one.

    Raises:
        ConfigError: no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"there is no device {device!r}; write cpu, cuda or cuda:N") from error
    if chosen.type == "cuda" and (not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"the device {chosen} was asked for, but {torch.cuda.device_count()} GPUs can be used here")
    return chosen


def keep_largest_component(labels: Labels, num_classes: int) -> Labels:
    """The volume with only the largest connected part (by faces) of each structure; other parts become background.

    Args:
        labels: (D, H, W) class indices.
        num_classes: C, background included.

    Returns:
        A new array. Of parts of equal size the first in memory stays.
    """
    kept = np.zeros_like(labels)
    boxes = scipy.ndimage.find_objects(labels, max_label=num_classes - 1)
    for index, box in enumerate(boxes, start=1):
        if box is None:
            continue
        parts, _ = scipy.ndimage.label(labels[box] == index)
        sizes = np.bincount(parts.ravel())
        sizes[0] = 0
        kept[box][parts == sizes.argmax()] = index
    return kept
