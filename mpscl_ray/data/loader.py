"""Batches of slices for one worker: :class:`SliceStream` makes them, endless and augmented, from any slices."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from itertools import count
from types import TracebackType

import torch
from torch import Tensor

from mpscl_ray.config import AugmentConfig
from mpscl_ray.data.appearance import change_appearance
from mpscl_ray.data.augment import augment, move
from mpscl_ray.data.parquet_reader import Arrays
from mpscl_ray.data.sampler import Foreground, Keys, StepOrder
from mpscl_ray.data.slices import Slices

PREFETCH = 2
"""Batches that a stream prepares ahead of the training step."""


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
