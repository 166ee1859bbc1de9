"""The trained segmenter of a run, ready to predict."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.ndimage
import torch
from torch import Tensor

from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.networks import Segmenter, build
from mpscl_ray.networks.pretrained import load_pretrained
from mpscl_ray.predict.model import Checkpoint, Model, Slices, find_checkpoint, read_model
from mpscl_ray.runs import checkpoint as checkpoints
from mpscl_ray.runs.run_directory import RunDirectory, open_run

Labels = npt.NDArray[np.uint8]

_BATCH_SLICES = {"cuda": 32, "cpu": 8}
_VOLUMES_PER_WORKER = 4
"""So many volumes are worth the start of a worker."""


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
