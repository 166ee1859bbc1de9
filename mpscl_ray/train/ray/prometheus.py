"""Metrics that trainings, searches and comparisons export through Ray, for Prometheus and Grafana.

Every metric has the tag ``run``, the run's name; ``cluster/README.md`` says what each one is. Ray prefixes the names
with ``ray_``, appends ``_total`` to that of a counter, and adds its own tags (SessionName, NodeAddress, WorkerId, ...).

Values are those of metrics.jsonl, set when they are read (run.log_every) or validated; the process of a search or a
comparison sets those of its own. Ray forwards them every ten seconds. Without Prometheus nothing happens.

Ray exports a gauge as long as the process that set it lives, and a process may train many trials. So what has ended is
set to NaN: then it disappears within some ten seconds, and no alert compares it.
"""

from __future__ import annotations

import math
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from ray.util.metrics import Counter, Gauge

_OF_RECORDS: tuple[tuple[str, str], ...] = (
    (r"global_step", "mpscl_step"),
    (r"train/loss_(?P<loss>.+)", "mpscl_loss"),
    (r"train/learning_rate_(?P<network>.+)", "mpscl_learning_rate"),
    (r"train/gradient_norm(?:_(?P<network>.+))?", "mpscl_gradient_norm"),
    (r"train/pseudo_label_fraction", "mpscl_pseudo_label_fraction"),
    (r"train/discriminator_accuracy_(?P<head>.+)", "mpscl_discriminator_accuracy"),
    (r"train/prototype_angle_(?P<statistic>.+)", "mpscl_prototype_angle_radians"),
    (r"val/(?:(?P<domain>source)/)?dice/(?P<structure>.+)", "mpscl_dice"),
    (r"val/(?:(?P<domain>source)/)?entropy", "mpscl_entropy"),
    (r"val/selection_score", "mpscl_selection_score"),
    (r"perf/step_s", "mpscl_step_seconds"),
    (r"perf/images_per_s", "mpscl_images_per_second"),
    (r"perf/data_stall_fraction", "mpscl_data_stall_fraction"),
)
"""Patterns of a record's keys, whose groups become tags, and the gauges they are exported as."""

_UNNAMED = {"domain": "target", "network": "all"}
"""Values of tags that a key leaves out."""

TAGS: dict[str, tuple[str, ...]] = {
    **{name: tuple(re.compile(pattern).groupindex) for pattern, name in _OF_RECORDS},
    "mpscl_phase_progress": ("phase",),
    "mpscl_checkpoint_timestamp_seconds": (),
    "mpscl_peak_memory_bytes": ("worker", "kind"),
    "mpscl_restarts": (),
    "mpscl_trials": ("state",),
    "mpscl_trial_score": ("trial",),
    "mpscl_best_score": (),
    "mpscl_cells": ("state",),
    "mpscl_eta_seconds": (),
}
"""Tags of every metric beside ``run``, by the name it is created with."""


def readings(record: Mapping[str, Any]) -> Iterator[Reading]:
    """Name, tags and value of each metric that a record of metrics.jsonl has; NaN means no value and is left out."""
    if record.get("iterations"):
        yield "mpscl_phase_progress", {"phase": record["phase"]}, record["iteration"] / record["iterations"]
    for key, value in record.items():
        for pattern, name in _OF_RECORDS:
            match = re.fullmatch(pattern, key)
            if match and not math.isnan(float(value)):
                yield name, {tag: text or _UNNAMED[tag] for tag, text in match.groupdict().items()}, float(value)


Reading = tuple[str, dict[str, str], float]
"""Name of a gauge, its tags beside ``run``, and its value."""


class Gauges:
    """The gauges of a run, a search or a comparison that one process sets."""

    def __init__(self, run: str) -> None:
        self.run = run
        self._gauges: dict[str, Gauge] = {}
        self._shown: set[tuple[str, tuple[tuple[str, str], ...]]] = set()

    def set(self, name: str, value: float, **tags: str) -> None:
        """Export a value from now on."""
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, tag_keys=("run", *TAGS[name]))
        self._gauges[name].set(value, tags={"run": self.run, **tags})
        self._shown.add((name, tuple(sorted(tags.items()))))

    def replace(self, readings: Iterable[Reading]) -> None:
        """Export these values and no others."""
        before, self._shown = self._shown, set()
        for name, tags, value in readings:
            self.set(name, value, **tags)
        for name, shown in before - self._shown:
            self._gauges[name].set(math.nan, tags={"run": self.run, **dict(shown)})

    def close(self) -> None:
        """Export none of them any more."""
        self.replace(())


class CommandGauges(Gauges):
    """The gauges of a search or a comparison, from the process of its command.

    Args:
        run: its name.
        read: returns all values; called every few seconds.
    """

    def __init__(self, run: str, read: Callable[[], Iterable[Reading]]) -> None:
        super().__init__(run)
        self._read = read
        self._next = 0.0

    def update(self) -> None:
        """Export what is new; called as often as one likes."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _EVERY_S
            self.replace(self._read())


_EVERY_S = 5.0


class Monitoring(Gauges):
    """Exports the metrics of a run from one of its workers: all of them from worker 0, memory from each."""

    def __init__(self, run: str, worker: int, device: torch.device) -> None:
        super().__init__(run)
        self.worker, self.device = worker, device

    def record(self, record: Mapping[str, Any]) -> None:
        """Export what was read or validated, and this worker's memory."""
        if self.worker == 0:
            for name, tags, value in readings(record):
                self.set(name, value, **tags)
        kilobyte = 1 if sys.platform == "darwin" else 1024
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte
        self.set("mpscl_peak_memory_bytes", resident, worker=str(self.worker), kind="host")
        if self.device.type == "cuda":
            reserved = torch.cuda.max_memory_reserved(self.device)
            self.set("mpscl_peak_memory_bytes", reserved, worker=str(self.worker), kind="gpu")

    def saved(self) -> None:
        """Training starts, or a checkpoint was written: the age of what can be lost counts from now."""
        if self.worker == 0:
            self.set("mpscl_checkpoint_timestamp_seconds", time.time())


def count_restart(run: str) -> None:
    """Count that workers of a run are replaced; called where Ray Train decides it."""
    _restarts().inc(tags={"run": run})


@cache
def _restarts() -> Counter:
    return Counter("mpscl_restarts", tag_keys=("run", *TAGS["mpscl_restarts"]))
