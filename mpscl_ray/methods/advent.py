"""AdvEnt and MinEnt: entropy minimisation on the target, adversarial or direct, Vu et al. 2019 (CVPR)."""

from __future__ import annotations

import torch
from torch import Tensor

from mpscl_ray.config import AdvEntConfig
from mpscl_ray.distributed import collectives
from mpscl_ray.methods import base
from mpscl_ray.methods.adversarial import Adversary, add_weighted_heads
from mpscl_ray.methods.base import Batch
from mpscl_ray.methods.losses import class_counts, self_information
from mpscl_ray.methods.segmenter_method import SegmenterMethod


class AdvEnt(SegmenterMethod[AdvEntConfig]):
    """Align the entropy maps of the target with those of the source.

    Source: Vu et al. 2019, L_adv on I(p) = -p log p (their Eqs. 5 to 7) and L_ent (their Eq. 3); as the warm-up of
    Liu et al. 2022 it is Eq. (11) with beta = gamma = 0.
    Differs from the released code: segmentation loss, adversarial weights and the constant in the logarithm (1e-7
    instead of 1e-30) are those of MPSCL's fork of it. AdvEnt and MinEnt are not averaged into one prediction.
    """

    def build_adversary(self) -> Adversary:
        return self.adversary_on(base.heads(self.segmenter) if self.config.variant == "adversarial" else ())

    def step(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        assert batch.target_image is not None, "AdvEnt needs slices of the target domain"
        c = self.config
        labels = batch.source_label
        self.optimisers.start_iteration(iteration)

        source, target = self.forward(batch.source_image, batch.target_image)
        source_logits = base.upsampled(source, labels.shape[-2:])
        target_logits = base.upsampled(target, labels.shape[-2:])
        counts = collectives.all_reduce_sum(class_counts(labels, self.num_classes))

        # Segmenter, with frozen discriminators.
        segmentation = base.segmentation_loss(source_logits, labels, counts, c.segmentation_aux_weight)
        losses = dict(segmentation.parts)
        information = {head: self._self_information(logits) for head, logits in target_logits.items()}
        if c.variant == "minent":
            kind, on_target = "entropy", {head: x.sum(dim=1).mean() for head, x in information.items()}
        else:
            kind, on_target = "adversarial", self.adversary.adversarial_loss(information)
        total = add_weighted_heads(segmentation.total, losses, kind, on_target, c)
        total.backward()  # type: ignore[no-untyped-call]

        # Discriminators, on detached maps.
        with torch.no_grad():
            source_information = {head: self._self_information(logits) for head, logits in source_logits.items()}
        learnt, accuracies = self.adversary.discriminator_backward(
            source_information, information, c.halve_discriminator_loss
        )
        losses |= learnt

        flag = self.optimisers.step(losses)
        return base.metrics(losses, {"loss_segmentation": segmentation.total}, accuracies, non_finite=flag)

    def _self_information(self, logits: Tensor) -> Tensor:
        return self_information(logits, normalised=self.config.normalised_self_information)
