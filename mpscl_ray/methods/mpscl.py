"""MPSCL: margin preserving self-paced contrastive learning, Liu et al. 2022 (IEEE JBHI)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpscl_ray.config import MPSCLConfig
from mpscl_ray.distributed import collectives
from mpscl_ray.errors import DataError
from mpscl_ray.methods import base
from mpscl_ray.methods.adversarial import AlignmentMethod
from mpscl_ray.methods.base import Batch, TrainingSlices
from mpscl_ray.methods.contrast import Contrasted, contrastive_losses, source_prototypes
from mpscl_ray.methods.losses import (
    annotated_pixels,
    class_counts,
    cosine_to_prototypes,
    exact_matmul,
    self_information,
)
from mpscl_ray.methods.prototypes import (
    PrototypeClassifier,
    downsample_labels,
    prototype_sums,
    self_paced_pseudo_labels,
    update_prototypes,
)
from mpscl_ray.networks.deeplab import SegmenterOutput


class MPSCL(AlignmentMethod[MPSCLConfig]):
    """Adapt a segmenter from a labelled source to an unlabelled target domain.

    Source: Liu et al. 2022; total loss Eq. (11).
    Differs in the schedule: warm-up and adaptation each decay to 0 over their own iterations; the released warm-up is
    the beginning of a decay of 50000 iterations, and ends at nine tenths of its rate.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        shape = self.num_classes, self.segmenter.feature_channels
        self.prototypes = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._contrast = self.config.beta > 0 or self.config.gamma > 0

    def discriminated_map(self, logits: Tensor) -> Tensor:
        return self_information(logits, normalised=self.config.normalised_self_information)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        c = self.config
        labels = batch.source_label
        self.optimisers.begin()
        source, target = self.forward(*batch.images)
        source_logits, target_logits = base.upsampled(labels.shape[-2:], source, target)

        # Statistics of the global source batch, and with them the prototypes (Eq. 5), before any loss.
        counts = class_counts(labels, self.num_classes)
        prototypes = self.prototypes
        if self._contrast:
            labels_small = downsample_labels(labels, source.features.shape[2:])
            sums, pixels = prototype_sums(source.features, labels_small, self.num_classes)
            counts, sums, pixels = collectives.all_reduce_sums(counts, sums, pixels)
            prototypes = update_prototypes(self.prototypes, sums, pixels, c.alpha)
        else:
            counts = collectives.all_reduce_sum(counts)

        # Segmenter, with frozen discriminators.
        segmentation = self.segmentation_loss(source_logits, labels, counts)
        losses = dict(segmentation.parts)
        metrics: dict[str, Tensor] = {"loss_segmentation": segmentation.total}
        information = self.maps(target_logits)
        total = self.add_weighted(segmentation.total, losses, "adversarial", self.adversarial_losses(information))
        if self._contrast:
            contrastive, selected = self._contrastive_losses(
                source, target, labels_small, prototypes, annotated_pixels(pixels)
            )
            losses |= contrastive
            total = total + c.gamma * losses["loss_contrastive_source"] + c.beta * losses["loss_contrastive_target"]
            metrics["pseudo_label_fraction"] = selected.mean(dtype=total.dtype)
        total.backward()  # type: ignore[no-untyped-call]

        # Discriminators, on detached maps.
        accuracies = self.discriminator_backward(source_logits, information, losses)

        # Nothing is updated unless all of it is finite on all workers.
        flag = self.optimisers.step(losses)
        torch.where(flag > 0, self.prototypes, prototypes, out=self.prototypes)
        return base.metrics(losses, metrics, accuracies, non_finite=flag)

    def _contrastive_losses(
        self,
        source: SegmenterOutput,
        target: SegmenterOutput,
        labels_small: Tensor,
        prototypes: Tensor,
        annotated: Tensor,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Eq. (8) on all annotated source pixels and on the selected target pixels, and the mask (B, h, w) of these.

        ``annotated`` is the number of the former in the global batch.
        """
        features, size = torch.cat([source.features, target.features]), len(source.features)
        source_cosine, target_cosine = torch.split(cosine_to_prototypes(features, prototypes), size)
        labels, mask = self_paced_pseudo_labels(target_cosine, self.config.delta_th)
        on_source, on_target = Contrasted(source_cosine, labels_small), Contrasted(target_cosine, labels)
        return contrastive_losses(self.config, on_source, on_target, mask, annotated), mask

    def diagnostics(self) -> dict[str, Tensor]:
        if not self._contrast:
            return super().diagnostics()
        smallest, mean = prototype_angles(self.prototypes)
        return super().diagnostics() | {"prototype_angle_min": smallest, "prototype_angle_mean": mean}

    @property
    def prototype_classifier(self) -> PrototypeClassifier | None:  # type: ignore[override]
        """Of the current prototypes; None without the contrastive losses, which keep them up to date."""
        if not self._contrast:
            return None
        return PrototypeClassifier(self.features, self.prototypes, self.config.delta_th)

    def prepare(self, slices: TrainingSlices) -> None:
        """Start from the prototypes of the whole source set, or those of a file where one is configured.

        Without the contrastive losses (beta = gamma = 0) nothing reads prototypes, and they stay zero.
        """
        if not self._contrast:
            return
        if slices.pretrained_prototypes is None:
            self.initialise_prototypes(slices.labelled())
        else:
            self.prototypes.copy_(slices.pretrained_prototypes(*self.prototypes.shape))

    @torch.no_grad()
    def initialise_prototypes(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Set the prototypes to the mean feature of each class over all source slices of all workers (Eq. 4).

        The segmenter is in evaluation mode. A class that occurs nowhere gets the zero prototype. ``batches`` are this
        worker's share of (image (B, 1, H, W), label (B, H, W)); shares may differ in length.

        Source: Eq. (4), Liu et al. 2022.
        """
        self.prototypes.copy_(source_prototypes(self.features, batches, self.prototypes))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "prototypes": self.prototypes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        prototypes = state["prototypes"]
        if prototypes.shape != self.prototypes.shape:
            raise DataError(
                f"the checkpoint's prototypes are {tuple(prototypes.shape)}, expected {tuple(self.prototypes.shape)}; "
                "use the classes and the network settings that it was trained with"
            )
        self.prototypes.copy_(prototypes)


@torch.no_grad()
def prototype_angles(prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and mean angle between two of the prototypes (C, d), in radians; 0 where there are no two.

    Zero prototypes are left out.
    """
    directions = F.normalize(prototypes, dim=1)
    angles = torch.arccos(exact_matmul(directions, directions.T).clamp(-1.0, 1.0))
    known = prototypes.any(dim=1)
    pairs = (known[:, None] & known).triu(diagonal=1)
    number = pairs.sum()
    smallest = torch.where(pairs, angles, math.pi).amin() * (number > 0)
    return smallest, (angles * pairs).sum() / number.clamp(min=1)
