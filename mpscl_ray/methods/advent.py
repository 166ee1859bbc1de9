"""AdvEnt and MinEnt: entropy minimisation on the target, adversarial or direct, Vu et al. 2019 (CVPR)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from mpscl_ray.config import AdvEntConfig, OptimConfig, PrecisionConfig
from mpscl_ray.distributed import collectives
from mpscl_ray.methods import base
from mpscl_ray.methods.adversarial import Adversary
from mpscl_ray.methods.base import Batch, TargetSplit, TrainingSlices
from mpscl_ray.methods.losses import class_counts, self_information
from mpscl_ray.methods.trained_segmenter import TrainedSegmenter
from mpscl_ray.networks.deeplab import DeepLabV2


class AdvEnt:
    """Make the entropy maps of the target look like those of the source.

    Args:
        segmenter: with its initial weights; trained in place.
        config: the method's settings.
        optim: optimisers and decay.
        num_classes: C, background included.
        device: where to train.
        precision: how GPUs compute.
        seed: of the discriminators' initial weights.

    Source: Vu et al. 2019, L_adv on I(p) = -p log p (their Eqs. 5 to 7) and L_ent (their Eq. 3); as the warm-up of
    Liu et al. 2022 it is Eq. (11) with beta = gamma = 0.
    Differs from the released code: segmentation loss, adversarial weights and the constant in the logarithm (1e-7
    instead of 1e-30) are those of MPSCL's fork of it. AdvEnt and MinEnt are not averaged into one prediction.
    """

    phases: ClassVar[tuple[str, ...]] = AdvEntConfig.phases
    split: TargetSplit | None = None

    def __init__(
        self,
        segmenter: DeepLabV2,
        config: AdvEntConfig,
        optim: OptimConfig,
        num_classes: int,
        device: torch.device,
        precision: PrecisionConfig,
        seed: int,
    ) -> None:
        self.config, self.num_classes, self.device = config, num_classes, device
        self.segmenter = segmenter
        heads = base.heads(segmenter) if config.variant == "adversarial" else ()
        dtype = next(segmenter.parameters()).dtype
        self._adversary = Adversary(config, heads, num_classes, dtype, seed, device, precision)
        self.trained = TrainedSegmenter(
            segmenter, optim, device, precision, config.norm_statistics, self._adversary.networks
        )
        self.networks = self.trained.networks

    def start_phase(self, iterations: int) -> None:
        self.trained.start_phase(iterations)

    def step(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        assert batch.target_image is not None, "AdvEnt needs slices of the target domain"
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
        information = {head: self._self_information(logits) for head, logits in target_logits.items()}
        if c.variant == "minent":
            on_target = {head: x.sum(dim=1).mean() for head, x in information.items()}
        else:
            on_target = self._adversary.fool(information)
        for head, weight in (("main", c.lambda_main), ("aux", c.lambda_aux)):
            if head in on_target:
                name = "entropy" if c.variant == "minent" else "adversarial"
                losses[f"loss_{name}_{head}"] = on_target[head]
                total = total + weight * on_target[head]
        total.backward()  # type: ignore[no-untyped-call]

        # Discriminators, on detached maps.
        with torch.no_grad():
            source_information = {head: self._self_information(logits) for head, logits in source_logits.items()}
        learnt, accuracies = self._adversary.learn(source_information, information, c.halve_discriminator_loss)
        losses |= learnt

        flag = self.trained.optimisers.finish(losses)
        return base.metrics(losses, {"loss_segmentation": segmentation.total}, accuracies, non_finite=flag)

    def _self_information(self, logits: Tensor) -> Tensor:
        return self_information(logits, normalised=self.config.normalised_self_information)

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
