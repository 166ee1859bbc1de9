"""Domain-adaptive category prototypes, the mean feature of each class, and the pseudo-labels they assign.

Sums and counts are float64, and add up over batches (the whole source set) and over workers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpscl_ray.methods.losses import class_indices, cosine_to_prototypes


def downsample_labels(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Nearest-neighbour labels (B, h, w) at feature resolution: out[k] = in[floor(k H / h)] along each axis.

    Args:
        labels: (B, H, W) int64.
        size: (h, w).
    """
    rows, columns = (_nearest(small, large, labels.device) for small, large in zip(size, labels.shape[1:], strict=True))
    return labels[:, rows[:, None], columns]


@functools.lru_cache(maxsize=64)
def _nearest(small: int, large: int, device: torch.device) -> Tensor:
    """Rows of a large map that a small one takes; kept, so that a step launches nothing for them."""
    return torch.arange(small, device=device) * large // small


@torch.no_grad()
def prototype_sums(features: Tensor, labels_small: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Sum (C, d) of the raw features (B, d, h, w) of each class, and its number of pixels (C,), both float64.

    A class that does not occur has zeros.

    Args:
        features: (B, d, h, w).
        labels_small: (B, h, w) int64, see :func:`downsample_labels`.
        num_classes: C.

    Source: numerator and denominator of Eqs. (4) and (5), Liu et al. 2022.
    """
    with torch.autocast(features.device.type, enabled=False):
        classes = class_indices(num_classes, labels_small.device)
        members = (labels_small.flatten(1)[:, :, None] == classes).double()
        sums = torch.matmul(features.double().flatten(2), members).sum(dim=0)
    return sums.T, members.sum(dim=(0, 1))


@torch.no_grad()
def initial_prototypes(sums: Tensor, counts: Tensor) -> Tensor:
    """Mean feature (C, d) of each class; zero for a class without a pixel, so that its cosine is 0 with every feature.

    Args:
        sums: (C, d), over the whole source set and all workers.
        counts: (C,).

    Source: Eq. (4), Liu et al. 2022.
    Differs from the released code: it loads these from a file that came without the routine that made it.
    """
    return sums / counts.clamp_min(1)[:, None]


@torch.no_grad()
def update_prototypes(prototypes: Tensor, sums: Tensor, counts: Tensor, alpha: float) -> Tensor:
    """Moving update of the prototypes by one global batch: c <- alpha c + (1 - alpha) mean.

    A class that does not occur in the batch keeps its prototype. Prototypes and means are not normalised.

    Args:
        prototypes: (C, d).
        sums: (C, d), of the global source batch.
        counts: (C,), pixels of each class in it.
        alpha: weight of the old prototypes.

    Source: Eq. (5), Liu et al. 2022.
    """
    means = initial_prototypes(sums, counts)
    moved = means.lerp(prototypes.to(means.dtype), alpha)
    return torch.where(counts[:, None] > 0, moved.to(prototypes.dtype), prototypes)


@torch.no_grad()
def self_paced_pseudo_labels(cosine: Tensor, delta_th: float) -> tuple[Tensor, Tensor]:
    """Label each pixel by its nearest prototype, and select those that are clearly nearer to it than to the next.

    label = argmax_j cos_j;  mask = cos_(1) - cos_(2) > delta_th, with cos_(k) the k-th largest cosine.
    All classes compete, background included.

    Args:
        cosine: (B, C, h, w), see :func:`~mpscl_ray.methods.losses.cosine_to_prototypes`; C >= 2.
        delta_th: threshold on the difference of cosines, 0 to 2.

    Returns:
        Labels (B, h, w) int64 and mask (B, h, w) bool, both without gradient.

    Source: Eqs. (6) and (7), Liu et al. 2022.
    """
    largest, labels = cosine.max(dim=1)
    return labels, largest - _largest_other(cosine, labels) > delta_th


@torch.no_grad()
def clearly_nearest(cosine: Tensor, labels: Tensor, delta_th: float) -> Tensor:
    """Where the prototype of a pixel's label is nearer than all others: cos_y - max_{j != y} cos_j > delta_th.

    Args:
        cosine: (B, C, h, w); C >= 2.
        labels: (B, h, w) int64; the result (B, h, w) is False where one is ``NOT_ANNOTATED``.
        delta_th: threshold on the difference of cosines, 0 to 2.

    Source: Eq. (7), Liu et al. 2022, where the label is that of the nearest prototype.
    """
    annotated = labels < cosine.shape[1]
    own = cosine.gather(1, (labels * annotated)[:, None])[:, 0]
    return annotated & (own - _largest_other(cosine, labels) > delta_th)


def _largest_other(cosine: Tensor, labels: Tensor) -> Tensor:
    """Largest cosine (B, h, w) of each pixel to a prototype other than that of its label."""
    is_label = labels[:, None] == class_indices(cosine.shape[1], cosine.device)[:, None, None]
    return cosine.masked_fill(is_label, -torch.inf).amax(dim=1)


@dataclass(frozen=True)
class PrototypeClassifier:
    """Assigns self-paced pseudo-labels to the pixels of slices, with the prototypes as they are now."""

    features: Callable[[Tensor], Tensor]
    """Features (B, d, h, w) of slices (B, 1, H, W), in evaluation mode."""
    prototypes: Tensor
    """(C, d)."""
    delta_th: float
    """Threshold of :func:`self_paced_pseudo_labels`."""

    def cosine(self, images: Tensor) -> Tensor:
        """Cosine (B, C, h, w) of the features of slices (B, 1, H, W) to the prototypes."""
        return cosine_to_prototypes(self.features(images), self.prototypes)
