"""What runs in one Ray Tune trial: the fork, the training, and a report of each validation."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from ray import tune

from mpscl_ray.config import Config, config_from_dict
from mpscl_ray.errors import MpsclError, StorageError
from mpscl_ray.runs.control_files import VALIDATION_GATE_FILE
from mpscl_ray.runs.fork import fork
from mpscl_ray.runs.run_directory import RunDirectory, open_run
from mpscl_ray.train.ray.concurrent import Shared, run_trial
from mpscl_ray.train.ray.launch import Launch
from mpscl_ray.train.ray.worker import STOP_THERE
from mpscl_ray.tune.criteria import score

STOP_SEARCH = "stop-requested"
"""Name of the file in the search's folder that asks all its trials to write a checkpoint and end."""

PAUSE = "pause-requested"
"""Name of the file in a trial's folder that asks it to write a checkpoint and give its place back."""

UNREACHABLE = "unreachable"
"""Key of a report in place of a status that could not be written: why the trial's folder cannot be reached."""


@dataclass(frozen=True)
class Task:
    """What a trial needs to know, as plain values.

    Attributes:
        config: nested settings.
        folder: address of the trial's run folder.
        search: address of the search's folder.
        parent: address of the run that the trial begins from; None where nothing is shared.
        phase: the phase whose end it begins from.
        metric: what trials are compared by.
    """

    config: dict[str, Any]
    folder: str
    search: str
    parent: str | None
    phase: str
    metric: str

    def to_text(self) -> str:
        """As a string, in which Ray Tune looks for nothing to resolve."""
        return json.dumps(asdict(self))


def run_task(settings: dict[str, Any], shared: Shared) -> None:
    """The trainable of Ray Tune. How it went is left in the run's status.json; no error is raised that was foreseen."""
    task, number = Task(**json.loads(settings["task"])), settings["number"]
    config = config_from_dict(task.config)
    patience_s = 60 * config.run.outage_min
    folder = open_run(task.folder, "command", patience_s)
    reporter = _Reporter(task, config, folder, number)
    try:
        if task.parent is not None:
            fork(folder, open_run(task.parent, patience_s=patience_s), task.phase)
        reporter.decided(0)
        display_name = f"{open_run(task.search).name}-{folder.name}"
        run_trial(config, folder, shared, reporter.look, display_name=display_name)
        reporter.report()
    except MpsclError as error:
        try:
            if folder.read_status().get("state") != "failed":
                folder.write_status("failed", exit_code=error.exit_code, reason=str(error))
        except StorageError as unreachable:
            tune.report({"number": number, UNREACHABLE: str(unreachable)})
    finally:
        with suppress(StorageError):  # the next start of the trial begins with another one
            folder.control_files.clear(VALIDATION_GATE_FILE)


class _Reporter:
    """Hands each new validation of the last phase to Ray Tune, and passes on the wish to stop.

    The training waits after each validation until it is decided here, so that a trial which is to pause does so
    there.
    """

    def __init__(self, task: Task, config: Config, folder: RunDirectory, number: int) -> None:
        self._task, self._folder, self._number = task, folder, number
        self._search = open_run(task.search)
        self._phase = config.schedule[-1][0]
        self._reported = 0
        self._size = -1
        self._seen = self._decided = 0
        self._next_look = 0.0
        self._stopping = False

    def look(self, training: Launch) -> None:
        """Called several times a second."""
        self.report()
        if time.monotonic() < self._next_look and self._seen == self._decided:
            return
        self._next_look = time.monotonic() + self._folder.store.poll_interval_s
        # A storage that does not answer is the training's concern, which looks after what it writes.
        with suppress(StorageError):
            if not self._stopping and (
                self._folder.control_files.read(PAUSE) is not None
                or self._search.control_files.read(STOP_SEARCH) is not None
            ):
                self._stopping = True
                training.request_stop()
            if self._seen > self._decided:
                self.decided(self._seen)

    def decided(self, step: int) -> None:
        """Let the training go on behind a global step, or stop there if it was asked to."""
        self._folder.control_files.write(VALIDATION_GATE_FILE, f"{step} {STOP_THERE}" if self._stopping else str(step))
        self._decided = step

    def report(self) -> None:
        """Report what was not reported yet; returns when Ray Tune has decided on it."""
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
                tune.report(
                    {
                        "number": self._number,
                        "iteration": record["iteration"],
                        "score": score(record, self._task.metric),
                        "values": values,
                    }
                )
