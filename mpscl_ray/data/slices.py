"""Slices of a split, by row: where batches come from.

:class:`LocalSlices` holds them in the memory of this process; those of Ray Data are in
:mod:`mpscl_ray.data.ray_source`.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mpscl_ray.data.dataset import Case
from mpscl_ray.data.label_values import show_a_structure
from mpscl_ray.data.parquet_reader import Arrays, SplitFiles
from mpscl_ray.data.sampler import Rows, shard_range

if TYPE_CHECKING:
    from torch import Tensor

    from mpscl_ray.runs.storage import S3Path


class Slices(ABC):
    """All slices of one split of a prepared dataset, opened for reading."""

    def __init__(self, files: SplitFiles) -> None:
        self.files = files
        """The files of the split; its slices are rows 0..N-1."""

    @property
    def rows(self) -> int:
        """Number of slices."""
        return self.files.rows

    @functools.cached_property
    def foreground_rows(self) -> Rows:
        """Rows whose label shows a structure, ascending; only for slices that were opened with labels.

        The first use reads the labels of the files.
        """
        return self.files.foreground_rows()

    @abstractmethod
    def fetch(self, batches: Iterable[Rows]) -> Generator[Arrays, None, None]:
        """Yield one batch of slices after the other.

        Args:
            batches: row indices of each batch; may be endless, and is read only a bounded number of batches ahead.

        Yields:
            The slices of each batch, in the order of its rows, in arrays that nobody else uses.
        """

    def shard(self, rank: int, world_size: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """This rank's part of all slices, once, in order and unchanged; over all ranks each slice occurs exactly once.

        Ranks may differ by one slice, and so by one batch: put no collective operation inside the loop.

        Args:
            rank: number of this worker.
            world_size: number of workers.
            batch_size: slices in a batch; the last may have fewer.

        Yields:
            Batches as :meth:`~mpscl_ray.data.loader.SliceStream.next` returns them.
        """
        from mpscl_ray.data.loader import collate  # Only here: Ray's processes hand slices on and need no torch.

        own = shard_range(self.rows, rank, world_size)
        firsts = range(0, len(own), batch_size)
        for arrays in self.fetch(np.asarray(own[first : first + batch_size]) for first in firsts):
            yield collate(arrays)

    def volumes(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Case, Arrays]]:
        """Whole cases for validation: this rank gets every ``world_size``-th, its slices in order.

        Yields:
            The case, and its arrays (D, H, W).
        """
        rows = [np.asarray(own) for own in self.files.case_rows()[rank::world_size]]
        yield from zip(self.files.cases[rank::world_size], self.fetch(rows), strict=True)


class InMemorySlices(Slices):
    """Slices in memory, as a few large arrays of consecutive rows."""

    @abstractmethod
    def parts(self) -> Sequence[tuple[int, Arrays]]:
        """The first row and the arrays of each part, in the order of the rows."""

    @functools.cached_property
    def foreground_rows(self) -> Rows:
        """Rows whose label shows a structure, counted in memory."""
        return np.concatenate([start + show_a_structure(arrays["label"]) for start, arrays in self.parts()])

    def fetch(self, batches: Iterable[Rows]) -> Generator[Arrays, None, None]:
        """Copy the rows of each batch out of memory."""
        parts = self.parts()
        starts = np.array([start for start, _ in parts])
        for rows in batches:
            arrays = self.files.empty(len(rows))
            owners = np.searchsorted(starts, rows, side="right") - 1
            for position, (owner, row) in enumerate(zip(owners, rows, strict=True)):
                for name, array in parts[owner][1].items():
                    arrays[name][position] = array[row - starts[owner]]
            yield arrays


class LocalSlices(InMemorySlices):
    """Slices in the memory of this process, read when opened; needs no Ray."""

    def __init__(self, folder: Path | S3Path | str, split: str, *, labels: bool) -> None:
        """Read all cases of a split, one after the other.

        Raises:
            DataError: no such dataset or split, labels missing, or a file missing or damaged, which it names.
        """
        super().__init__(SplitFiles.find(folder, split, labels=labels))
        self._parts = [(own.start, self.files.read(np.asarray(own))) for own in self.files.case_rows()]

    def parts(self) -> Sequence[tuple[int, Arrays]]:
        """One part for each case."""
        return self._parts
