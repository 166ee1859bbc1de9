"""Losses of labels whose sums are over the whole global batch, as this worker's share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.distributed import collectives
from mpscl_ray.methods.losses import at_least_float32

_LEAST_WEIGHT = 1e-6


def floored_cross_entropy(logits: Tensor, labels: Tensor, counts: Tensor, floor: float) -> Tensor:
    """Cross-entropy in which no class weighs less than ``floor``; 1 is the plain mean.

    w_c = max(1 - n_c / sum_k n_k, floor, 1e-6);  value = sum_i w_{y_i} CE_i / sum_i w_{y_i}, over the annotated pixels
    of the global batch; 0 where there are none. By the 1e-6 a batch of one class has the plain mean too.

    Logits are (B, C, H, W), labels (B, H, W) int64, ``counts`` the pixels (C,) of each class in the global batch.

    Source: the cross-entropy of the released code of Liu et al. 2022, which is ``floor = 0``.
    """
    logits = at_least_float32(logits)
    weights = (1.0 - counts / counts.sum().clamp(min=1)).clamp(min=max(floor, _LEAST_WEIGHT))
    weight_sum = (counts * weights).sum()
    numerator = F.cross_entropy(
        logits, labels, weight=weights.to(logits.dtype), ignore_index=NOT_ANNOTATED, reduction="sum"
    )
    return collectives.ddp_ratio(numerator, torch.where(weight_sum > 0, weight_sum, 1.0).to(logits.dtype))


def batch_dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Dice loss of the global batch: 1 - 1/C sum_c 2 sum pg / (sum p^2 + sum g + 1e-7), sums over all images.

    It is not a mean over images, so the three sums of each class are added over the workers before the division. Logits
    are (B, C, H, W), labels (B, H, W) int64. The loss of a batch without annotated pixels is 0. A class that is nowhere
    in the batch adds the constant 1/C, without gradient, so that a class weighs the same whatever others are there.

    Source: the released code of Chen et al. 2020.
    """
    probabilities = at_least_float32(logits).softmax(dim=1)
    classes = torch.arange(logits.shape[1], device=labels.device)
    truth = (labels[:, None] == classes[:, None, None]).to(probabilities.dtype)
    squares = probabilities.square() * (labels != NOT_ANNOTATED)[:, None]
    sums = [x.sum(dim=(0, 2, 3)) for x in (probabilities * truth, squares, truth)]
    overlap, squares, sizes = collectives.sum_with_gradient(torch.stack(sums)).unbind()
    loss = 1.0 - (2.0 * overlap / (squares + sizes + 1e-7)).mean()
    return torch.where(squares.sum() > 0, loss, 0.0)
