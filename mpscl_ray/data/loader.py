"""Batches of slices for one worker.

:class:`Slices` is a split of a prepared dataset, opened for reading. :class:`LocalSlices` holds it in the memory of
this process; those that Ray Data reads are in :mod:`mpscl_ray.data.ray_source`. :class:`SliceStream` makes endless,
augmented batches of one rank from any of them.
"""

from __future__ import annotations

import functools
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from mpscl_ray.config import AugmentConfig
from mpscl_ray.data.appearance import change_appearance
from mpscl_ray.data.augment import augment, move
from mpscl_ray.data.dataset import Case
from mpscl_ray.data.label_values import show_a_structure
from mpscl_ray.data.parquet_reader import Arrays, SplitFiles
from mpscl_ray.data.sampler import Foreground, Keys, Rows, StepOrder, shard_range

PREFETCH = 2
"""Batches that a stream prepares ahead of the training step."""


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
            Batches as :meth:`SliceStream.next` returns them.
        """
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

    def __init__(self, folder: Path | str, split: str, *, labels: bool) -> None:
        """Read all cases of a split, one after the other.

        Raises:
            DataError: no such dataset or split, labels missing, or a file missing or damaged, which it names.
        """
        super().__init__(SplitFiles.find(folder, split, labels=labels))
        self._parts = [(own.start, self.files.read(np.asarray(own))) for own in self.files.case_rows()]

    def parts(self) -> Sequence[tuple[int, Arrays]]:
        """One part for each case."""
        return self._parts


def collate(
    arrays: Arrays,
    keys: Keys | None = None,
    config: AugmentConfig | None = None,
    view: AugmentConfig | None = None,
    *,
    original: bool = False,
) -> dict[str, Tensor]:
    """Turn arrays into a batch, augmented if configured: image (B, 1, H, W) float32, label (B, H, W) int64.

    With ``view`` also that: the image, moved likewise, with an appearance drawn by these settings. With ``original``
    also that: the image, moved likewise, with the appearance it has in the arrays.
    """
    image = torch.from_numpy(arrays["image"]).unsqueeze(1)
    label = torch.from_numpy(arrays["label"]) if "label" in arrays else None
    stored = image
    if keys is not None and config is not None:
        image, label = augment(image, label, keys, config)
    batch = {"image": image} if label is None else {"image": image, "label": label.long()}
    if keys is not None and config is not None and original:
        batch["original"], _ = move(stored, None, keys, config)
    if keys is not None and view is not None:
        batch["view"] = change_appearance(image, None, keys, view)
    return batch


class SliceStream:
    """The endless, shuffled, augmented batches of one rank, prepared in the background at most two ahead.

    The batch of a global step is a function of the data, the seed, the domain, the step and the global batch size; see
    :mod:`mpscl_ray.data.sampler`. To resume, open the stream at the step reached.
    """

    def __init__(
        self,
        slices: Slices,
        *,
        seed: int,
        domain: str,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
        augment: AugmentConfig | None = None,
        view: AugmentConfig | None = None,
        original: bool = False,
        foreground: Foreground | None = None,
        start_step: int = 0,
        device: torch.device | None = None,
    ) -> None:
        """Start to prepare batches.

        Args:
            slices: the slices to take batches from.
            seed: seed of the run.
            domain: name of the domain.
            global_batch: slices per step over all ranks.
            rank: number of this worker.
            world_size: number of workers.
            augment: random changes of the slices; None for none.
            view: appearance of the second view of each slice; None for no such view.
            original: whether each slice also comes without the changes of its intensities.
            foreground: the share of slices that show a structure; None for that of the data.
            start_step: step of the first batch.
            device: device of the tensors; a GPU gets them through pinned memory, without waiting.

        Raises:
            ConfigError: the global batch cannot be divided evenly among the workers.
        """
        self.order = StepOrder(seed, domain, slices.rows, global_batch, rank, world_size, foreground)
        """Which rows this rank takes at which step."""
        self.wait_seconds = 0.0
        """Total time for which :meth:`next` has waited."""
        self._slices = slices
        self._augment, self._view, self._original = augment, view, original
        self._start_step = start_step
        self._device = device or torch.device("cpu")
        self._ready: deque[dict[str, Tensor] | Exception] = deque()
        self._changed = threading.Condition()
        self._closed = False
        # A daemon, because a stream that is never closed must not keep the process alive.
        self._thread = threading.Thread(target=self._prepare, name=f"slices of {domain}", daemon=True)
        self._thread.start()

    def next(self) -> dict[str, Tensor]:
        """Batch of the next step.

        Returns:
            ``image`` (B, 1, H, W) float32 and, if the slices were opened with labels, ``label`` (B, H, W) int64, B
            being the global batch size divided by the number of workers. ``view`` and ``original`` like ``image``, if
            asked for.

        Raises:
            DataError: a file is missing or damaged; it is named. Any other error of the background thread is raised
                here too.
        """
        begin = time.perf_counter()
        with self._changed:
            assert not self._closed, "the stream is closed"
            self._changed.wait_for(lambda: self._ready)
            item = self._ready[0]
            if isinstance(item, Exception):
                # It stays in the queue: a second call raises it again instead of waiting for ever.
                raise item
            self._ready.popleft()
            self._changed.notify_all()
        self.wait_seconds += time.perf_counter() - begin
        if self._device.type == "cpu":
            return item
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in item.items()}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Batches, endless."""
        while True:
            yield self.next()

    def close(self) -> None:
        """Stop preparing batches and wait until the background thread has ended; may be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._ready.clear()

    def __enter__(self) -> SliceStream:
        """Enter a context that closes the stream at its end."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the stream."""
        self.close()

    def _prepare(self) -> None:
        fetched = self._slices.fetch(self.order.steps(self._start_step))
        try:
            if self._device.type == "cuda":
                # A new thread uses the first GPU; pinning would make every worker of a node open a context on it.
                torch.cuda.set_device(self._device)
            for step in count(self._start_step):
                if not self._wait_for_room():
                    return
                self._hand_over(self._finish(next(fetched), step))
        except Exception as error:  # noqa: BLE001 - handed to the thread that waits for the batch
            self._hand_over(error)
        finally:
            fetched.close()

    def _wait_for_room(self) -> bool:
        """Wait until a batch may be prepared; False when the stream has been closed instead."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._ready) < PREFETCH)
            return not self._closed

    def _hand_over(self, item: dict[str, Tensor] | Exception) -> None:
        with self._changed:
            self._ready.append(item)
            self._changed.notify_all()

    def _finish(self, arrays: Arrays, step: int) -> dict[str, Tensor]:
        batch = collate(arrays, self.order.batch_keys(step), self._augment, self._view, original=self._original)
        if self._device.type == "cuda":
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return batch
