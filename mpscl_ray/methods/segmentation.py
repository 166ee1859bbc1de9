"""Plain segmentation of labelled slices: the source-only and the supervised bound, and a start for adaptation."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from mpscl_ray.config import OptimConfig, PrecisionConfig, SegmentationConfig
from mpscl_ray.distributed import collectives
from mpscl_ray.methods import base
from mpscl_ray.methods.base import Batch, TargetSplit, TrainingSlices
from mpscl_ray.methods.losses import class_counts
from mpscl_ray.methods.trained_segmenter import TrainedSegmenter
from mpscl_ray.networks.deeplab import DeepLabV2


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

    phases: ClassVar[tuple[str, ...]] = SegmentationConfig.phases
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
        self.config, self.num_classes = config, num_classes
        self.trained = TrainedSegmenter(segmenter, optim, device, precision)
        self.networks = self.trained.networks

    def start_phase(self, iterations: int) -> None:
        self.trained.start_phase(iterations)

    def step(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        labels = batch.source_label
        self.trained.optimisers.begin(iteration)

        (output,) = self.trained.forward(batch.source_image)
        counts = collectives.all_reduce_sum(class_counts(labels, self.num_classes))
        logits = base.upsampled(output, labels.shape[-2:])
        loss = base.segmentation_loss(logits, labels, counts, self.config.segmentation_aux_weight)
        loss.total.backward()  # type: ignore[no-untyped-call]

        flag = self.trained.optimisers.finish(loss.parts)
        return base.metrics({"loss_segmentation": loss.total}, loss.parts, non_finite=flag)

    def non_finite_losses(self) -> dict[str, Tensor]:
        return self.trained.non_finite_losses()

    def predict(self, images: Tensor) -> Tensor:
        return self.trained.predict(images)

    def prepare(self, slices: TrainingSlices) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        return self.trained.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trained.load_state_dict(state)
