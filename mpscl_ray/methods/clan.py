"""CLAN: category-level adversaries, Luo et al. 2019 (CVPR)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mpscl_ray.config import CLANConfig
from mpscl_ray.distributed import collectives
from mpscl_ray.methods import base
from mpscl_ray.methods.adversarial import AdversarialMethod
from mpscl_ray.methods.base import Batch
from mpscl_ray.methods.losses import SOURCE_LABEL, TARGET_LABEL, at_least_float32, class_counts, domain_loss
from mpscl_ray.networks.deeplab import DeepLabV2, upsample_logits


class CLAN(AdversarialMethod[CLANConfig]):
    """Align the target more where two heads on the same features disagree.

    Source: Luo et al. 2019, L_seg + lambda_weight L_weight + lambda_adv L_adv with self-adaptive weights (their Eqs. 3
    to 6).
    Differs from the released code: the weight map and the focal loss are correct for batches of more than one image;
    the segmentation loss is that of MPSCL unless segmentation_loss is set; damping and warmup_fraction follow the
    length of the phase instead of a constant; the similarity of the heads counts once for all workers; the main head
    comes from the source-only phase and the second starts untrained, because that phase has another one, where both
    released heads start untrained; images are neither scaled nor mirrored unless data.augmentation says so.
    """

    segmenter_arguments: ClassVar[dict[str, Any]] = {"twin_heads": True}
    discriminated_heads = ("main",)

    def step(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        c = self.config
        labels = batch.source_label
        size = labels.shape[-2:]
        warm_up = int(c.warmup_fraction * self.optimisers.iterations)
        damping = 1.0 - iteration / self.optimisers.iterations
        self.optimisers.start_iteration(iteration, iteration / warm_up if iteration < warm_up else None)

        source_logits, target_logits = self.forward_logits(*batch.images)

        # Segmenter, with a frozen discriminator.
        losses = self._segmentation(source_logits, labels)
        segmentation = torch.stack(list(losses.values())).sum()
        weights = disagreement(target_logits["aux"], target_logits["main"])
        source_map = (source_logits["aux"] + source_logits["main"]).softmax(dim=1)
        target_map = (target_logits["aux"] + target_logits["main"]).softmax(dim=1)
        warming_up = iteration <= warm_up and warm_up > 0
        verdict = upsample_logits(at_least_float32(self.discriminate_frozen("main", target_map)), size)
        adaptive = weights.detach() if c.detach_weight_map else weights
        losses["loss_adversarial_main"] = self._adversarial(verdict, SOURCE_LABEL, None if warming_up else adaptive)
        losses["loss_weight_similarity"] = head_weight_similarity(self.segmenter)
        total = segmentation + c.lambda_adversarial * damping * losses["loss_adversarial_main"]
        total = total + 2 * c.lambda_weight * damping * losses["loss_weight_similarity"]
        total.backward()  # type: ignore[no-untyped-call]

        # Discriminator, on detached maps, both domains at image size.
        outputs = self.discriminate("main", source_map, target_map)
        on_source, on_target = (upsample_logits(at_least_float32(x), size) for x in outputs)
        loss = domain_loss(on_source, SOURCE_LABEL)
        loss = loss + self._adversarial(on_target, TARGET_LABEL, None if warming_up else weights.detach())
        losses["loss_discriminator_main"] = loss
        loss.backward()  # type: ignore[no-untyped-call]

        flag = self.optimisers.step(losses)
        metrics = {"loss_segmentation": segmentation, "disagreement": weights.mean()}
        metrics["discriminator_accuracy_main"] = self.accuracy(on_source, on_target)
        return base.metrics(losses, metrics, non_finite=flag)

    def _segmentation(self, logits: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Segmentation losses on both heads, with equal weight."""
        counts = collectives.all_reduce_sum(class_counts(labels, self.num_classes))
        if self.config.segmentation_loss not in ("focal", "ce"):
            return self.segmentation_loss(logits, labels, counts).parts
        gamma = 2.0 if self.config.segmentation_loss == "focal" else 0.0
        name = "focal" if gamma else "cross_entropy"
        return {
            f"loss_{name}_{head}": base.mean_focal_loss(logits[head], labels, gamma, counts) for head in ("main", "aux")
        }

    def _adversarial(self, verdict: Tensor, domain: int, weights: Tensor | None) -> Tensor:
        """Cross-entropy of a verdict at image size, self-adaptive where weights (B, 1, H, W) are given."""
        if weights is None:
            return domain_loss(verdict, domain)
        pixels = F.softplus(-verdict if domain == TARGET_LABEL else verdict)
        return ((self.config.epsilon + self.config.lambda_local * weights) * pixels).mean()


def disagreement(one: Tensor, other: Tensor) -> Tensor:
    """Map (B, 1, H, W) of the disagreement of two heads, from their logits (B, C, H, W); 0 where they agree.

    It is 1 - cos(softmax one, softmax other) of each pixel, over the classes.

    Source: M(p1, p2) in Luo et al. 2019, Eq. 4; the cosine as released.
    """
    cosine = F.cosine_similarity(at_least_float32(one).softmax(dim=1), at_least_float32(other).softmax(dim=1), dim=1)
    return 1.0 - cosine[:, None]


def head_weight_similarity(segmenter: DeepLabV2) -> Tensor:
    """L_weight = cos(W1, W2) + 1 of all weights and biases of the two heads, 0-dim.

    It is the same on all workers, so that their mean counts it once.

    Source: Luo et al. 2019, Eq. 3.
    """
    assert segmenter.layer5 is not None
    one, other = (
        torch.cat([parameter.reshape(-1) for parameter in head.parameters()])
        for head in (segmenter.layer5, segmenter.layer6)
    )
    return F.cosine_similarity(one, other, dim=0) + 1.0
