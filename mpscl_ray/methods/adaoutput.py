"""AdaOutput, called AdaptSegNet by its authors: alignment of the output space, Tsai et al. 2018 (CVPR)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mpscl_ray.config import AdaOutputConfig
from mpscl_ray.methods import base
from mpscl_ray.methods.adversarial import AlignmentMethod
from mpscl_ray.methods.base import Batch
from mpscl_ray.methods.losses import SOURCE_LABEL, TARGET_LABEL, least_squares_domain_loss


class AdaOutput(AlignmentMethod[AdaOutputConfig]):
    """Align the class probabilities of the target with those of the source, on both heads.

    Source: Tsai et al. 2018, L_seg + lambda_adv L_adv on softmax outputs of two levels (their Eq. 5).
    Differs from the released code: weighted cross-entropy and Dice instead of plain cross-entropy; adversarial weights
    are those of MPSCL's fork of ADVENT; both heads sum all four dilated convolutions, where the loop of the released
    heads returns after the second.
    Differs in the schedule: the rate decays to 0 at the end of the phase; the released decay is of 250000 iterations,
    of which 150000 are run.
    Differs from the paper: the discriminators' outputs are not brought to image size, as released.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if self.config.adversarial_loss == "least_squares":
            self.domain_loss, self.border = least_squares_domain_loss, (SOURCE_LABEL + TARGET_LABEL) / 2

    def discriminated_map(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=1)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        self.optimisers.begin()
        source, target = self.forward_logits(*batch.images)

        # Segmenter, with frozen discriminators.
        segmentation = self.segmentation_loss(source, batch.source_label)
        losses = dict(segmentation.parts)
        maps = self.maps(target)
        total = self.add_weighted(segmentation.total, losses, "adversarial", self.adversarial_losses(maps))
        total.backward()  # type: ignore[no-untyped-call]

        # Discriminators, on detached maps.
        accuracies = self.discriminator_backward(source, maps, losses)

        flag = self.optimisers.step(losses)
        return base.metrics(losses, {"loss_segmentation": segmentation.total}, accuracies, non_finite=flag)
