"""Translated images of earlier iterations, for training a discriminator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpscl_ray.data.sampler import splitmix64
from mpscl_ray.distributed import collectives
from mpscl_ray.errors import DataError


class ImagePool:
    """Translated images of earlier iterations, as global batches: the same on every worker.

    Until it has ``size`` batches it keeps and returns every batch. From then on, with a probability of one half, the
    newest batch replaces an earlier one, which is returned instead. All workers draw the same numbers, from the count
    and ``key`` alone. A pool of size 0 always returns the newest batch.

    Source: Shrivastava et al. 2017, as released with SIFA, which keeps batches.
    """

    def __init__(self, size: int, key: int) -> None:
        self.size, self.key = size, key
        self.batches: list[Tensor] = []
        self.count = 0

    def swap(self, newest: Tensor) -> Tensor:
        """Images for the discriminator, for this worker's part (B, ...) of the newest batch, without gradient."""
        newest = newest.detach()
        if self.size == 0:
            return newest
        chance, index = self.draw(self.count)
        self.count += 1
        if len(self.batches) < self.size:
            self.batches.append(collectives.gather_batch(newest).clone())
            return newest
        if chance <= 0.5:
            return newest
        earlier = self.batches[index]
        self.batches[index] = collectives.gather_batch(newest).clone()
        return earlier[len(newest) * collectives.rank() :][: len(newest)]

    def draw(self, count: int) -> tuple[float, int]:
        """A number in [0, 1) and an index into the pool."""
        chance, index = splitmix64(np.array([2 * count, 2 * count + 1]), self.key).tolist()
        return chance / 2**64, index % self.size

    def state_dict(self) -> dict[str, Any]:
        """Its batches and the number of draws."""
        return {"batches": torch.stack(self.batches) if self.batches else torch.zeros(0), "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Load what :meth:`state_dict` returned.

        Raises:
            DataError: it holds more batches than this pool.
        """
        if len(state["batches"]) > self.size:
            raise DataError(
                f"the checkpoint has a pool of {len(state['batches'])} batches, more than method.pool_size={self.size};"
                " resume with the settings that the run was started with"
            )
        self.batches = [batch.clone() for batch in state["batches"].to(device)]
        self.count = int(state["count"])
