"""Inputs of the runs of released code, made from seeds, and digests of their results: only results are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CLASSES = 5
SIZE = 65
"""Height and width of the images, whose features have 9 x 9 pixels."""
ITERATIONS = 4
STEPS = 8
"""Iterations of the schedules, of which ITERATIONS are run."""
SEGMENTER: dict[str, Any] = {"layers": (1, 1, 1, 1), "base_channels": 4}
DISCRIMINATOR_WIDTH = 4

RANKED, RANKED_SIZE = 10, 33
"""Images that IntraDA sorts, and their height and width."""
ANCHORED_CLASSES, ANCHORED_SIZE = 19, 129
"""Classes of CAG, which its released code fixes like the 256 channels of its features; features have 17 x 17 pixels."""
FAR_ANCHORS = {1: 8.0, 12: 8.0}
"""Added to the anchors of these classes after all are made, so that distances to them are above the released cap."""
OTHER_ANCHORS = 1000.0
"""All channels of the anchors of classes that occur nowhere, which the released code leaves at zero."""
ANCHORED_SEGMENTER: dict[str, Any] = {"layers": (1, 1, 1, 1), "base_channels": 8, "multi_level": False}


def values(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


def classes(seed: int, *shape: int, number: int = CLASSES) -> Tensor:
    """Labels in blocks of 5 x 5 pixels, int64 (B, H, W)."""
    coarse = np.random.RandomState(seed).randint(number, size=(shape[0], *(-(-x // 5) for x in shape[1:])))
    return torch.from_numpy(coarse.repeat(5, axis=1).repeat(5, axis=2)[:, : shape[1], : shape[2]].copy())


def training_batches(number: int, seed: int, iterations: int = ITERATIONS) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Network inputs (B, 3, H, W) and labels (B, H, W) of the source, and inputs of the target, of each iteration."""
    for step in range(seed, seed + iterations):
        yield (
            values(step, number, 3, SIZE, SIZE),
            classes(step + 100, number, SIZE, SIZE),
            0.5 * values(step + 200, number, 3, SIZE, SIZE) + 0.3,
        )


def ranked_images() -> Tensor:
    """Network inputs (N, 3, H, W) that differ in scale, so that their scores differ clearly."""
    return (
        values(40, RANKED, 3, RANKED_SIZE, RANKED_SIZE)
        * torch.linspace(0.1, 4, RANKED, dtype=torch.float64)[:, None, None, None]
    )


def anchored_batches(logits: Callable[[Tensor], Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """As training_batches, with labels that logits (B, C, h, w) of the image agree with in part."""
    for step in range(50, 50 + ITERATIONS):
        image, target = (values(step + more, 2, 3, ANCHORED_SIZE, ANCHORED_SIZE) for more in (0, 100))
        with torch.no_grad():
            likely = logits(image).argmax(dim=1)
        likely = torch.where(values(step + 200, *likely.shape) < 1, likely, (likely + 1) % ANCHORED_CLASSES)
        yield image, nn.functional.interpolate(likely[:, None].double(), ANCHORED_SIZE)[:, 0].long(), target


def class_vectors() -> tuple[list[int], Tensor, Tensor]:
    """Classes (5,) and vectors (5, 256) whose mean smooth L1 distances to anchors (19, 256) are .1 to 60."""
    ids = [0, 3, 3, 7, 18]
    anchors = values(61, ANCHORED_CLASSES, 256)
    shift = torch.tensor([0.1, 1.0, 4.0, 6.0, 60.0], dtype=torch.float64)
    return ids, anchors[ids] + shift[:, None] * (1 + 0.1 * values(62, len(ids), 256)), anchors


@torch.no_grad()
def fill(module: nn.Module, seed: int) -> None:
    """Give every tensor values that follow from its place in the state dict, whatever it is called there."""
    for place, (key, tensor) in enumerate(module.state_dict().items()):
        if key.endswith("num_batches_tracked"):
            continue
        x = values(1000 * seed + place, *tensor.shape)
        if key.endswith("running_var"):
            x = 1 + 0.1 * x.abs()
        elif x.ndim == 4:
            x = x * (2 / x[0].numel()) ** 0.5
        elif key.endswith("bias") or key.endswith("running_mean"):
            x = 0.05 * x
        else:
            x = 1 + 0.1 * x
        tensor.copy_(x)


def digest(tensors: Iterable[Tensor | None]) -> np.ndarray[Any, Any]:
    """Norm of each tensor and its product with a fixed random direction, (n, 2) float64; None is a zero."""
    rows: list[Sequence[float]] = []
    for place, tensor in enumerate(tensors):
        flat = torch.zeros(1) if tensor is None else tensor.detach().double().reshape(-1)
        direction = values(place, flat.numel())
        rows.append((float(flat.norm()), float(flat.double() @ direction) / flat.numel() ** 0.5))
    return np.array(rows)
