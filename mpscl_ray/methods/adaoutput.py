"""AdaOutput, called AdaptSegNet by its authors: alignment of the output space, Tsai et al. 2018 (CVPR)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from mpscl_ray.config import AdaOutputConfig, OptimConfig, PrecisionConfig
from mpscl_ray.distributed import collectives
from mpscl_ray.methods import base
from mpscl_ray.methods.adversarial import Adversary
from mpscl_ray.methods.base import Batch, TargetSplit, TrainingSlices
from mpscl_ray.methods.losses import class_counts
from mpscl_ray.methods.trained_segmenter import TrainedSegmenter
from mpscl_ray.networks.deeplab import DeepLabV2


class AdaOutput:
    """Make the class probabilities of the target look like those of the source, on both heads.

    Args:
        segmenter: with its initial weights; trained in place.
        config: the method's settings.
        optim: optimisers and decay.
        num_classes: C, background included.
        device: where to train.
        precision: how GPUs compute.
        seed: of the discriminators' initial weights.

    Source: Tsai et al. 2018, L_seg + lambda_adv L_adv on softmax outputs of two levels (their Eq. 5).
    Differs from the released code: weighted cross-entropy and Dice instead of plain cross-entropy.
    Differs from the paper: the discriminators' outputs are not brought to image size, as released.
    """

    phases: ClassVar[tuple[str, ...]] = AdaOutputConfig.phases
    split: TargetSplit | None = None

    def __init__(
        self,
        segmenter: DeepLabV2,
        config: AdaOutputConfig,
        optim: OptimConfig,
        num_classes: int,
        device: torch.device,
        precision: PrecisionConfig,
        seed: int,
    ) -> None:
        self.config, self.num_classes, self.segmenter = config, num_classes, segmenter
        dtype = next(segmenter.parameters()).dtype
        least_squares = config.adversarial_loss == "least_squares"
        self._adversary = Adversary(
            config, base.heads(segmenter), num_classes, dtype, seed, device, precision, least_squares
        )
        self.trained = TrainedSegmenter(
            segmenter, optim, device, precision, config.norm_statistics, self._adversary.networks
        )
        self.networks = self.trained.networks

    def start_phase(self, iterations: int) -> None:
        self.trained.start_phase(iterations)

    def step(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        assert batch.target_image is not None, "AdaOutput needs slices of the target domain"
        c = self.config
        labels = batch.source_label
        self.trained.optimisers.begin(iteration)

        source, target = self.trained.forward(batch.source_image, batch.target_image)
        source_logits = base.upsampled(source, labels.shape[-2:])
        target_logits = base.upsampled(target, labels.shape[-2:])
        counts = collectives.all_reduce_sum(class_counts(labels, self.num_classes))

        # Segmenter, with frozen discriminators.
        segmentation = base.segmentation_loss(source_logits, labels, counts, c.segmentation_aux_weight)
        losses = dict(segmentation.parts)
        total = segmentation.total
        target_maps = {head: logits.softmax(dim=1) for head, logits in target_logits.items()}
        adversarial = self._adversary.fool(target_maps)
        for head, weight in (("main", c.lambda_main), ("aux", c.lambda_aux)):
            if head in adversarial:
                losses[f"loss_adversarial_{head}"] = adversarial[head]
                total = total + weight * adversarial[head]
        total.backward()  # type: ignore[no-untyped-call]

        # Discriminators, on detached maps.
        source_maps = {head: logits.detach().softmax(dim=1) for head, logits in source_logits.items()}
        learnt, accuracies = self._adversary.learn(source_maps, target_maps, c.halve_discriminator_loss)
        losses |= learnt

        flag = self.trained.optimisers.finish(losses)
        return base.metrics(losses, {"loss_segmentation": segmentation.total}, accuracies, non_finite=flag)

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
