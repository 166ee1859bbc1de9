"""Random inputs of losses, and the plain arithmetic that losses are compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpscl_ray.methods import losses

C = 4


def random_logits(generator: torch.Generator, batch: int = 3, size: int = 5) -> Tensor:
    return 2.0 * torch.randn(batch, C, size, size + 1, generator=generator, dtype=torch.float64)


def random_labels(generator: torch.Generator, batch: int = 3, size: int = 5, classes: int = C) -> Tensor:
    return torch.randint(0, classes, (batch, size, size + 1), generator=generator)


def pixels(labels: Tensor) -> list[tuple[int, int, int]]:
    batch, height, width = labels.shape
    return [(b, y, x) for b in range(batch) for y in range(height) for x in range(width)]


def softmax_reference(logits: list[float]) -> list[float]:
    exponentials = [math.exp(z) for z in logits]
    return [e / sum(exponentials) for e in exponentials]


def value(sums: losses.RatioTerms) -> Tensor:
    return sums.numerator / sums.denominator
