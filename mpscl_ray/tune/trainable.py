"""What runs in one Ray Tune trial: the fork, the training, and a report of each validation."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ray import tune

from mpscl_ray.config import Config, config_from_dict
from mpscl_ray.errors import MpsclError, StorageError
from mpscl_ray.runs.control_files import STOP_FILE, VALIDATION_GATE_FILE
from mpscl_ray.runs.fork import fork
from mpscl_ray.runs.run_directory import RunDirectory, open_run
from mpscl_ray.train.ray.concurrent import Shared, run_trial
from mpscl_ray.train.ray.launch import Launch
from mpscl_ray.train.ray.worker import STOP_THERE
from mpscl_ray.tune.criteria import score

PAUSE = "pause-requested"
"""Name of the file in a trial's folder that asks it to write a checkpoint and give up its workers."""

UNREACHABLE = "unreachable"
"""Key of the report that replaces a status that cannot be written; its value is the reason."""


@dataclass(frozen=True)
class TrialTask:
    """What a trial needs to know, as plain values."""

    config: dict[str, Any]
    """Nested settings."""
    folder: str
    """Address of the trial's run folder."""
    search: str
    """Address of the search's folder."""
    parent: str | None
    """Address of the run that the trial is forked from; None where nothing is shared."""
    phase: str
    """The phase at whose end it is forked."""
    metric: str
    """What trials are compared by."""
    reports: list[tuple[int, dict[str, float]]]
    """Iteration and metrics of each report that the ledger has."""
    ended: bool
    """Whether the trial is over and only tells Ray Tune of its reports again."""


def train_trial(settings: dict[str, Any], shared: Shared) -> None:
    """The trainable of Ray Tune. How it ended is in the run's status.json; an MpsclError is not raised."""
    task, number = TrialTask(**json.loads(settings["task"])), settings["number"]
    for iteration, values in task.reports:
        tune.report(_result(number, iteration, values, task.metric))
    if task.ended:
        return
    config = config_from_dict(task.config)
    patience_s = 60 * config.run.storage_retry_minutes
    folder = open_run(task.folder, "command", patience_s)
    reporter = _ValidationReporter(task, config, folder, number)
    try:
        if task.parent is not None:
            fork(folder, open_run(task.parent, patience_s=patience_s), task.phase)
        reporter.let_pass(0)
        display_name = f"{open_run(task.search).name}-{folder.name}"
        run_trial(config, folder, shared, reporter.poll, display_name=display_name, reserved=True)
        reporter.report()
    except MpsclError as error:
        try:
            if folder.read_status().get("state") != "failed":
                folder.write_status("failed", exit_code=error.exit_code, reason=str(error))
        except StorageError as unreachable:
            tune.report({"number": number, UNREACHABLE: str(unreachable)})
    finally:
        with suppress(StorageError):  # the next start of the trial replaces it
            folder.control_files.clear(VALIDATION_GATE_FILE)


def _result(number: int, iteration: int, values: dict[str, float], metric: str) -> dict[str, Any]:
    """A report to Ray Tune."""
    return {"number": number, "iteration": iteration, "score": score(values, metric), "values": values}


class _ValidationReporter:
    """Hands each new validation of the last phase to Ray Tune, and stops the training where it is asked to.

    The training waits after each validation until :meth:`let_pass`, so that a trial that is to pause does so there.
    """

    def __init__(self, task: TrialTask, config: Config, folder: RunDirectory, number: int) -> None:
        self._task, self._folder, self._number = task, folder, number
        self._search = open_run(task.search)
        self._phase = config.schedule[-1][0]
        self._reported = 0
        self._size = -1
        self._seen = self._passed = 0
        self._next_poll = 0.0
        self._stopping = False

    def poll(self, training: Launch) -> None:
        """Called several times a second."""
        self.report()
        if time.monotonic() < self._next_poll and self._seen == self._passed:
            return
        self._next_poll = time.monotonic() + self._folder.store.poll_interval_s
        # The training itself reports a storage that does not answer.
        with suppress(StorageError):
            if not self._stopping and (
                self._folder.control_files.read(PAUSE) is not None
                or self._search.control_files.read(STOP_FILE) is not None
            ):
                self._stopping = True
                training.request_stop()
            if self._seen > self._passed:
                self.let_pass(self._seen)

    def let_pass(self, step: int) -> None:
        """Let the training continue after the validation at a global step, or stop there if it was asked to."""
        self._folder.control_files.write(VALIDATION_GATE_FILE, f"{step} {STOP_THERE}" if self._stopping else str(step))
        self._passed = step

    def report(self) -> None:
        """Report new validations; returns when Ray Tune has handled them."""
        file = self._folder.metrics_file
        size = file.stat().st_size if file.exists() else 0
        if size == self._size:
            return
        self._size = size
        for record in self._folder.read_metrics():
            self._seen = max(self._seen, record["global_step"])
            if record["phase"] != self._phase or record["iteration"] <= self._reported:
                continue
            values = {tag: float(value) for tag, value in record.items() if tag.startswith("val/")}
            if values:
                self._reported = record["iteration"]
                tune.report(_result(self._number, record["iteration"], values, self._task.metric))
