"""Pseudo-labels of a teacher: drawn to the class shares of the source, where it is confident."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpscl_ray.data import NOT_ANNOTATED

_SMALLEST_SHARE = 1e-6
"""Keeps the quotient of class shares finite where the target has next to none of a class."""


def align(probabilities: Tensor, source_shares: Tensor, target_shares: Tensor, exponent: float) -> Tensor:
    """Distribution alignment: p_k (r_k / q_k)^exponent, renormalised.

    Args:
        probabilities: p, (B, C, H, W).
        source_shares: r, (C,), of each class among the annotated pixels of the source.
        target_shares: q, (C,), running mean of p.
        exponent: 0 changes nothing.

    Source: Berthelot et al. 2020 (ReMixMatch), section 3.1; the exponent is ours.
    """
    factors = share_quotient(source_shares, target_shares) ** exponent
    weighted = probabilities * factors.to(probabilities.dtype)[:, None, None]
    return weighted / weighted.sum(dim=1, keepdim=True)


def share_quotient(source_shares: Tensor, target_shares: Tensor) -> Tensor:
    """r_k / q_k of each class (C,), and 1 for a class that no annotated pixel of the source has.

    Nothing is known of the share of such a class: its pixels may be among those that are not annotated. A source
    without any annotated pixel changes nothing.
    """
    quotient = source_shares / target_shares.clamp(min=_SMALLEST_SHARE)
    return torch.where(source_shares > 0, quotient, 1.0)


def confident_labels(probabilities: Tensor, thresholds: Tensor) -> Tensor:
    """The most likely class (B, H, W) int64 where its probability reaches its threshold, elsewhere ``NOT_ANNOTATED``.

    Probabilities are (B, C, H, W), thresholds (C,).
    """
    confidence, labels = probabilities.max(dim=1)
    return torch.where(confidence >= thresholds.to(confidence.dtype)[labels], labels, NOT_ANNOTATED)


def class_sums(probabilities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each class, from probabilities (B, C, H, W): three sums (C,) float64, ready to be added over workers.

    They are the sum of its probability, the sum of the confidence over pixels where it is the most likely class, and
    the number of these.
    """
    confidence, labels = probabilities.max(dim=1)
    number = probabilities.shape[1]
    classes = torch.arange(number, device=labels.device)
    members = (labels.reshape(1, -1) == classes[:, None]).double()
    return probabilities.double().sum(dim=(0, 2, 3)), members @ confidence.reshape(-1).double(), members.sum(dim=1)


def jensen_shannon(one: Tensor, other: Tensor) -> Tensor:
    """Jensen-Shannon divergence (B, H, W), in nats, of the softmax of two logits (B, C, H, W), with both gradients.

    JS = KL(p || m) / 2 + KL(q || m) / 2, with m = (p + q) / 2: symmetric, at most log 2.

    Source: Hendrycks et al. 2020 (AugMix), the consistency loss of section 3, of two views instead of three.
    """
    logs = torch.stack([one, other]).log_softmax(dim=2)
    middle = logs.logsumexp(dim=0) - math.log(2)
    return (logs.exp() * (logs - middle)).sum(dim=(0, 2)) / 2
