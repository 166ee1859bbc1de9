"""The losses of SIFA."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.distributed import collectives
from mpscl_ray.methods.losses import annotated_pixels, at_least_float32


def lsgan_generator_loss(verdict: Tensor) -> Tensor:
    """Least-squares loss of the network whose images a discriminator should take for real: mean (D - 1)^2."""
    return (at_least_float32(verdict) - 1.0).square().mean()


def lsgan_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Least-squares loss of a discriminator: half of mean (D(real) - 1)^2 + mean D(fake)^2."""
    return 0.5 * ((at_least_float32(real) - 1.0).square().mean() + at_least_float32(fake).square().mean())


def half_squared_norm(module: nn.Module) -> Tensor:
    """Half the sum of all squared parameters, 0-dim; the same on all workers, so that their mean counts it once."""
    return 0.5 * torch.stack([parameter.square().sum() for parameter in module.parameters()]).sum()


def clipped_cross_entropy(logits: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Weighted cross-entropy, mean over the annotated pixels of -w_y log clip(p_y, 0.005, 1), w_c = 1 - n_c / sum n.

    Logits are (B, C, H, W), labels (B, H, W) int64, ``counts`` the pixels (C,) of each class in the global batch. The
    value is this worker's share. A pixel that is not annotated counts nowhere; one with another label outside the
    classes adds 0, but counts in the mean.

    Source: the released code of Chen et al. 2020, which divides by the number of pixels, not by the sum of weights.
    """
    probabilities = at_least_float32(logits).softmax(dim=1).clamp(0.005, 1.0)
    classes = torch.arange(logits.shape[1], device=labels.device)
    truth = labels[:, None] == classes[:, None, None]
    weights = (1.0 - counts / annotated_pixels(counts)).to(probabilities.dtype)
    total = -(weights[:, None, None] * truth * probabilities.log()).sum(dim=1).sum()
    annotated = collectives.all_reduce_sum((labels != NOT_ANNOTATED).sum().to(total.dtype))
    return collectives.ddp_ratio(total, annotated.clamp(min=1))
