"""The order of training samples: a pure function of the seed, the domain and the position.

A domain is one endless stream of samples. Epoch e of it is a permutation of all rows, a function of (seed, domain, e);
position p of the stream is element p mod N of epoch p // N, N being the number of rows. The global step k takes
positions [k*G, (k+1)*G), G being the global batch size, and rank r of W workers takes the r-th of W equal parts of
these. So the samples of a step do not depend on the number of workers, every rank has the same number of steps, a
shorter domain repeats, no sample is dropped, and a resumed run needs only the step number.

A domain whose share of slices with a structure is set has two such streams, of the rows with one and of the others.
The n-th position of either kind takes element n of its stream. The kinds of the positions of a step are a function of
(seed, domain, step, global batch size).

The permutations come from an integer hash and a stable sort, not from a library's generator: they are the same in all
versions of all libraries.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpscl_ray.errors import ConfigError

Keys = NDArray[np.uint64]
Rows = NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def splitmix64(values: NDArray[np.unsignedinteger | np.signedinteger], key: int) -> Keys:
    """Hash each integer with a key by the output function of SplitMix64, a bijection of 64-bit integers.

    Args:
        values: integers of any shape.
        key: 64-bit integer that selects the function.

    Returns:
        64-bit integers of the same shape, which look uniform and independent.

    Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators".
    """
    x = (values.astype(np.uint64) + np.uint64(1)) * _GOLDEN + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * _MIX1
    x = (x ^ (x >> np.uint64(27))) * _MIX2
    hashed: Keys = x ^ (x >> np.uint64(31))
    return hashed


def derive_seed(*parts: int | str) -> int:
    """64-bit seed of a named stream of random numbers, for example ``derive_seed(seed, "source", "augment")``."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little")


@functools.lru_cache(maxsize=8)
def epoch_permutation(seed: int, domain: str, epoch: int, rows: int) -> Rows:
    """Permutation (rows,) of all rows in one epoch of one domain; read-only, because the array is cached."""
    hashes = splitmix64(np.arange(rows), derive_seed(seed, domain, "order", epoch))
    permutation = np.argsort(hashes, kind="stable").astype(np.int64)
    permutation.setflags(write=False)
    return permutation


def sample_positions(seed: int, domain: str, rows: int, start: int, stop: int) -> Rows:
    """Row index at each position [start, stop) of the endless stream of a domain, over any number of epochs."""
    parts = []
    for epoch in range(start // rows, -(-stop // rows)):
        first = epoch * rows
        parts.append(epoch_permutation(seed, domain, epoch, rows)[max(start - first, 0) : stop - first])
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def sample_keys(seed: int, domain: str, start: int, stop: int) -> Keys:
    """Seed of the augmentation at each position [start, stop) of the endless stream of a domain."""
    return splitmix64(np.arange(start, stop), derive_seed(seed, domain, "augment"))


class Foreground:
    """A share of a domain's stream that is drawn among its rows with a structure, the rest among the others.

    After every step the floor of ``share`` times the positions so far are of the first kind, so the share is exact, and
    as even as it can be over the batches. Within a batch the kinds are shuffled: at regular places, micro-batches,
    whose images are regular too, would be of one kind. Where all rows show a structure there are no others to take.

    Raises:
        ConfigError: no row shows a structure.
    """

    def __init__(self, share: float, rows: Rows, total: int, *, predicted: bool = False) -> None:
        """Take the share, above 0 and at most 1, the rows that show a structure, and the number of all rows.

        ``predicted`` says that the labels are predictions.
        """
        if not len(rows):
            lacks, advice = (
                ("pseudo-labelled slice of the target", "train the phases before for longer")
                if predicted
                else ("labelled training slice", "check the labels (python -m mpscl_ray.check)")
            )
            raise ConfigError(
                f"data.foreground_share={share:g} takes slices that show a structure, and no {lacks} shows one; "
                f"{advice}, or set data.foreground_share=null"
            )
        self._rows = rows
        self._others = np.setdiff1d(np.arange(total), rows)
        self._millionths = round(share * 10**6) if len(self._others) else 10**6

    def batch_rows(self, seed: int, domain: str, step: int, size: int) -> Rows:
        """(size,) row indices of the global batch of a step."""
        start, stop = step * size, (step + 1) * size
        first, last = (position * self._millionths // 10**6 for position in (start, stop))
        shows = epoch_permutation(seed, f"{domain}/kinds", step, size) < last - first
        taken = np.empty(size, dtype=np.int64)
        for kind, rows, bounds in (
            ("foreground", self._rows, (first, last)),
            ("background", self._others, (start - first, stop - last)),
        ):
            if bounds[0] < bounds[1]:
                own = shows if kind == "foreground" else ~shows
                taken[own] = rows[sample_positions(seed, f"{domain}/{kind}", len(rows), *bounds)]
        return taken


@dataclass(frozen=True)
class StepOrder:
    """The samples that one rank takes at each global step of one domain.

    Raises:
        ConfigError: the global batch cannot be divided evenly among the workers, or there are no rows.
    """

    seed: int
    """Seed of the run."""
    domain: str
    rows: int
    """Number of rows of the domain."""
    global_batch: int
    """Samples of this domain per step over all ranks."""
    rank: int = 0
    world_size: int = 1
    """Number of workers."""
    foreground: Foreground | None = None
    """The share of rows that show a structure; None for that of the data."""

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size
        if self.rows < 1:
            raise ConfigError(f"the {self.domain} domain has no slices; give a split with at least one case")
        if self.global_batch < 1 or self.global_batch % self.world_size:
            raise ConfigError(
                f"a global batch of {self.global_batch} {self.domain} slices cannot be divided evenly among "
                f"{self.world_size} workers; choose a batch size that is a multiple of the number of workers"
            )

    @property
    def local_batch(self) -> int:
        """Samples of this rank per step."""
        return self.global_batch // self.world_size

    def positions(self, step: int) -> tuple[int, int]:
        """Positions [start, stop) of the stream that this rank takes at a global step."""
        start = step * self.global_batch + self.rank * self.local_batch
        return start, start + self.local_batch

    def batch_rows(self, step: int) -> Rows:
        """(local_batch,) row indices that this rank takes at a global step."""
        if self.foreground is not None:
            own = slice(self.rank * self.local_batch, (self.rank + 1) * self.local_batch)
            return self.foreground.batch_rows(self.seed, self.domain, step, self.global_batch)[own]
        return sample_positions(self.seed, self.domain, self.rows, *self.positions(step))

    def batch_keys(self, step: int) -> Keys:
        """(local_batch,) seeds of the augmentation of these samples."""
        return sample_keys(self.seed, self.domain, *self.positions(step))

    def steps(self, start_step: int = 0) -> Iterator[Rows]:
        """Row indices of this rank's batches from a step on, endless."""
        step = start_step
        while True:
            yield self.batch_rows(step)
            step += 1


def shard_range(count: int, rank: int, world_size: int) -> range:
    """Contiguous part of ``range(count)`` of one rank; together the parts cover it, their sizes differ by at most 1."""
    return range(count * rank // world_size, count * (rank + 1) // world_size)
