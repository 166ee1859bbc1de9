"""MPSCL's contrast of pixels with prototypes, for any labels of the target: Liu et al. 2022, Eqs. (4) and (8)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from mpscl_ray.config.methods import ContrastConfig
from mpscl_ray.distributed import collectives
from mpscl_ray.methods.losses import MASK_EPS, margin_contrastive_loss
from mpscl_ray.methods.prototypes import downsample_labels, initial_prototypes, prototype_sums


class Contrasted(NamedTuple):
    """Pixels of one domain, at the resolution of the features."""

    cosine: Tensor
    """(B, C, h, w), to the prototypes."""
    labels: Tensor
    """(B, h, w) int64, class indices, or ``NOT_ANNOTATED``."""


def contrastive_losses(
    c: ContrastConfig, source: Contrasted, target: Contrasted, selected: Tensor, annotated: Tensor
) -> dict[str, Tensor]:
    """Eq. (8) as means over all annotated source pixels and over the selected target pixels: this worker's shares.

    Args:
        c: margins, temperatures and form.
        source: pixels with labels.
        target: pixels with pseudo-labels.
        selected: (B, h, w) bool, the pixels of the target that count.
        annotated: 0-dim, the number of annotated source pixels in the global batch, at least 1.
    """
    on_source = margin_contrastive_loss(
        *source, c.margin_source, c.temperature_source, c.base_temperature, c.margin_form
    )
    on_target = margin_contrastive_loss(
        *target, c.margin_target, c.temperature_target, c.base_temperature, c.margin_form, weights=selected
    )
    number = collectives.all_reduce_sum(on_target.denominator)
    number = number + MASK_EPS if c.margin_form == "released" else number.clamp(min=1.0)
    return {
        "loss_contrastive_source": collectives.ddp_ratio(on_source.numerator, annotated.to(source.cosine.dtype)),
        "loss_contrastive_target": collectives.ddp_ratio(on_target.numerator, number),
    }


@torch.no_grad()
def source_prototypes(
    features: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]], like: Tensor
) -> Tensor:
    """Mean feature of each class over all source slices of all workers; zero for a class that occurs nowhere.

    Args:
        features: (B, d, h, w) of slices (B, 1, H, W), in evaluation mode.
        batches: this worker's share of (image (B, 1, H, W), label (B, H, W)); shares may differ in length.
        like: (C, d), whose dtype and device the result has.

    Source: Eq. (4), Liu et al. 2022.
    """
    sums = torch.zeros(like.shape, dtype=torch.float64, device=like.device)
    counts = sums.new_zeros(len(like))
    for image, label in batches:
        found = features(image)
        labels_small = downsample_labels(label.to(like.device), found.shape[2:])
        batch_sums, batch_counts = prototype_sums(found, labels_small, len(like))
        sums += batch_sums
        counts += batch_counts
    sums, counts = collectives.all_reduce_sums(sums, counts)
    return initial_prototypes(sums, counts).to(like.dtype)
