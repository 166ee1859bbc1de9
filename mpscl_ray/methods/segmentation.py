"""Plain segmentation of labelled slices: the source-only and the supervised bound, and a start for adaptation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from mpscl_ray import distributed
from mpscl_ray.losses import class_counts
from mpscl_ray.methods import base
from mpscl_ray.methods.base import Batch
from mpscl_ray.networks.deeplab import DeepLabV2
from mpscl_ray.optimisation import (
    NonFiniteGuard,
    OptimConfig,
    PrecisionConfig,
    SegmenterSGD,
    Snapshot,
    autocast,
    prepare_network,
)


@dataclass(frozen=True)
class SegmentationConfig:
    """Settings of plain segmentation."""

    segmentation_aux_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    """Weight of cross-entropy and Dice on the auxiliary head; 0.1 in the released code, unnamed in the paper."""


class Segmentation:
    """Train a segmenter on the labelled stream alone, which the batch calls source whatever its domain.

    Args:
        segmenter: with its initial weights; trained in place.
        config: weights of the losses.
        optim: optimiser and decay.
        num_classes: C, background included.
        device: where to train.
        precision: how GPUs compute.
        seed: unused, because nothing here is drawn.

    Source: rows "W/o adaptation" and "Supervised" of Table III, Liu et al. 2022.
    """

    def __init__(
        self,
        segmenter: DeepLabV2,
        config: SegmentationConfig,
        optim: OptimConfig,
        num_classes: int,
        device: torch.device,
        precision: PrecisionConfig,
        seed: int,
    ) -> None:
        self.config, self.optim, self.num_classes = config, optim, num_classes
        self.device, self.precision = device, precision
        self.segmenter = segmenter
        self.networks: dict[str, nn.Module] = {"segmenter": segmenter}
        prepare_network(segmenter, device, precision)
        self._wrapped = distributed.wrap(distributed.ForEach(segmenter), device)
        self._buffers = list(segmenter.buffers())
        self._guard = NonFiniteGuard(device)
        self._iterations = 0

    def start_phase(self, iterations: int, adapt: bool = False) -> None:
        self._iterations = iterations
        self._optimiser = SegmenterSGD(self.segmenter, self.optim)
        self.segmenter.train()

    def step(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        assert self._iterations > 0, "start_phase comes before the first step"
        labels = batch.source_label
        before = Snapshot(self._buffers)
        self._optimiser.begin(iteration, self._iterations)

        with autocast(self.device, self.precision):
            (output,) = self._wrapped(base.to_network(batch.source_image, self.segmenter, self.precision))
        counts = distributed.all_reduce_sum(class_counts(labels, self.num_classes))
        logits = base.upsampled(output, labels.shape[-2:])
        loss = base.segmentation_loss(logits, labels, counts, self.config.segmentation_aux_weight)
        loss.total.backward()  # type: ignore[no-untyped-call]

        self._guard.update(loss.parts, self._optimiser.gradients())
        before.restore_where(self._guard.flag)
        self._optimiser.step(self._guard.flag)
        metrics = {"loss_segmentation": loss.total, **loss.parts, "non_finite": self._guard.flag}
        return {name: value.detach() for name, value in metrics.items()}

    def non_finite_losses(self) -> dict[str, Tensor]:
        return self._guard.losses()

    def predict(self, images: Tensor) -> Tensor:
        return base.predict(self.segmenter, images.to(self.device), self.precision)

    def initialise_prototypes(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Nothing: plain segmentation has no prototypes."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "optimisers": {"segmenter": self._optimiser.state_dict()} if self._iterations else {},
            "phase": {"iterations": self._iterations},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        base.load_networks(self.networks, state["networks"])
        self._guard = NonFiniteGuard(self.device)
        if state["phase"]["iterations"]:
            self.start_phase(state["phase"]["iterations"])
            self._optimiser.load_state_dict(state["optimisers"]["segmenter"])
