"""A search on Ray Tune, from the shared beginning to the last trial; the ledger is what it goes by and leaves.

Ray Tune is started anew for what is left to do, each time that a search is started: it keeps no state of its own that
would have to be restored.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune import Callback
from ray.tune.search import Searcher

from mpscl_ray.bucket_run import open_run
from mpscl_ray.config import Config, to_dict
from mpscl_ray.errors import ClusterError, ConfigError, Interrupted, MpsclError, StorageError
from mpscl_ray.interruption import Interruption
from mpscl_ray.progress import TensorBoard
from mpscl_ray.run_folder import RunFolder
from mpscl_ray.search.criteria import score
from mpscl_ray.search.draws import Draws, draws
from mpscl_ray.search.early_stopping import EarlyStopping, InThisProcess
from mpscl_ray.search.ledger import End, Ledger, Trial
from mpscl_ray.search.sharing import shared_phases
from mpscl_ray.search.space import Space
from mpscl_ray.search.task import STOP_EARLY, STOP_SEARCH, UNREACHABLE, Task, run_task
from mpscl_ray.storage import child
from mpscl_ray.trial import Shared, release

LEDGER, TRIALS, RAY_FOLDER = "ledger.jsonl", "trials", "ray"
"""Names in the folder of a search."""

TRIAL_MEMORY = 100 * 2**20
"""Bytes of memory that the process beside a trial's workers asks for. It asks for no CPU: they have them all."""

_NOT_THE_TRIALS_FAULT: dict[int, type[MpsclError]] = {kind.exit_code: kind for kind in (ClusterError, StorageError)}

_TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "100000",
    "RAY_AIR_NEW_OUTPUT": "0",
}
"""The ledger is what is kept, not Ray Tune's own files, and the table of trials is ours."""

_LOOK_S = 0.25


@dataclass
class Study:
    """A search that is being carried out.

    Attributes:
        space: what is searched; its base names the datasets as the user did.
        resolved: the base with datasets that are folders.
        folder: folder of the search.
        shared: data and room, opened once.
        metric: what trials are compared by.
        ledger: what is known of the trials.
        say: called with a sentence about what happens.
    """

    space: Space
    resolved: Config
    folder: RunFolder
    shared: Shared
    metric: str
    ledger: Ledger
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        known = self.ledger.trials
        self.draws: Draws = draws(self.space, known, {number: self.score(trial) for number, trial in known.items()})
        self.started: dict[int, float] = {}
        """Trials that run now, with the time at which they started."""
        self.boards: dict[int, TensorBoard] = {}
        self.held_up: list[MpsclError] = []
        """What kept trials from going on and is not their fault: no room on the cluster, no space on the disk."""
        self.stopping = False
        """Whether all trials are asked to write a checkpoint and end."""
        self.unreachable: dict[int, str] = {}
        """Trials that could not even say how they ended, with the reason."""
        self._folders: dict[int, RunFolder] = {}

    @property
    def iterations(self) -> int:
        """Iterations of the last phase of a trial in full."""
        return self.resolved.schedule[-1][1]

    @property
    def grace(self) -> int:
        """First rung."""
        return self.space.search.grace or max(1, self.iterations // 10)

    @property
    def rungs(self) -> list[float]:
        """Iterations at which trials are compared."""
        rung, found = float(self.grace), []
        while rung < self.iterations:
            found.append(rung)
            rung *= self.space.search.reduction
        return found

    @property
    def common(self) -> list[tuple[str, int]]:
        """Phases that all trials share."""
        return shared_phases(self.resolved, self.space.keys)

    def score(self, trial: Trial) -> float | None:
        """Last score of a trial; None before its first."""
        return score(trial.last, self.metric) if trial.reports else None

    def trial_config(self, settings: dict[str, Any], number: int) -> Config:
        """Settings of a trial's run."""
        config = dataclasses.replace(self.space, base=self.resolved).config(settings)
        run = dataclasses.replace(config.run, name=f"{number:03d}", storage=str(child(self.folder.place, TRIALS)))
        return dataclasses.replace(config, run=run)

    def trial_folder(self, number: int) -> RunFolder:
        """Run folder of a trial."""
        if number not in self._folders:
            place = child(self.folder.address, TRIALS, f"{number:03d}")
            self._folders[number] = open_run(place, patience_s=60 * self.resolved.run.outage_min)
        return self._folders[number]

    def settle(self) -> EarlyStopping:
        """Complete what an interruption has left half done, and return the scheduler that knows all earlier reports."""
        search = self.space.search
        grace = self.grace if search.early_stopping else self.iterations
        scheduler = EarlyStopping(self.iterations, grace, search.reduction, self._report, self._fell_behind)
        for number, iteration in scheduler.replay(self.ledger, lambda values: score(values, self.metric)):
            self._fell_behind(number, iteration)
        for trial in list(self.ledger.trials.values()):
            folder = self.trial_folder(trial.number)
            release(folder)
            if not trial.ended and folder.left(STOP_EARLY) is not None:
                self._end(trial.number)
        self.folder.take_away(STOP_SEARCH)
        return scheduler

    def remaining(self) -> list[int]:
        """Numbers of trials that have not ended, those that have begun first."""
        return [
            n for n in range(1, self.draws.total + 1) if n not in self.ledger.trials or not self.ledger.trials[n].ended
        ]

    def run(self, parent: RunFolder | None, interruption: Interruption, look: Callable[[], None]) -> None:
        """Run all trials that are left; returns when none runs any more, all ended or the search interrupted.

        Raises:
            ClusterError, StorageError: a trial had no room to go on; those that ran beside it have come to their ends.
        """
        for name, value in _TUNE_SETTINGS.items():
            os.environ.setdefault(name, value)
        scheduler = self.settle()
        remaining = self.remaining()
        if not remaining:
            return
        storage = self.folder.path.absolute() / RAY_FOLDER
        shutil.rmtree(storage, ignore_errors=True)
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(run_task, shared=self.shared), {"memory": TRIAL_MEMORY}),
            tune_config=tune.TuneConfig(
                search_alg=_Numbered(self, remaining, parent),
                scheduler=scheduler,
                num_samples=len(remaining),
                max_concurrent_trials=self.shared.at_once,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(storage),
                callbacks=[_Endings(self)],
                failure_config=tune.FailureConfig(max_failures=self.resolved.run.restarts),
                verbose=0,
            ),
        )
        failure: list[BaseException] = []

        def fit() -> None:
            try:
                tuner.fit()
            except BaseException as error:  # noqa: BLE001 - raised again in the main thread
                failure.append(error)

        # In a thread, so that the main one stays free for signals and for showing how far the search is.
        thread = threading.Thread(target=fit, name="ray tune", daemon=True)
        thread.start()
        next_look = 0.0
        while thread.is_alive():
            if self.folder.problem is not None:
                raise self.folder.problem
            if not interruption.requested and time.monotonic() > next_look:
                next_look = time.monotonic() + self.folder.look_s
                with suppress(StorageError):
                    if self.folder.left(STOP_SEARCH) is not None:
                        interruption.request(f"the file {STOP_SEARCH} in its folder")
            if interruption.requested and not self.stopping:
                self.stopping = True
                self.folder.leave(STOP_SEARCH, "")
                # Whoever stopped the command may not wait for the trials: a job is killed soon after it.
                reason = f"stopped by {interruption.signal_name}; trials go on from their last checkpoints"
                self.folder.write_status("interrupted", exit_code=Interrupted.exit_code, reason=reason)
            look()
            thread.join(_LOOK_S)
        look()
        for board in self.boards.values():
            board.close()
        shutil.rmtree(storage, ignore_errors=True)
        for number in list(self.ledger.trials):
            release(self.trial_folder(number))
        for problem in (*failure, *self.held_up):
            raise problem

    def next_task(self, number: int, parent: RunFolder | None) -> dict[str, Any] | None:
        """Begin a trial, or go on with it; None where its settings do not go together, which is the end of it."""
        trial = self.ledger.trials.get(number) or self.ledger.add(number, self.draws.settings(number))
        try:
            config = self.trial_config(trial.settings, number)
        except ConfigError as error:
            self._write_end(number, "failed", str(error))
            return None
        task = Task(
            to_dict(config),
            self.trial_folder(number).address,
            self.folder.address,
            parent.address if parent is not None else None,
            self.common[-1][0] if self.common else "",
            self.metric,
        )
        return {"number": number, "task": task.to_text()}

    def began(self, number: int) -> None:
        """A trial's process runs."""
        self.started.setdefault(number, time.monotonic())
        if number not in self.boards:
            trial = self.ledger.trials[number]
            self.boards[number] = TensorBoard(self.folder.path / "tensorboard" / f"{number:03d}", notice=self.say)
            self.boards[number].hyperparameters(trial.settings, ["search/score", "val/dice/mean"])

    def _report(self, number: int, iteration: int, values: dict[str, float]) -> bool:
        """Write a report into the ledger; False where it is there already."""
        new = self.ledger.report(number, iteration, values)
        if new:
            value = score(values, self.metric)
            self.boards[number].record({"global_step": iteration, "search/score": value, **values})
            self.say(f"trial {number:03d} iteration {iteration}: {self.metric.replace('_', ' ')} {value:.4f}")
        return new

    def _fell_behind(self, number: int, iteration: int) -> None:
        reason = f"fell behind at iteration {iteration}"
        try:
            self.trial_folder(number).leave(STOP_EARLY, reason)
        except StorageError as error:
            self._hold_up(number, error)

    def ended(self, number: int) -> None:
        """A trial's process is done with it, or was lost for good."""
        board = self.boards.pop(number, None)
        if board is not None:
            board.close()
        seconds = time.monotonic() - self.started.pop(number, time.monotonic())
        try:
            if number in self.unreachable:
                raise StorageError(self.unreachable.pop(number))
            self._end(number, seconds)
        except StorageError as error:
            self._hold_up(number, error)

    def _hold_up(self, number: int, problem: MpsclError) -> None:
        self.held_up.append(problem)
        self.say(f"trial {number:03d} cannot go on now, and no other is started: {problem}")

    def _end(self, number: int, seconds: float = 0.0) -> None:
        """Write the end of a trial into the ledger, from what its folder says; nothing where it is to go on later."""
        folder = self.trial_folder(number)
        release(folder)
        early = folder.left(STOP_EARLY)
        status = folder.read_status()
        state = status.get("state")
        if state == "finished":
            self._write_end(number, "finished", "", seconds)
        elif early is not None:
            self._write_end(number, "stopped", early, seconds)
            # Its settings and metrics stay; its weights are of no use to anyone.
            folder.discard_weights()
        elif state == "failed" and status["exit_code"] in _NOT_THE_TRIALS_FAULT:
            self._hold_up(number, _NOT_THE_TRIALS_FAULT[status["exit_code"]](f"trial {number}: {status['reason']}"))
        elif state == "failed":
            self._write_end(number, "failed", status.get("reason", ""), seconds)
        elif state == "interrupted" or self.stopping:
            self.say(f"trial {number:03d} is interrupted and will go on")
        else:
            lost = f"its process was lost {self.resolved.run.restarts + 1} times"
            self._write_end(number, "failed", lost, seconds)

    def _write_end(self, number: int, state: End, reason: str, seconds: float = 0.0) -> None:
        self.ledger.end(number, state, reason, seconds)
        trial = self.ledger.trials[number]
        self.draws.ended(trial, self.score(trial) if trial.state != "failed" else None)
        self.say(f"trial {number:03d} {trial.state}{': ' if trial.reason else ''}{trial.reason}")


class _Numbered(InThisProcess, Searcher):
    """Gives Ray Tune the trials that are left, in order."""

    def __init__(self, study: Study, remaining: list[int], parent: RunFolder | None) -> None:
        super().__init__(metric="score", mode="max")
        self._study, self._remaining, self._parent = study, list(remaining), parent

    def suggest(self, trial_id: str) -> Any:
        while self._remaining and not self._study.held_up and not self._study.stopping:
            task = self._study.next_task(self._remaining.pop(0), self._parent)
            if task is not None:
                return task
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The callback is told too."""

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def save(self, checkpoint_path: str) -> None:
        """The ledger has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """The ledger has it all."""


class _Endings(InThisProcess, Callback):
    """Tells the study when a trial starts and when it is over."""

    def __init__(self, study: Study) -> None:
        self._study = study

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        if UNREACHABLE in result:
            self._study.unreachable[result["number"]] = result[UNREACHABLE]

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._study.began(trial.config["number"])

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._study.ended(trial.config["number"])

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._study.ended(trial.config["number"])
