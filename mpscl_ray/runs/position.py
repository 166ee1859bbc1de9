"""How far a run is, for its status.json while it runs.

The process that holds the run writes it, and no other. After a kill the last content says how far the run was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mpscl_ray.errors import MpsclError
from mpscl_ray.runs.run_directory import RunDirectory

_EVERY_S = 2.0
"""Least time between two writings on a disk; five polls in a bucket, where each one is an upload."""
_LONGEST_SHARE = 0.05
"""Of the time, for reading the metrics of a long run."""
_SHORTEST_S = 0.5
"""Shortest time to measure a speed over."""
_SCORES = {
    "val/selection_score": "selection_score",
    "val/dice/mean": "target_dice",
    "val/source/dice/mean": "source_dice",
}
"""Tag of a metric -> its name in status.json."""


def position(run: RunDirectory) -> dict[str, Any]:
    """Where the last records of metrics are, for the status; {} without metrics.

    Returns:
        phase, iteration, iterations (of the phase) and global_step; where there is one, ``validation``, the last one
        with its global_step and scores, and ``checkpoint``, the newest to resume from.
    """
    records: list[dict[str, Any]] = []
    checkpoints: list[str] = []
    with suppress(MpsclError):  # The status has a more important error to report.
        records = run.read_metrics()
        checkpoints = run.store.step_checkpoints()
    if not records:
        return {}
    last = records[-1]
    found: dict[str, Any] = {
        key: last[key] for key in ("phase", "iteration", "iterations", "global_step") if key in last
    }
    validated = next((record for record in reversed(records) if record.keys() & _SCORES.keys()), None)
    if validated is not None:
        scores = {name: validated[tag] for tag, name in _SCORES.items() if math.isfinite(validated.get(tag, math.nan))}
        found["validation"] = {"global_step": validated["global_step"], **scores}
    return found | ({"checkpoint": checkpoints[-1]} if checkpoints else {})


class StatusUpdates:
    """Writes what changes into the status of a run, every few seconds at most.

    Args:
        run: Its status has been written as running.
        read: Returns the fields that change.
        clock: Seconds, from any origin.
    """

    def __init__(
        self, run: RunDirectory, read: Callable[[], dict[str, Any]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._run, self._read, self._clock = run, read, clock
        self._written: dict[str, Any] = {}
        self._next = 0.0

    def update(self, at_once: bool = False) -> None:
        """Write the fields that :func:`read` returns if they have changed; called as often as one likes.

        A failure is left to what else is written there: no run ends for its status.
        """
        started = self._clock()
        if started < self._next and not at_once:
            return
        with suppress(MpsclError):
            found = self._read()
            if found != self._written:
                self._run.update_status(**found)
                self._written = found
        ended = self._clock()
        self._next = ended + max(_EVERY_S, 5 * self._run.store.poll_interval_s, (ended - started) / _LONGEST_SHARE)


class Speed:
    """Speed and remaining time of a training.

    Args:
        total_steps: Iterations of all its phases.
        clock: Seconds, from any origin.
    """

    def __init__(self, total_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._clock = total_steps, clock
        self._since: tuple[str, int, float] | None = None
        self._last = 0

    def read(self, phase: str, step: int) -> dict[str, float | None]:
        """Iterations per second of the phase since the first call in it, validations included, and seconds left."""
        now = self._clock()
        # The step falls where the workers start again from a checkpoint.
        if self._since is None or self._since[0] != phase or step < self._last:
            self._since = phase, step, now
        self._last = step
        seconds, steps = now - self._since[2], step - self._since[1]
        if seconds < _SHORTEST_S or steps == 0:
            return {"iterations_per_s": None, "eta_s": None}
        return {
            "iterations_per_s": float(f"{steps / seconds:.4g}"),
            "eta_s": round((self._total - step) * seconds / steps),
        }


class TrainingPosition:
    """Position, speed and remaining time of a training, from its metrics.

    Args:
        run: Of the training.
        total_steps: Iterations of all its phases.
        clock: Seconds, from any origin.
    """

    def __init__(self, run: RunDirectory, total_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._run, self._total = run, total_steps
        self._speed = Speed(total_steps, clock)
        self._version = self._metrics_version()
        self._found: dict[str, Any] = {}

    def read(self) -> dict[str, Any]:
        """:func:`position` with total_steps, iterations_per_s and eta_s; {} before the first record of this start."""
        version = self._metrics_version()
        if version != self._version:
            self._version = version
            found = position(self._run)
            if found:
                speed = self._speed.read(found["phase"], found["global_step"])
                found |= {"total_steps": self._total} | speed
            self._found = found
        return self._found

    def _metrics_version(self) -> tuple[int, int]:
        """Changes with the metrics."""
        file = self._run.metrics_file
        return (file.stat().st_size, file.stat().st_mtime_ns) if file.exists() else (0, 0)


def training_status(run: RunDirectory, total_steps: int) -> StatusUpdates:
    """Keeps the status of a training up to date."""
    return StatusUpdates(run, TrainingPosition(run, total_steps).read)
