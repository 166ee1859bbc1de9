"""Some of the slices of a split, with other labels: for methods that sort their target."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Generator, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from mpscl_ray.data.label_values import show_a_structure
from mpscl_ray.data.parquet_reader import Arrays
from mpscl_ray.data.sampler import Rows
from mpscl_ray.data.slices import Slices


class SubsetSlices(Slices):
    """Chosen rows of other slices, renumbered from 0.

    Args:
        slices: the slices to choose from.
        rows: (n,) rows there.
        labels: (n, H, W) uint8 that replace the labels; None keeps those of the slices.
    """

    def __init__(self, slices: Slices, rows: Rows, labels: NDArray[np.uint8] | None = None) -> None:
        super().__init__(slices.files)
        assert labels is None or len(labels) == len(rows)
        self._slices, self._rows, self._labels = slices, rows, labels

    @property
    def rows(self) -> int:
        """Number of slices."""
        return len(self._rows)

    @functools.cached_property
    def foreground_rows(self) -> Rows:
        """Rows whose label, here, shows a structure."""
        if self._labels is not None:
            return show_a_structure(self._labels)
        return np.flatnonzero(np.isin(self._rows, self._slices.foreground_rows))

    def fetch(self, batches: Iterable[Rows]) -> Generator[Arrays, None, None]:
        """Yield one batch after the other, as :meth:`Slices.fetch` does."""
        asked: deque[Rows] = deque()

        def translated() -> Iterator[Rows]:
            for rows in batches:
                asked.append(rows)
                yield self._rows[rows]

        fetched = self._slices.fetch(translated())
        try:
            for arrays in fetched:
                rows = asked.popleft()
                yield arrays if self._labels is None else {**arrays, "label": self._labels[rows]}
        finally:
            fetched.close()
