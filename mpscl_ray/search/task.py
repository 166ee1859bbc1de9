"""What runs in one Ray Tune trial: the fork, the training, and a report of each validation."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray import tune

from mpscl_ray.config import config_from_dict
from mpscl_ray.durable_files import write_atomically
from mpscl_ray.errors import MpsclError
from mpscl_ray.fork import fork
from mpscl_ray.launch import Launch
from mpscl_ray.run_folder import DECIDED_FILE, RunFolder
from mpscl_ray.search.criteria import score
from mpscl_ray.trial import Shared, run_trial

STOP_SEARCH = "stop-requested"
"""Name of the file in the search's folder that asks all its trials to write a checkpoint and end."""

STOP_EARLY = "stop-early"
"""Name of the file in a trial's folder that asks it to end because it has fallen behind; holds the reason."""


@dataclass(frozen=True)
class Task:
    """What a trial needs to know, as plain values.

    Attributes:
        config: nested settings.
        folder: run folder of the trial.
        search: folder of the search.
        parent: run folder that the trial begins from; None where nothing is shared.
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
    task = Task(**json.loads(settings["task"]))
    folder = RunFolder(Path(task.folder))
    reporter = _Reporter(task, folder, settings["number"])
    try:
        if task.parent is not None:
            fork(folder, RunFolder(Path(task.parent)), task.phase)
        reporter.decided(0)
        run_trial(config_from_dict(task.config), folder, shared, reporter.look)
    except MpsclError as error:
        if folder.read_status().get("state") != "failed":
            folder.write_status("failed", exit_code=error.exit_code, reason=str(error))
        return
    finally:
        (folder.path / DECIDED_FILE).unlink(missing_ok=True)
    reporter.report()


class _Reporter:
    """Hands each new validation of the last phase to Ray Tune, and passes on the wish to stop.

    The training waits after each validation until it is decided here, so that a trial which has fallen behind stops
    where it did.
    """

    def __init__(self, task: Task, folder: RunFolder, number: int) -> None:
        self._task, self._folder, self._number = task, folder, number
        self._phase = config_from_dict(task.config).schedule[-1][0]
        self._reported = 0
        self._size = -1
        self._seen = self._decided = 0
        self._stopping = False

    def look(self, training: Launch) -> None:
        """Called several times a second."""
        self.report()
        early, all_trials = self._folder.path / STOP_EARLY, Path(self._task.search) / STOP_SEARCH
        if not self._stopping and (early.exists() or all_trials.exists()):
            self._stopping = True
            training.request_stop()
        if self._seen > self._decided:
            self.decided(self._seen)

    def decided(self, step: int) -> None:
        """Let the training go on behind a global step, or stop there if it was asked to."""
        self._decided = step
        write_atomically(self._folder.path / DECIDED_FILE, str(step).encode())

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
