"""The batches of the distributed tests, the same for any number of workers, and the part of each worker."""

from __future__ import annotations

import torch
from torch import Tensor

from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.distributed import collectives
from mpscl_ray.methods import Batch

CLASSES = 4
GLOBAL_BATCH = 8
SIZE = 32
CPU = torch.device("cpu")
HIDDEN = False
"""Whether a part of the source labels is not annotated."""


def global_batch(step: int) -> Batch:
    """Class 2 is in the last image alone, class 3 nowhere; the second half of the target images is nearly flat."""
    generator = torch.Generator().manual_seed(step)
    coarse = torch.randint(0, 2, (GLOBAL_BATCH, 4, 4), generator=generator)
    coarse[-1, 1:3, 1:3] = 2
    label = coarse.repeat_interleave(SIZE // 4, dim=1).repeat_interleave(SIZE // 4, dim=2)
    noise = torch.randn(2, GLOBAL_BATCH, 1, SIZE, SIZE, generator=generator, dtype=torch.float64)
    source = label[:, None] * 0.7 - 0.5 + 0.2 * noise[0]
    target = 0.5 - label.flip(0)[:, None] * 0.6 + 0.2 * noise[1]
    target[GLOBAL_BATCH // 2 :] *= 0.01
    if HIDDEN:
        label = label.clone()
        label[:3] = label[4, : SIZE // 2] = NOT_ANNOTATED
    return Batch(source, label, target, target_view=0.3 - 0.7 * target)


def my_part(batch: Batch) -> Batch:
    size = GLOBAL_BATCH // collectives.world_size()
    rows = slice(collectives.rank() * size, (collectives.rank() + 1) * size)
    return Batch(**{name: images[rows] for name, images in vars(batch).items() if images is not None})


def uneven_shares(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """All slices of a global batch, of which the last worker has all but one for each other worker."""
    rank, last = collectives.rank(), collectives.world_size() - 1
    rows = [rank] if rank < last else list(range(last, GLOBAL_BATCH))
    return [(batch.source_image[row : row + 1], batch.source_label[row : row + 1]) for row in rows]
