"""Plain segmentation of labelled slices: the source-only and the supervised bound, and a start for adaptation."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mpscl_ray import distributed
from mpscl_ray.losses import class_counts
from mpscl_ray.methods import base
from mpscl_ray.methods.base import Batch, SegmentationConfig, TargetSplit, TrainingSlices
from mpscl_ray.networks.deeplab import DeepLabV2
from mpscl_ray.optimisation import OptimConfig, Optimisers, PrecisionConfig, SegmenterSGD, autocast, prepare_network


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

    phases: ClassVar[tuple[str, ...]] = (base.SOURCE_ONLY,)
    split: TargetSplit | None = None

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
        self._optimisers = Optimisers(self.networks, device)

    def start_phase(self, iterations: int) -> None:
        self._optimisers.start({"segmenter": SegmenterSGD(self.segmenter, self.optim)}, iterations)

    def step(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        labels = batch.source_label
        self._optimisers.begin(iteration)

        with autocast(self.device, self.precision):
            (output,) = self._wrapped(base.to_network(batch.source_image, self.segmenter, self.precision))
        counts = distributed.all_reduce_sum(class_counts(labels, self.num_classes))
        logits = base.upsampled(output, labels.shape[-2:])
        loss = base.segmentation_loss(logits, labels, counts, self.config.segmentation_aux_weight)
        loss.total.backward()  # type: ignore[no-untyped-call]

        flag = self._optimisers.finish(loss.parts)
        return base.metrics({"loss_segmentation": loss.total}, loss.parts, non_finite=flag)

    def non_finite_losses(self) -> dict[str, Tensor]:
        return self._optimisers.guard.losses()

    def predict(self, images: Tensor) -> Tensor:
        return base.predict(self.segmenter, images.to(self.device), self.precision)

    def prepare(self, slices: TrainingSlices) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        return base.state_dict(self.networks, self._optimisers)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        base.load_state_dict(self, self._optimisers, state)
