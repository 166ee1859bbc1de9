"""Throughput of training, and what all workers learn from worker 0 while they train."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

from mpscl_ray.data.loader import SliceStream
from mpscl_ray.distributed import collectives

T = TypeVar("T")

POLL_INTERVAL_S = 0.5
"""Default of the approximate seconds between two polls."""

MAX_STEPS_BETWEEN_POLLS = 50


class ThroughputMeter:
    """Seconds per step, and the share of them spent waiting for data, since the last reading."""

    def __init__(self, step: int, *streams: SliceStream | None) -> None:
        self._streams = [stream for stream in streams if stream is not None]
        self.restart(step)

    def restart(self, step: int) -> None:
        """Start a new measurement, after work that is no step."""
        self._step, self._start, self._waited = step, time.perf_counter(), self._waits()

    def read(self, step: int) -> tuple[float, float]:
        """Seconds per step and share of waiting since the last reading or restart."""
        elapsed, waited = time.perf_counter() - self._start, self._waits() - self._waited
        seconds = elapsed / max(step - self._step, 1)
        self.restart(step)
        return seconds, waited / elapsed

    def _waits(self) -> float:
        return sum(stream.wait_seconds for stream in self._streams)


class Poller(Generic[T]):
    """Asks worker 0 about every ``interval_s`` seconds, and tells all workers the answer at the same step.

    Args:
        ask: called on worker 0; returns JSON types.
        interval_s: approximate seconds between two polls; 0 polls after each step.
    """

    def __init__(
        self,
        ask: Callable[[], T],
        interval_s: float = POLL_INTERVAL_S,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._ask, self._interval_s, self._clock = ask, interval_s, clock
        self._next = 0
        self._last_poll = (clock(), 0)

    def poll_soon(self) -> None:
        """Poll after the next step; all workers call this at the same step."""
        self._next = 0

    def poll(self, step: int) -> T | None:
        """The answer after this step; None at most steps. Worker 0 decides when all workers poll next."""
        if step < self._next:
            return None
        now, (before, step_before) = self._clock(), self._last_poll
        seconds_a_step = (now - before) / max(step - step_before, 1)
        steps = min(max(int(self._interval_s / seconds_a_step), 1), MAX_STEPS_BETWEEN_POLLS)
        asked: list[Any] = [self._ask() if collectives.rank() == 0 else None, step + steps]
        answer, self._next = collectives.broadcast_object(asked)
        self._last_poll = now, step
        return cast(T, answer)
