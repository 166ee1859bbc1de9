"""Self-paced pseudo-labels of the target domain."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def self_paced_pseudo_labels(cosine: Tensor, delta_th: float) -> tuple[Tensor, Tensor]:
    """Label each pixel by its nearest prototype, and select those whose two nearest are well apart.

    label = argmax_j cos_j;  mask = cos_(1) - cos_(2) > delta_th, with cos_(k) the k-th largest cosine.
    All classes compete, background included.

    Args:
        cosine: (B, C, h, w), see ``losses.cosine_to_prototypes``; C >= 2.
        delta_th: Threshold on the difference of cosines, 0..2.

    Returns:
        labels (B, h, w) int64 and mask (B, h, w) bool, both without gradient.

    Source: Eqs. (6) and (7), Liu et al. 2022.
    """
    largest, labels = cosine.max(dim=1)
    is_label = labels[:, None] == torch.arange(cosine.shape[1], device=cosine.device)[:, None, None]
    second = cosine.masked_fill(is_label, -torch.inf).amax(dim=1)
    return labels, largest - second > delta_th
