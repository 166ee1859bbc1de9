"""CAG-UDA: category anchor-guided adaptation, Zhang et al. 2019 (NeurIPS)."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpscl_ray.config import CAGConfig
from mpscl_ray.distributed import collectives
from mpscl_ray.methods import base
from mpscl_ray.methods.adabn import estimate_statistics
from mpscl_ray.methods.base import Batch, TrainingSlices
from mpscl_ray.methods.losses import at_least_float32, class_counts, exact_matmul
from mpscl_ray.methods.optim import autocast, prepare_network
from mpscl_ray.methods.prototypes import downsample_labels
from mpscl_ray.methods.segmenter_method import SegmenterMethod
from mpscl_ray.networks.deeplab import DeepLabV2, SegmenterOutput

IGNORE = -1
"""Pseudo-label of a pixel that does not count."""


class CAG(SegmenterMethod[CAGConfig]):
    """One round: follow the teacher's pseudo-labels, and draw class features of both domains to the source's anchors.

    Source: Zhang et al. 2019, anchors (their Eq. 2), active target samples (Eqs. 3 and 4) and losses (Eqs. 5 to 9).
    The cap on distances, the scale of their gradient and the fewest pixels of a feature are those of the released code.
    Differs from the released code: the network is the DeepLab that all methods here share, with the output of its
    fourth stage as features; the warm-up, which was not released, is AdvEnt; anchors are plain means over all images,
    where the released running mean forgets after 3000 of them; a class without an anchor takes no part, where the
    released one has an anchor of zeros; no class feature in a batch is a distance of 0 instead of NaN; with
    bn_running_stats=target, which the released code does not have, anchors are computed with statistics of the source,
    averaged over batches; the distance threshold is a quantile unless it is set; the loss on the source is that of
    MPSCL, on both heads, unless segmentation_loss=ce; a round's teacher is the last network of the round before, not
    the best on labels of the target.
    Differs in the schedule: the rounds share the iterations and have the optimiser of MPSCL; released are 90000 of each
    round with learning rate 1e-4 for all parts and weight decay 2e-4, where the decay is one iteration ahead.
    """

    def __init__(self, segmenter: DeepLabV2, *arguments: Any, **named: Any) -> None:
        self.teacher = copy.deepcopy(segmenter)  # before the segmenter is wrapped
        super().__init__(segmenter, *arguments, **named)
        device, dtype = self.device, self.dtype
        prepare_network(collectives.broadcast_parameters(self.teacher.to(device)), device, self.precision)
        self.teacher.requires_grad_(False).eval()
        self.anchors = torch.zeros(self.num_classes, segmenter.feature_channels, dtype=dtype, device=device)
        self.anchor_counts = torch.zeros(self.num_classes, dtype=torch.float64, device=device)
        self.threshold = torch.full((), self.config.distance_threshold, dtype=dtype, device=device)

    @torch.no_grad()
    def prepare(self, slices: TrainingSlices) -> None:
        """Begin a round: the student becomes the teacher, and its features on the source give the anchors."""
        self.teacher.load_state_dict(self.segmenter.state_dict())
        if self.config.bn_running_stats == "target":
            self._use_source_statistics(slices)
        sums = torch.zeros(self.anchors.shape, dtype=torch.float64, device=self.device)
        counts = torch.zeros_like(self.anchor_counts)
        for image, label in slices.labelled():
            output = base.evaluate(self.teacher, image.to(self.device), self.precision)
            labels_small = downsample_labels(label.to(self.device), output.main.shape[2:])
            vectors, pixels = class_features(output.features.double(), output.main, labels_small)
            valid = pixels >= self.config.min_pixels
            sums += (vectors * valid[..., None]).sum(dim=0)
            counts += valid.sum(dim=0)
        sums, counts = collectives.all_reduce_sums(sums, counts)
        self.anchors = (sums / counts.clamp(min=1)[:, None]).to(self.anchors.dtype)
        self.anchor_counts = counts
        self.teacher.load_state_dict(self.segmenter.state_dict())
        if self.config.distance_quantile is not None:
            self._set_threshold(slices, self.config.distance_quantile)

    def _use_source_statistics(self, slices: TrainingSlices) -> None:
        """Set the teacher's running statistics to those of the source.

        Those of the target alone would shift the features of the source, and the anchors with them.
        """
        batches = (image.to(self.device) for image in slices.synchronised_source_batches())
        estimate_statistics(self.teacher, batches, self.precision)

    def _set_threshold(self, slices: TrainingSlices, quantile: float) -> None:
        """Set it to a quantile, over all pixels of the target, of the gap between the two nearest anchors."""
        number = sum(len(volume) for volume in slices.target_volumes)
        shape = self.segmenter.feature_size(slices.size)
        gaps = torch.zeros(number, *shape, dtype=torch.float64, device=self.device)
        for rows, image in slices.unlabelled():
            output = base.evaluate(self.teacher, image.to(self.device), self.precision)
            gaps[rows.to(self.device)] = self._nearest(output.features)[1].double()
        values = collectives.all_reduce_sum(gaps).flatten().sort().values
        self.threshold = values[round(quantile * (len(values) - 1))].to(self.threshold)

    def _nearest(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Class of the nearest anchor, and the gap to the second nearest; both (B, h, w)."""
        known = self.anchor_counts > 0
        gaps_to = distances(at_least_float32(features), self.anchors)
        gaps_to = torch.where(known[:, None, None], gaps_to, torch.full_like(gaps_to, FAR))
        two = gaps_to.topk(2, dim=1, largest=False)
        return two.indices[:, 0], two.values[:, 1] - two.values[:, 0]

    @torch.no_grad()
    def pseudo_labels(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Pseudo-labels A and P of the teacher for slices (B, 1, H, W): (B, h, w), IGNORE where a pixel is left out.

        With fewer than two anchors there is no A, because its confidence is the gap between two.
        """
        with autocast(self.device, self.precision):
            output: SegmenterOutput = self.teacher(base.to_network(image, self.teacher, self.precision))
        nearest, gap = self._nearest(output.features)
        enough = (self.anchor_counts > 0).sum() >= 2
        by_anchor = torch.where((gap >= self.threshold) & enough, nearest, IGNORE)
        largest, likely = at_least_float32(output.main).softmax(dim=1).max(dim=1)
        return by_anchor, torch.where(largest > self.config.probability_threshold, likely, IGNORE)

    def step(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        c = self.config
        labels = batch.source_label
        self.optimisers.start_iteration(iteration)
        source, target = self.forward(*batch.images)
        (source_logits,) = base.upsampled(labels.shape[-2:], source)
        by_anchor, by_probability = self.pseudo_labels(batch.images[1])

        # Sums of this worker; all denominators are of the global batch.
        labels_small = downsample_labels(labels, source.main.shape[2:])
        target_logits = at_least_float32(target.main)
        sums = {
            "loss_pseudo_anchor": masked_cross_entropy(target_logits, by_anchor),
            "loss_pseudo_probability": masked_cross_entropy(target_logits, by_probability),
            "loss_distance_source": self._distance(source, labels_small),
            "loss_distance_target": self._distance(target, by_anchor),
        }
        counts, *numbers = collectives.all_reduce_sums(
            class_counts(labels, self.num_classes), *(number for _, number in sums.values())
        )
        losses = {
            name: collectives.ddp_ratio(total, number.clamp(min=1))
            for (name, (total, _)), number in zip(sums.items(), numbers, strict=True)
        }

        segmentation = self._segmentation(source_logits, labels, counts)
        total = segmentation.total
        total = total + 0.5 * (losses["loss_pseudo_anchor"] + losses["loss_pseudo_probability"])
        total = total + c.lambda_distance * (losses["loss_distance_source"] + losses["loss_distance_target"])
        total.backward()  # type: ignore[no-untyped-call]

        losses = {**segmentation.parts, **losses}
        flag = self.optimisers.step(losses)
        metrics = {
            "loss_segmentation": segmentation.total,
            "pseudo_label_fraction_anchor": (by_anchor != IGNORE).to(total.dtype).mean(),
            "pseudo_label_fraction_probability": (by_probability != IGNORE).to(total.dtype).mean(),
            "distance_threshold": self.threshold,
        }
        return base.metrics(losses, metrics, non_finite=flag)

    def _segmentation(self, logits: dict[str, Tensor], labels: Tensor, counts: Tensor) -> base.SegmentationLoss:
        if self.config.segmentation_loss != "ce":
            return self.segmentation_loss(logits, labels, counts)
        parts = {
            f"loss_cross_entropy_{head}": base.mean_focal_loss(x, labels, 0.0, counts) for head, x in logits.items()
        }
        main, *aux = parts.values()
        return base.SegmentationLoss(sum((self.config.segmentation_aux_weight * x for x in aux), main), parts)

    def _distance(self, output: SegmenterOutput, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Ten times the distance of class features to their anchors, summed over images and classes, and their number.

        A distance is the mean smooth L1 over channels, divided by ten until it is at most 5. The gradient of a feature
        is scaled by twice the fraction of the image that its class covers. Both are as released.
        """
        vectors, pixels = class_features(at_least_float32(output.features), output.main, labels)
        valid = (pixels >= self.config.min_pixels) & (self.anchor_counts > 0)
        scale = 2.0 * pixels / (labels.shape[1] * labels.shape[2])
        vectors = vectors.detach() + (vectors - vectors.detach()) * scale[..., None].to(vectors.dtype)
        anchors = self.anchors.expand_as(vectors).to(vectors.dtype)
        smooth = F.smooth_l1_loss(vectors, anchors, reduction="none").mean(dim=2)
        capped = smooth * power_of_ten_scale(smooth.detach())
        return 10.0 * (capped * valid).sum(), valid.sum().to(capped.dtype)

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "teacher": self.teacher.state_dict(),
            "anchors": {
                "features": self.anchors,
                "counts": self.anchor_counts,
                "threshold": self.threshold,
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.teacher.load_state_dict(state["teacher"])
        anchors = state["anchors"]
        self.anchors = anchors["features"].to(self.anchors, copy=True)
        self.anchor_counts = anchors["counts"].to(self.anchor_counts, copy=True)
        self.threshold = anchors["threshold"].to(self.threshold, copy=True)


FAR = 1e6
"""Distance to the anchor of a class that has none."""


def class_features(features: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean feature (B, C, d) of each class in each image, over pixels where the label is also the most likely class.

    From features (B, d, h, w), logits (B, C, h, w) and labels (B, h, w), of which IGNORE counts nowhere. A mean over no
    pixels is zero. Returns also the numbers of pixels (B, C), float64 without gradient.
    """
    with torch.autocast(features.device.type, enabled=False):
        classes = torch.arange(logits.shape[1], device=labels.device)
        agreed = torch.where(labels == logits.argmax(dim=1), labels, IGNORE)
        members = agreed.flatten(1)[:, :, None] == classes
        pixels = members.sum(dim=1).double()
        sums = exact_matmul(features.flatten(2), members.to(features.dtype)).transpose(1, 2)
        return sums / pixels.clamp(min=1)[..., None].to(features.dtype), pixels


def distances(features: Tensor, anchors: Tensor) -> Tensor:
    """Euclidean distance (B, C, h, w) of every pixel's feature (B, d, h, w) to every anchor (C, d)."""
    with torch.autocast(features.device.type, enabled=False):
        flat = features.flatten(2).transpose(1, 2)
        # By differences: the faster way by products loses the small distances.
        mode = "donot_use_mm_for_euclid_dist"
        found = torch.cdist(flat, anchors.to(flat.dtype).expand(len(flat), *anchors.shape), compute_mode=mode)
        return found.transpose(1, 2).reshape(len(flat), len(anchors), *features.shape[2:])


def masked_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropy over pixels whose label (B, h, w) is not IGNORE, and their number."""
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return total, (labels != IGNORE).sum().to(total.dtype)


def power_of_ten_scale(value: Tensor) -> Tensor:
    """Power of ten that scales each value to at most 5; the released code divides by ten until it is."""
    steps = torch.log10(value.clamp(min=1.0) / 5.0).ceil().clamp(min=0.0)
    return torch.pow(10.0, -steps).to(value.dtype)
