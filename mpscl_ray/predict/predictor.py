"""The trained segmenter of a run, ready to predict."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.networks import Segmenter, build
from mpscl_ray.networks.pretrained import load_pretrained
from mpscl_ray.predict.model import Checkpoint, Domain, Model, Slices, find_checkpoint, read_model
from mpscl_ray.predict.postprocessing import (
    NO_POSTPROCESSING,
    Labels,
    Postprocessing,
    PostprocessingChoice,
    check_choice,
    largest_component_of_each,
)
from mpscl_ray.predict.quality import Calibration, SliceMaps
from mpscl_ray.predict.tta import augmented
from mpscl_ray.runs import checkpoint as checkpoints
from mpscl_ray.runs.model_store import open_model
from mpscl_ray.runs.run_directory import RunDirectory

_BATCH_SLICES = {"cuda": 32, "cpu": 8}
_VOLUMES_PER_WORKER = 4
"""Number of volumes for which starting a worker pays off."""


class Predictor:
    """A segmenter in evaluation mode.

    Every slice of a volume is predicted, in batches. Logits are resized to the size of the slices, and the softmax is
    computed in float32. The same slices give the same labels on the same machine.

    Args:
        network: trained segmenter; it is moved to the device and stays in evaluation mode.
        classes: names, background first.
        device: None takes a GPU if there is one.
        batch_slices: slices at a time; None for 32 on a GPU and 8 on a CPU.
        model: description of the run's model; None for a segmenter without a run.
        weights: checkpoint of the network.
        tta: average over slices that are moved a little (:mod:`mpscl_ray.predict.tta`), in one batch after the other.
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
        tta: bool = False,
    ) -> None:
        if network.num_classes != len(classes):
            raise ValueError(f"the segmenter has {network.num_classes} classes, but {len(classes)} names are given")
        self.device = choose_device(device)
        self.network = network.to(self.device).eval()
        self.classes = tuple(classes)
        self.batch_slices = batch_slices or _BATCH_SLICES.get(self.device.type, 8)
        self.model = model
        self.weights = weights
        self.tta = tta

    several = False
    """Whether it is an ensemble, whose members may disagree."""

    def postprocessing(self, choice: PostprocessingChoice) -> Postprocessing:
        """The rules that a choice stands for with these weights. Raises ConfigError for another choice."""
        check_choice(choice)
        if choice == "largest_component":
            return largest_component_of_each(self.classes)
        if choice == "none" or self.model is None or not self.model.postprocessing:
            return NO_POSTPROCESSING
        return self.model.postprocessing.get(self.weights_digest, NO_POSTPROCESSING)

    @property
    def calibrations(self) -> tuple[Calibration, ...]:
        """What estimates the quality of a segmentation; empty where these weights were not calibrated."""
        found = self.model.quality.get(self.weights_digest) if self.model is not None and self.model.quality else None
        return () if found is None else (found,)

    @cached_property
    def weights_digest(self) -> str:
        """SHA-256 of the tensors, the same whatever file they come from."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def predict_slices(self, slices: Slices) -> Labels:
        """Labels of all slices of a volume.

        Args:
            slices: (D, H, W), scaled to [-1, 1].

        Returns:
            (D, H, W) class indices.

        Raises:
            DataError: the weights give values that are not finite.
        """
        return self.predict_maps(slices).labels

    def predict_maps(self, slices: Slices) -> SliceMaps:
        """Labels of all slices (D, H, W) of a volume and how sure they are, without keeping the probabilities."""
        labels, confidence = np.empty(slices.shape, dtype=np.uint8), np.empty(slices.shape, dtype=np.float32)
        mass, disagreement = np.zeros(len(self.classes)), np.zeros(slices.shape, np.float32) if self.several else None
        for start, probabilities, entropy in self._batches(slices, entropies=self.several):
            batch = slice(start, start + len(probabilities))
            labels[batch] = probabilities.argmax(1).cpu().numpy()
            confidence[batch] = probabilities.amax(1).cpu().numpy()
            mass += probabilities.sum(dim=(0, 2, 3), dtype=torch.float64).cpu().numpy()
            if disagreement is not None:
                disagreement[batch] = self._disagreement(probabilities, entropy)
        return SliceMaps(labels, confidence, mass, disagreement)

    def predict_probabilities(self, slices: Slices) -> npt.NDArray[np.float32]:
        """Probabilities (C, D, H, W) of all slices (D, H, W) of a volume, which take C times their memory."""
        result = np.empty((len(self.classes), *slices.shape), dtype=np.float32)
        for start, probabilities, _ in self._batches(slices):
            result[:, start : start + len(probabilities)] = probabilities.transpose(0, 1).cpu().numpy()
        return result

    def predict_disagreement(self, slices: Slices) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Probabilities (C, D, H, W), and how much the passes that they are the mean of disagree (D, H, W).

        The disagreement is the entropy of the mean minus the mean of the entropies, over log C: 0 where all passes
        agree, or where there is only one, and at most 1.
        """
        result = np.empty((len(self.classes), *slices.shape), dtype=np.float32)
        disagreement = np.empty(slices.shape, dtype=np.float32)
        for start, probabilities, entropy in self._batches(slices, entropies=True):
            batch = slice(start, start + len(probabilities))
            result[:, batch] = probabilities.transpose(0, 1).cpu().numpy()
            disagreement[batch] = self._disagreement(probabilities, entropy)
        return result, disagreement

    def _disagreement(self, mean: Tensor, entropy: Tensor) -> npt.NDArray[np.float32]:
        difference = torch.special.entr(mean).sum(dim=1) - entropy
        scaled: npt.NDArray[np.float32] = (difference.clamp(min=0) / math.log(len(self.classes))).cpu().numpy()
        return scaled

    def prepared_as(self, domain: Domain) -> Predictor:
        """The predictor for slices that were prepared as a domain of its model."""
        return self

    def _passes(self, images: Tensor) -> Iterator[Tensor]:
        """Probabilities (B, C, H, W) of slices (B, 1, H, W), once for each pass."""

        def probabilities(batch: Tensor) -> Tensor:
            return torch.softmax(self.network.logits(batch), dim=1)

        if self.tta:
            yield from augmented(probabilities, images, self.model.mirror_axes if self.model else ())
        else:
            yield probabilities(images)

    def _mean(self, images: Tensor, entropies: bool) -> tuple[Tensor, Tensor]:
        """Means over all passes: probabilities (B, C, H, W), and their entropy (B, H, W), which is 0 if not asked for.

        Two passes are in memory.
        """
        total, entropy, count = images.new_zeros(()), images.new_zeros(images[:, 0].shape), 0
        for found in self._passes(images):
            total, count = total + found, count + 1
            if entropies:
                entropy += torch.special.entr(found).sum(dim=1)
        return total / count, entropy / count

    def _batches(self, slices: Slices, *, entropies: bool = False) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Of each batch: position of its first slice, and the means of :meth:`_mean`."""
        if slices.ndim != 3:
            raise ValueError(f"slices must have shape (D, H, W), got {slices.shape}")
        for start in range(0, len(slices), self.batch_slices):
            batch = np.array(
                slices[start : start + self.batch_slices], dtype=np.float32
            )  # a writable copy, as torch requires
            # For this call only: TF32 rounding and the search for the fastest kernel would make results vary.
            exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
            with exact, torch.inference_mode():
                images = torch.from_numpy(batch)[:, None].to(self.device)
                probabilities, entropy = self._mean(images, entropies)
                finite = bool(torch.isfinite(probabilities).all())
            if not finite:
                origin = f"the weights in {self.weights.path}" if self.weights else "the segmenter's weights"
                raise DataError(f"{origin} give values that are not finite; choose an earlier checkpoint")
            yield start, probabilities, entropy


def load_segmenter(
    run: RunDirectory | Path | str,
    checkpoint: str = "last",
    device: torch.device | str | None = None,
    batch_slices: int | None = None,
    *,
    tta: bool = False,
) -> Predictor:
    """The segmenter of a run, ready to predict.

    Args:
        run: folder of the run, a model file, or the URL of either.
        checkpoint: see :func:`mpscl_ray.predict.model.find_checkpoint`.
        device: see :class:`Predictor`.
        batch_slices: see :class:`Predictor`.
        tta: see :class:`Predictor`.

    Raises:
        ConfigError: no such run or checkpoint.
        DataError: the run has no checkpoint yet, or it is damaged or does not fit the network.
    """
    folder = open_model(run)
    model = read_model(folder)
    weights, _ = find_checkpoint(folder, checkpoint)
    return load_weights(model, weights, device, batch_slices, tta=tta)


def load_weights(
    model: Model,
    weights: Checkpoint,
    device: torch.device | str | None = None,
    batch_slices: int | None = None,
    *,
    tta: bool = False,
) -> Predictor:
    """Build the segmenter and read its weights.

    Raises:
        DataError: they are damaged, or of another network.
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
        return Predictor(
            network, model.classes, device=device, batch_slices=batch_slices, model=model, weights=weights, tta=tta
        )
    state = checkpoints.load(weights.path)
    # The network of a phase may differ from the run's last one.
    model = replace(model, network=state.get("network", model.network))
    network = _build(model.network, str(weights.path))
    try:
        tensors = state["method"]["networks"]["segmenter"]
        network.load_state_dict(tensors)
    except KeyError as error:
        raise DataError(f"{weights.path} is no checkpoint of a training: it has no entry {error}") from error
    except RuntimeError as error:
        raise DataError(
            f"{weights.path} does not fit the network of this run: {_misfit(network, tensors)}; give a checkpoint of "
            "this run"
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
    return Predictor(
        network, model.classes, device=device, batch_slices=batch_slices, model=model, weights=weights, tta=tta
    )


def _misfit(network: Segmenter, stored: Mapping[str, Tensor]) -> str:
    """How stored tensors differ from those of a network, with counts and an example."""
    wanted = network.state_dict()
    other = [
        f"{name}, {tuple(stored[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in stored and tensor.shape != stored[name].shape
    ]
    missing, unknown = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    differences = (("of another shape", other), ("missing", missing), ("unknown", unknown))
    said = [f"{len(names)} {what} (such as {names[0]})" for what, names in differences if names]
    return f"of {len(wanted)} tensors {', '.join(said)}"


def _build(description: Mapping[str, Any], origin: str) -> Segmenter:
    try:
        return build(description)
    except (TypeError, ValueError) as error:
        raise DataError(f"{origin} describes no network that this version knows: {error}") from error


def num_inference_workers(volumes: int, device: torch.device) -> int:
    """Number of workers for a number of volumes; 0 for this process alone, which also uses all cores of a CPU."""
    workers = min(os.cpu_count() or 1, volumes // _VOLUMES_PER_WORKER)
    return workers if workers > 1 and device.type == "cpu" else 0


def choose_device(device: torch.device | str | None = None) -> torch.device:
    """The given device; by default a GPU if there is one.

    Raises:
        ConfigError: this machine has no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"there is no device {device!r}; write cpu, cuda or cuda:N") from error
    if chosen.type == "cuda" and (not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(
            f"the device {chosen} was asked for, but this machine has {torch.cuda.device_count()} usable GPUs"
        )
    return chosen
