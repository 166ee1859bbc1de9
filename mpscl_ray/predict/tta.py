"""Test-time augmentation: slices are moved a little, and their probabilities moved back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

MirrorAxis = Literal["rows", "columns"]
MIRROR_AXES: tuple[MirrorAxis, ...] = get_args(MirrorAxis)
"""``rows``: their order is reversed, so the slice is upside down."""
MOVES = ((0.95, 0.0, 0.0), (1.05, 0.0, 0.0), (1.0, 0.02, 0.02), (1.0, -0.02, -0.02))
"""Magnification, and shifts along rows and columns as a fraction of that side."""


def augmented(
    predict: Callable[[Tensor], Tensor], images: Tensor, mirror_axes: Sequence[MirrorAxis] = ()
) -> Iterator[Tensor]:
    """Probabilities (B, C, H, W) of the slices as they are, moved by each of :data:`MOVES`, and mirrored.

    Args:
        predict: (B, 1, H, W) to probabilities (B, C, H, W).
        images: (B, 1, H, W).
        mirror_axes: along which the anatomy is its own mirror image; of two, also along both.

    Yields:
        Each on the grid of the slices. Where a moved slice shows nothing, they are those of the slice as it is.
    """
    plain = predict(images)
    yield plain
    for scale, rows, columns in MOVES:
        moved = F.grid_sample(
            images, _grid(images, 1 / scale, rows, columns), padding_mode="border", align_corners=False
        )
        found = predict(moved)
        found = torch.cat([found, torch.ones_like(found[:, :1])], dim=1)
        back = F.grid_sample(found, _grid(found, scale, -rows * scale, -columns * scale), align_corners=False)
        yield back[:, :-1] + (1 - back[:, -1:]) * plain
    dims = [2 + MIRROR_AXES.index(axis) for axis in mirror_axes]
    for number in range(1, len(dims) + 1):
        for chosen in combinations(dims, number):
            yield predict(images.flip(chosen)).flip(chosen)


def _grid(images: Tensor, factor: float, rows: float, columns: float) -> Tensor:
    """Positions ``factor * x + shift`` from the centre; a shift of 1 is the whole side."""
    theta = images.new_tensor([[factor, 0, 2 * columns], [0, factor, 2 * rows]]).expand(len(images), 2, 3)
    return F.affine_grid(theta, list(images.shape), align_corners=False)
