"""AdvEnt and MinEnt: entropy minimisation on the target, adversarial or direct, Vu et al. 2019 (CVPR)."""

from __future__ import annotations

from torch import Tensor

from mpscl_ray.config import AdvEntConfig
from mpscl_ray.methods import base
from mpscl_ray.methods.adversarial import AlignmentMethod
from mpscl_ray.methods.base import Batch
from mpscl_ray.methods.losses import self_information


class AdvEnt(AlignmentMethod[AdvEntConfig]):
    """Align the entropy maps of the target with those of the source.

    Source: Vu et al. 2019, L_adv on I(p) = -p log p (their Eqs. 5 to 7) and L_ent (their Eq. 3); as the warm-up of
    Liu et al. 2022 it is Eq. (11) with beta = gamma = 0.
    Differs from the released code: segmentation loss, adversarial weights and the constant in the logarithm (1e-7
    instead of 1e-30) are those of MPSCL's fork of it. AdvEnt and MinEnt are not averaged into one prediction.
    Differs in the schedule: the rate decays to 0 at the end of the phase; the released decay is of 250000 iterations,
    of which 120000 are run.
    """

    @property
    def discriminated_heads(self) -> tuple[str, ...]:
        return super().discriminated_heads if self.config.variant == "adversarial" else ()

    def discriminated_map(self, logits: Tensor) -> Tensor:
        return self_information(logits, normalised=self.config.normalised_self_information)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        self.optimisers.begin()
        source, target = self.forward_logits(*batch.images)

        # Segmenter, with frozen discriminators.
        segmentation = self.segmentation_loss(source, batch.source_label)
        losses = dict(segmentation.parts)
        information = self.maps(target)
        if self.config.variant == "minent":
            kind, on_target = "entropy", {head: x.sum(dim=1).mean() for head, x in information.items()}
        else:
            kind, on_target = "adversarial", self.adversarial_losses(information)
        total = self.add_weighted(segmentation.total, losses, kind, on_target)
        total.backward()  # type: ignore[no-untyped-call]

        # Discriminators, on detached maps.
        accuracies = self.discriminator_backward(source, information, losses)

        flag = self.optimisers.step(losses)
        return base.metrics(losses, {"loss_segmentation": segmentation.total}, accuracies, non_finite=flag)
