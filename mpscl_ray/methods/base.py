"""What all methods share: the batch, the interface, and the supervised part of their losses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mpscl_ray import distributed
from mpscl_ray.errors import DataError
from mpscl_ray.losses import full_precision, soft_dice_loss, weighted_cross_entropy
from mpscl_ray.networks.deeplab import DeepLabV2, SegmenterOutput, network_input, upsample_logits
from mpscl_ray.optimisation import PrecisionConfig, autocast


@dataclass(frozen=True)
class Batch:
    """A worker's part of one global batch. There is no field for a label of the target domain, on purpose."""

    source_image: Tensor
    """(B, 1, H, W) in [-1, 1]."""
    source_label: Tensor
    """(B, H, W) int64."""
    target_image: Tensor | None = None
    """(B, 1, H, W) in [-1, 1]; None for plain segmentation."""

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; from pinned memory the copy does not wait."""
        target = None if self.target_image is None else self.target_image.to(device, non_blocking=True)
        return Batch(
            self.source_image.to(device, non_blocking=True), self.source_label.to(device, non_blocking=True), target
        )


class Method(Protocol):
    """A published method: owns its networks, optimisers and state, and makes one training step at a time."""

    networks: dict[str, nn.Module]
    """The networks, unwrapped: "segmenter" and what else the method has."""

    def start_phase(self, iterations: int, adapt: bool = True) -> None:
        """Begin a phase with fresh optimisers and the decay over ``iterations``.

        Args:
            iterations: length of the phase.
            adapt: False for a warm-up without the parts that need good features (nothing, in plain segmentation).
        """

    def step(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """One training iteration, optimiser steps included, without waiting for the device.

        Args:
            batch: on the method's device, the same size on every worker.
            iteration: of the phase, from 0.

        Returns:
            Detached 0-dim tensors whose mean over the workers is the global value: read them with
            ``distributed.reduce_metrics``. ``non_finite`` is 1 from the first step on that was not finite on some
            worker: from then on nothing moves, and ``non_finite_losses`` tells which loss it was.
        """

    def non_finite_losses(self) -> dict[str, Tensor]:
        """This worker's component losses at the first non-finite step, by name; only if there was one."""

    def predict(self, images: Tensor) -> Tensor:
        """Class probabilities (B, C, H, W) of slices (B, 1, H, W), in evaluation mode, without gradient."""

    def initialise_prototypes(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Look once at all labelled slices before the adaptation (nothing, where a method has no prototypes).

        Args:
            batches: this worker's share of (image, label); shares may differ in length.
        """

    def state_dict(self) -> dict[str, Any]:
        """Everything that training goes on from: nested, of live tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, the phase included."""


@dataclass(frozen=True)
class SegmentationLoss:
    """Weighted cross-entropy and Dice on both heads, each this worker's share."""

    total: Tensor
    """0-dim, with gradient: main terms plus the weighted auxiliary ones."""
    parts: dict[str, Tensor]
    """The unweighted terms by name."""


def segmentation_loss(logits: dict[str, Tensor], labels: Tensor, counts: Tensor, aux_weight: float) -> SegmentationLoss:
    """L_seg = CE_main + Dice_main + w_aux (CE_aux + Dice_aux).

    Args:
        logits: "main" and perhaps "aux": (B, C, H, W) at image resolution.
        labels: (B, H, W) int64.
        counts: (C,) pixels of each class in the global batch.
        aux_weight: w_aux.

    Source: the segmentation term of Eq. (2), Liu et al. 2022; auxiliary weight as released.
    """
    # Sum over all pixels of the weight of their class, which the global counts tell without another collective.
    weights = 1.0 - counts / counts.sum()
    weight_sum = (counts * weights).sum()
    weight_sum = torch.where(weight_sum > 0, weight_sum, counts.sum())
    parts: dict[str, Tensor] = {}
    total = torch.zeros((), device=labels.device)
    for head, factor in (("main", 1.0), ("aux", aux_weight)):
        if head in logits:
            numerator = weighted_cross_entropy(logits[head], labels, counts).numerator
            entropy = distributed.share_of_ratio(numerator, weight_sum.to(numerator.dtype))
            dice = soft_dice_loss(logits[head], labels)
            parts[f"loss_cross_entropy_{head}"], parts[f"loss_dice_{head}"] = entropy, dice
            total = total + factor * (entropy + dice)
    return SegmentationLoss(total, parts)


def upsampled(output: SegmenterOutput, size: torch.Size) -> dict[str, Tensor]:
    """Logits at image resolution by head, "main" first; "aux" only if the segmenter has that head."""
    heads = {"main": output.main, "aux": output.aux}
    return {head: upsample_logits(full_precision(x), size) for head, x in heads.items() if x is not None}


def to_network(image: Tensor, segmenter: DeepLabV2, precision: PrecisionConfig) -> Tensor:
    """Slices as the segmenter takes them."""
    x = network_input(image, segmenter.in_channels)
    return x.contiguous(memory_format=torch.channels_last) if precision.channels_last else x


@torch.no_grad()
def evaluate(segmenter: DeepLabV2, image: Tensor, precision: PrecisionConfig) -> SegmenterOutput:
    """Run the segmenter in evaluation mode, and leave it in the mode it was in."""
    was_training = segmenter.training
    segmenter.eval()
    with autocast(image.device, precision):
        output: SegmenterOutput = segmenter(to_network(image, segmenter, precision))
    segmenter.train(was_training)
    return output


def predict(segmenter: DeepLabV2, image: Tensor, precision: PrecisionConfig) -> Tensor:
    """Class probabilities (B, C, H, W) of slices (B, 1, H, W)."""
    logits = upsample_logits(full_precision(evaluate(segmenter, image, precision).main), image.shape[-2:])
    return logits.softmax(dim=1)


def load_networks(networks: dict[str, nn.Module], state: dict[str, dict[str, Tensor]]) -> None:
    """Load each network's weights.

    Raises:
        DataError: a network is missing, or a tensor has another name or shape.
    """
    for name, network in networks.items():
        saved = state.get(name)
        if saved is None:
            raise DataError(
                f"the checkpoint has no network '{name}', only {sorted(state)}; was it made by another method?"
            )
        own = network.state_dict()
        for key in sorted(own.keys() | saved.keys()):
            found = tuple(saved[key].shape) if key in saved else "no such tensor"
            expected = tuple(own[key].shape) if key in own else "no such tensor"
            if found != expected:
                raise DataError(
                    f"the checkpoint does not fit the {name}: {key} is {found}, expected {expected}; "
                    "use the network settings that it was trained with"
                )
        network.load_state_dict(saved)
