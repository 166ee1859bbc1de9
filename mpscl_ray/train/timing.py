"""How fast training goes, and when it looks up from its work."""

from __future__ import annotations

import time
from collections.abc import Callable

from mpscl_ray.data.loader import SliceStream
from mpscl_ray.distributed import collectives

POLL_INTERVAL_S = 0.5
"""Seconds, about, between two looks at whether the run was asked to stop, by default."""

MOST_STEPS_UNSEEN = 50
"""Steps after which it is looked in any case."""


class ThroughputMeter:
    """Seconds a step takes, and the share of them spent waiting for data, since the last reading.

    Args:
        step: at which it starts.
        streams: those whose waiting counts; None for one that a phase does not have.
    """

    def __init__(self, step: int, *streams: SliceStream | None) -> None:
        self._streams = [stream for stream in streams if stream is not None]
        self.restart(step)

    def restart(self, step: int) -> None:
        """Begin anew, after something that is no step."""
        self._step, self._start, self._waited = step, time.perf_counter(), self._waits()

    def read(self, step: int) -> tuple[float, float]:
        """Seconds a step and share of waiting since the last reading or restart."""
        elapsed, waited = time.perf_counter() - self._start, self._waits() - self._waited
        seconds = elapsed / max(step - self._step, 1)
        self.restart(step)
        return seconds, waited / elapsed

    def _waits(self) -> float:
        return sum(stream.wait_seconds for stream in self._streams)


class StopPoller:
    """Asks now and then, at the same steps on all workers, whether the run is to end.

    Args:
        stop_requested: asked on worker 0.
        every_s: seconds, about, between two looks; 0 looks after each step.
        clock: seconds that pass.
    """

    def __init__(
        self,
        stop_requested: Callable[[], bool],
        every_s: float = POLL_INTERVAL_S,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._stop_requested, self._every_s, self._clock = stop_requested, every_s, clock
        self._next = 0
        self._seen = (clock(), 0)

    def poll_soon(self) -> None:
        """Look after the next step, whenever that is; all workers say so at the same step."""
        self._next = 0

    def should_stop(self, step: int) -> bool:
        """Whether to end after this step. Worker 0 says when all look next: about every ``every_s`` seconds."""
        if step < self._next:
            return False
        now, (before, step_before) = self._clock(), self._seen
        seconds_a_step = (now - before) / max(step - step_before, 1)
        steps = min(max(int(self._every_s / seconds_a_step), 1), MOST_STEPS_UNSEEN)
        asked = collectives.rank() == 0 and self._stop_requested()
        stop, self._next = collectives.broadcast_object([asked, step + steps])
        self._seen = now, step
        return bool(stop)
