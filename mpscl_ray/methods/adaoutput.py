"""AdaOutput, called AdaptSegNet by its authors: alignment of the output space, Tsai et al. 2018 (CVPR)."""

from __future__ import annotations

from torch import Tensor

from mpscl_ray.config import AdaOutputConfig
from mpscl_ray.distributed import collectives
from mpscl_ray.methods import base
from mpscl_ray.methods.adversarial import Adversary, add_weighted_heads
from mpscl_ray.methods.base import Batch
from mpscl_ray.methods.losses import class_counts
from mpscl_ray.methods.segmenter_method import SegmenterMethod


class AdaOutput(SegmenterMethod[AdaOutputConfig]):
    """Align the class probabilities of the target with those of the source, on both heads.

    Source: Tsai et al. 2018, L_seg + lambda_adv L_adv on softmax outputs of two levels (their Eq. 5).
    Differs from the released code: weighted cross-entropy and Dice instead of plain cross-entropy.
    Differs from the paper: the discriminators' outputs are not brought to image size, as released.
    """

    def build_adversary(self) -> Adversary:
        return self.adversary_on(base.heads(self.segmenter), self.config.adversarial_loss == "least_squares")

    def step(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        assert batch.target_image is not None, "AdaOutput needs slices of the target domain"
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
        target_maps = {head: logits.softmax(dim=1) for head, logits in target_logits.items()}
        adversarial = self.adversary.adversarial_loss(target_maps)
        total = add_weighted_heads(segmentation.total, losses, "adversarial", adversarial, c)
        total.backward()  # type: ignore[no-untyped-call]

        # Discriminators, on detached maps.
        source_maps = {head: logits.detach().softmax(dim=1) for head, logits in source_logits.items()}
        learnt, accuracies = self.adversary.discriminator_backward(source_maps, target_maps, c.halve_discriminator_loss)
        losses |= learnt

        flag = self.optimisers.step(losses)
        return base.metrics(losses, {"loss_segmentation": segmentation.total}, accuracies, non_finite=flag)
