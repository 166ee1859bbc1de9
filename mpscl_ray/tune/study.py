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

from mpscl_ray.config import Config, to_dict
from mpscl_ray.errors import ClusterError, ConfigError, Interrupted, MpsclError, StorageError
from mpscl_ray.runs.run_directory import RunDirectory, open_run
from mpscl_ray.runs.signals import Interruption
from mpscl_ray.runs.storage import join_location
from mpscl_ray.runs.tensorboard import TensorBoard
from mpscl_ray.train.ray.concurrent import Shared
from mpscl_ray.train.ray.placement_groups import release
from mpscl_ray.tune.asha import Halving, InThisProcess, Listener, rungs
from mpscl_ray.tune.criteria import score
from mpscl_ray.tune.ledger import End, Ledger, Trial
from mpscl_ray.tune.samplers import Draws, draws
from mpscl_ray.tune.shared_phases import shared_phases
from mpscl_ray.tune.space import Space
from mpscl_ray.tune.trainable import PAUSE, STOP_SEARCH, UNREACHABLE, Task, run_task

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
    folder: RunDirectory
    shared: Shared
    metric: str
    ledger: Ledger
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        known = self.ledger.trials
        self.draws: Draws = draws(self.space, known, {number: self.score(trial) for number, trial in known.items()})
        self.started: dict[int, float] = {}
        """Trials that run now, with the time at which they started."""
        self.halving = Halving(self.rungs, self.space.search.reduction, self.draws.total)
        for number, iteration in self.ledger.order:
            self.halving.report(number, iteration, score(known[number].reports[iteration], self.metric))
        self._given: set[int] = set()
        """Trials that Ray Tune has been given and that have not come to an end or a pause."""
        self._seconds: dict[int, float] = {}
        self.boards: dict[int, TensorBoard] = {}
        self.held_up: list[MpsclError] = []
        """What kept trials from going on and is not their fault: no room on the cluster, no space on the disk."""
        self.stopping = False
        """Whether all trials are asked to write a checkpoint and end."""
        self.unreachable: dict[int, str] = {}
        """Trials that could not even say how they ended, with the reason."""
        self._folders: dict[int, RunDirectory] = {}

    @property
    def iterations(self) -> int:
        """Iterations of the last phase of a trial in full."""
        return self.resolved.schedule[-1][1]

    @property
    def rungs(self) -> list[float]:
        """Iterations at which trials are compared; none without early stopping."""
        search = self.space.search
        if not search.early_stopping:
            return []
        return rungs(self.iterations, search.grace or max(1, self.iterations // 10), search.reduction)

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
        run = dataclasses.replace(
            config.run, name=f"{number:03d}", storage=str(join_location(self.folder.display_path, TRIALS))
        )
        return dataclasses.replace(config, run=run)

    def trial_folder(self, number: int) -> RunDirectory:
        """Run folder of a trial."""
        if number not in self._folders:
            place = join_location(self.folder.uri, TRIALS, f"{number:03d}")
            self._folders[number] = open_run(place, patience_s=60 * self.resolved.run.outage_min)
        return self._folders[number]

    def settle(self) -> None:
        """Complete what an interruption has left half done."""
        for trial in list(self.ledger.trials.values()):
            release(self.trial_folder(trial.number))
        self.folder.control_files.clear(STOP_SEARCH)
        self._give_up()

    def remaining(self) -> list[int]:
        """Numbers of trials that have not ended."""
        return [
            n for n in range(1, self.draws.total + 1) if n not in self.ledger.trials or not self.ledger.trials[n].ended
        ]

    def next_number(self) -> int | None:
        """The trial to begin, or to go on with; None where there is none now.

        First those that an interruption has cut short, then those that may leave their rung, then new ones.
        """
        left = [number for number in self.remaining() if number not in self._given]
        waiting = {number for number in left if self.halving.waits_at(number) is not None}
        for number in left:
            if number in self.ledger.trials and number not in waiting:
                return number
        best = self.halving.next(waiting) or min(set(left) - waiting, default=None)
        if best is None and not self._given and not self._any_finished():
            best = self.halving.next(waiting, whatever=True)
        return best

    @property
    def waits_for_trials(self) -> bool:
        """Whether some run now, by whose reports others may go on."""
        return bool(self._given)

    def _any_finished(self) -> bool:
        return any(trial.state == "finished" for trial in self.ledger.trials.values())

    def run(self, parent: RunDirectory | None, interruption: Interruption, look: Callable[[], None]) -> None:
        """Run all trials that are left; returns when none runs any more, all ended or the search interrupted.

        Raises:
            ClusterError, StorageError: a trial had no room to go on; those that ran beside it have come to their ends.
        """
        for name, value in _TUNE_SETTINGS.items():
            os.environ.setdefault(name, value)
        self.settle()
        if not self.remaining():
            return
        storage = self.folder.path.absolute() / RAY_FOLDER
        shutil.rmtree(storage, ignore_errors=True)
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(run_task, shared=self.shared), {"memory": TRIAL_MEMORY}),
            tune_config=tune.TuneConfig(
                search_alg=_Numbered(self, parent),
                scheduler=Listener(self._report),
                num_samples=-1,
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
            if self.folder.store.sync_error is not None:
                raise self.folder.store.sync_error
            if not interruption.requested and time.monotonic() > next_look:
                next_look = time.monotonic() + self.folder.store.poll_interval_s
                with suppress(StorageError):
                    if self.folder.control_files.read(STOP_SEARCH) is not None:
                        interruption.request(f"the file {STOP_SEARCH} in its folder")
            if interruption.requested and not self.stopping:
                self.stopping = True
                self.folder.control_files.write(STOP_SEARCH, "")
                # Whoever stopped the command may not wait for the trials: a job is killed soon after it.
                reason = f"stopped by {interruption.signal_name}; trials go on from their last checkpoints"
                self.folder.write_status("interrupted", exit_code=Interrupted.exit_code, reason=reason)
            look()
            thread.join(_LOOK_S)
        if not failure and not self.held_up and not self.stopping:
            for number in self.remaining():
                self._stop(number)
        look()
        for board in self.boards.values():
            board.close()
        shutil.rmtree(storage, ignore_errors=True)
        for number in list(self.ledger.trials):
            release(self.trial_folder(number))
        for problem in (*failure, *self.held_up):
            raise problem

    def next_task(self, number: int, parent: RunDirectory | None) -> dict[str, Any] | None:
        """Begin a trial, or go on with it; None where its settings do not go together, which is the end of it."""
        trial = self.ledger.trials.get(number) or self.ledger.add(number, self.draws.settings(number))
        self.trial_folder(number).control_files.clear(PAUSE)
        try:
            config = self.trial_config(trial.settings, number)
        except ConfigError as error:
            self._write_end(number, "failed", str(error))
            return None
        self._given.add(number)
        task = Task(
            to_dict(config),
            self.trial_folder(number).uri,
            self.folder.uri,
            parent.uri if parent is not None else None,
            self.common[-1][0] if self.common else "",
            self.metric,
        )
        return {"number": number, "task": task.to_text()}

    def began(self, number: int) -> None:
        """A trial's process runs."""
        self.started.setdefault(number, time.monotonic())
        if number not in self.boards:
            trial = self.ledger.trials[number]
            self.boards[number] = TensorBoard(self.folder.path / "tensorboard" / f"{number:03d}", warn=self.say)
            self.boards[number].hyperparameters(trial.settings, ["search/score", "val/dice/mean"])

    def _report(self, number: int, iteration: int, value: float, values: dict[str, float]) -> None:
        """Write a report into the ledger, and ask the trial to pause where it is not among the best."""
        if not self.ledger.report(number, iteration, values):
            return
        self.boards[number].record({"global_step": iteration, "search/score": value, **values})
        self.say(f"trial {number:03d} iteration {iteration}: {self.metric.replace('_', ' ')} {value:.4f}")
        if self.halving.report(number, iteration, value):
            try:
                self.trial_folder(number).control_files.write(PAUSE, f"waits at iteration {iteration}")
            except StorageError as error:
                self._hold_up(number, error)

    def ended(self, number: int) -> None:
        """A trial's process is done with it, or was lost for good."""
        self._given.discard(number)
        started = self.started.pop(number, time.monotonic())
        self._seconds[number] = self._seconds.get(number, 0.0) + time.monotonic() - started
        try:
            if number in self.unreachable:
                raise StorageError(self.unreachable.pop(number))
            self._end(number)
            self._give_up()
        except StorageError as error:
            self._hold_up(number, error)

    def _hold_up(self, number: int, problem: MpsclError) -> None:
        self.held_up.append(problem)
        self.say(f"trial {number:03d} cannot go on now, and no other is started: {problem}")

    def _end(self, number: int) -> None:
        """Write the end of a trial into the ledger, from what its folder says; nothing where it is to go on later."""
        folder = self.trial_folder(number)
        release(folder)
        pause = folder.control_files.read(PAUSE)
        status = folder.read_status()
        state = status.get("state")
        if state == "finished":
            self._write_end(number, "finished")
        elif state == "failed" and status["exit_code"] in _NOT_THE_TRIALS_FAULT:
            self._hold_up(number, _NOT_THE_TRIALS_FAULT[status["exit_code"]](f"trial {number}: {status['reason']}"))
        elif state == "failed":
            self._write_end(number, "failed", status.get("reason", ""))
        elif pause is not None:
            self.say(f"trial {number:03d} {pause}")
        elif state == "interrupted" or self.stopping:
            self.say(f"trial {number:03d} is interrupted and will go on")
        else:
            self._write_end(number, "failed", f"its process was lost {self.resolved.run.restarts + 1} times")

    def _give_up(self) -> None:
        """End the trials that wait and can never go on, so that no more weights are kept than may be needed."""
        for number in self.remaining():
            if number not in self._given and self.halving.hopeless(number):
                self._stop(number)

    def _stop(self, number: int) -> None:
        """The end of a trial that waits. Its settings and metrics stay; its weights are of no use to anyone."""
        self.trial_folder(number).store.delete_checkpoints()
        self._write_end(number, "stopped", f"fell behind at iteration {self.halving.waits_at(number)}")

    def _write_end(self, number: int, state: End, reason: str = "") -> None:
        self.ledger.end(number, state, reason, self._seconds.get(number, 0.0))
        trial = self.ledger.trials[number]
        board = self.boards.pop(number, None)
        if board is not None:
            board.close()
        self.draws.ended(trial, self.score(trial) if trial.state != "failed" else None)
        self.say(f"trial {number:03d} {trial.state}{': ' if trial.reason else ''}{trial.reason}")


class _Numbered(InThisProcess, Searcher):
    """Gives Ray Tune the trials that are left."""

    def __init__(self, study: Study, parent: RunDirectory | None) -> None:
        super().__init__(metric="score", mode="max")
        self._study, self._parent = study, parent

    def suggest(self, trial_id: str) -> Any:
        study = self._study
        while not study.held_up and not study.stopping:
            number = study.next_number()
            if number is None:
                return None if study.waits_for_trials else Searcher.FINISHED
            task = study.next_task(number, self._parent)
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
