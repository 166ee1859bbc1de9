"""Histogram matching, class by class: a slice of one domain with the intensities that its classes have in the other.

A distribution of intensities is held as its quantiles, so that the mean over slices is one too (the barycentre in the
Wasserstein distance), and a curve through two of them maps the one to the other.

Source: landmarks of a histogram, Nyul and Udupa 1999; for each class by itself, and per slice, is ours.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mpscl_ray.distributed import collectives

QUANTILES = 33
"""Quantiles of a distribution, evenly spaced from the least to the largest intensity."""

LEAST_PIXELS = 16
"""A class with fewer pixels in a slice has no distribution there."""


def class_quantiles(images: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Quantiles of the intensities of each class in each slice.

    Args:
        images: (B, 1, H, W).
        labels: (B, H, W) class indices; other values count nowhere.
        num_classes: C, with background.

    Returns:
        (B, C, ``QUANTILES``), ascending; NaN for a class with fewer than ``LEAST_PIXELS`` pixels.
    """
    inside = _members(labels, num_classes)
    ordered = images.flatten(1)[:, None].masked_fill(~inside, torch.inf).sort(dim=2).values
    number = inside.sum(dim=2, keepdim=True)
    steps = torch.linspace(0, 1, QUANTILES, dtype=images.dtype, device=images.device)
    position = steps * (number - 1).clamp(min=0)
    low = position.long()
    high = (low + 1).minimum((number - 1).clamp(min=0))
    quantiles = torch.lerp(ordered.gather(2, low), ordered.gather(2, high), position - low)
    return torch.where(number >= LEAST_PIXELS, quantiles, torch.nan)


def sums_over_slices(quantiles: Tensor) -> tuple[Tensor, Tensor]:
    """Sum (C, Q) of quantiles (B, C, Q), NaN left out, and the number of slices in each, ready to be added."""
    return quantiles.nansum(dim=0), (~quantiles.isnan()).sum(dim=0)


def mean_quantiles(batches: Iterable[tuple[Tensor, Tensor]], otherwise: Tensor) -> Tensor:
    """Mean over all slices of all workers, (C, Q), of the quantiles of each class.

    Args:
        batches: this worker's images (B, 1, H, W) and labels (B, H, W), on the device of ``otherwise``.
        otherwise: (C, Q), for a class that no slice has.
    """
    sums, number = torch.zeros_like(otherwise), torch.zeros_like(otherwise)
    for images, labels in batches:
        of_batch = sums_over_slices(class_quantiles(images.to(otherwise.dtype), labels, len(otherwise)))
        sums, number = sums + of_batch[0], number + of_batch[1]
    sums, number = collectives.all_reduce_sums(sums, number)
    return torch.where(number > 0, sums / number.clamp(min=1), otherwise)


def match_histograms(images: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """Map the intensities of each class so that their quantiles are the wanted ones; order within a class is kept.

    Args:
        images: (B, 1, H, W).
        labels: (B, H, W) class indices; other values keep their intensity.
        wanted: quantiles (B, C, ``QUANTILES``); a class without (NaN), here or in the slice, keeps its intensities.

    Returns:
        (B, 1, H, W).
    """
    found = class_quantiles(images, labels, wanted.shape[1])
    known = ~(found + wanted).isnan().any(dim=2, keepdim=True)
    inside = _members(labels, wanted.shape[1]) & known
    values = images.flatten(1)
    pixels = values[:, None].expand(inside.shape).contiguous()
    high = torch.searchsorted(found.contiguous(), pixels).clamp(1, QUANTILES - 1)
    low, length = found.gather(2, high - 1), found.gather(2, high) - found.gather(2, high - 1)
    share = torch.where(length > 0, (pixels - low) / length, 1.0).clamp(0, 1)
    mapped = torch.lerp(wanted.gather(2, high - 1), wanted.gather(2, high), share)
    matched = torch.where(inside, mapped, 0.0).sum(dim=1)
    return torch.where(inside.any(dim=1), matched, values).reshape(images.shape)


def _members(labels: Tensor, num_classes: int) -> Tensor:
    """Whether a pixel is of a class, (B, C, H * W)."""
    return labels.flatten(1)[:, None] == torch.arange(num_classes, device=labels.device)[:, None]
