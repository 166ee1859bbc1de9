"""The state of a search: which trial runs next, and how a trial ended. The ledger has all of it that must last."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from mpscl_ray.config import Config, override, to_dict
from mpscl_ray.config.systems import common_phases
from mpscl_ray.errors import ClusterError, ConfigError, MpsclError, StorageError
from mpscl_ray.runs.run_directory import RunDirectory, open_run
from mpscl_ray.runs.storage import join_location
from mpscl_ray.runs.tensorboard import TensorBoard
from mpscl_ray.runs.trackers import Tracking
from mpscl_ray.train.ray.concurrent import Shared
from mpscl_ray.train.ray.placement_groups import release
from mpscl_ray.train.ray.prometheus import Reading
from mpscl_ray.train.tracking import tracking_of
from mpscl_ray.tune.criteria import score
from mpscl_ray.tune.ledger import End, Ledger, Trial
from mpscl_ray.tune.samplers import Sampler, make_sampler
from mpscl_ray.tune.schedulers import make_scheduler
from mpscl_ray.tune.space import Space
from mpscl_ray.tune.trainable import PAUSE, TrialTask

LEDGER, TRIALS = "ledger.jsonl", "trials"
"""Names in the folder of a search."""

_INFRASTRUCTURE_ERRORS: dict[int, type[MpsclError]] = {kind.exit_code: kind for kind in (ClusterError, StorageError)}
"""By exit code: errors for which a trial is not to blame. It stays open, and the search ends with the error."""


@dataclass
class Study:
    """A search while it runs."""

    space: Space
    """What is searched; its base names the datasets as the user did."""
    resolved: Config
    """The base with datasets that are folders."""
    folder: RunDirectory
    """Folder of the search."""
    shared: Shared
    """Data and resources, opened once for all trials."""
    metric: str
    """What trials are compared by."""
    ledger: Ledger
    """What is known of the trials."""
    log: Callable[[str], None]
    """Called with a sentence about each event."""

    def __post_init__(self) -> None:
        known = self.ledger.trials
        self.sampler: Sampler = make_sampler(self.space, known, {n: self.score(trial) for n, trial in known.items()})
        self.started: dict[int, float] = {}
        """Trials that run now, with the time at which they started."""
        self.scheduler, self.rungs = make_scheduler(self.space.search, self.iterations, self.sampler.total)
        for number, iteration in self.ledger.order:
            if iteration < self.iterations:
                self.scheduler.report(number, iteration, score(known[number].reports[iteration], self.metric))
        self.active: set[int] = set()
        """Trials that Ray Tune has and that have neither ended nor paused."""
        self._seconds: dict[int, float] = {number: trial.seconds for number, trial in known.items()}
        """Time in which processes of trials ran that do not run any more."""
        self._boards: dict[int, TensorBoard] = {}
        self._folders: dict[int, RunDirectory] = {}
        self._tracking: dict[int, Tracking] = {}
        self.errors: list[MpsclError] = []
        """Errors of the cluster or the storage that kept trials from continuing."""
        self.stopping = threading.Event()
        """Whether all trials are asked to write a checkpoint and end."""
        self.unreachable: dict[int, str] = {}
        """Trials that could not write how they ended, with the reason."""

    @property
    def iterations(self) -> int:
        """Iterations of the last phase of a trial that is not stopped early."""
        return min(self.resolved.schedule[-1][1], self.space.search.max_t or self.resolved.schedule[-1][1])

    @property
    def shared_phases(self) -> list[tuple[str, int]]:
        """Phases, with their iterations, that are trained once for all trials."""
        return common_phases(self.resolved, self.space.keys)

    def counts(self) -> dict[str, Any]:
        """How many trials there are and how many of them are over or run, for the status."""
        ended = Counter(trial.state for trial in list(self.ledger.trials.values()))  # another thread adds some
        states = {state: ended[state] for state in ("finished", "stopped", "failed")}
        return {"trials": {"total": self.sampler.total, **states, "running": len(self.started)}}

    def readings(self) -> Iterator[Reading]:
        """Trials by state, the best score so far, and the score of each trial that runs, for Prometheus."""
        counts = self.counts()["trials"]
        total = counts.pop("total")
        for state, number in (counts | {"waiting": total - sum(counts.values())}).items():
            yield "mpscl_trials", {"state": state}, number
        trials = list(self.ledger.trials.values())
        scores = {trial.number: self.score(trial) for trial in trials if trial.state != "failed"}
        known = {number: value for number, value in scores.items() if value is not None and math.isfinite(value)}
        if known:
            yield "mpscl_best_score", {}, max(known.values())
        for number in known.keys() & self.started.keys():
            yield "mpscl_trial_score", {"trial": f"{number:03d}"}, known[number]

    def score(self, trial: Trial) -> float | None:
        """Last score of a trial; None before its first."""
        return score(trial.last, self.metric) if trial.reports else None

    def trial_folder(self, number: int) -> RunDirectory:
        """Run folder of a trial."""
        if number not in self._folders:
            location = join_location(self.folder.uri, TRIALS, f"{number:03d}")
            self._folders[number] = open_run(location, patience_s=60 * self.resolved.run.storage_retry_minutes)
        return self._folders[number]

    # ------------------------------------------------------------------------------------------------ the next trial

    def recover(self) -> None:
        """Complete what an interruption of the search has left half done."""
        self._release_all()
        self._stop_hopeless_trials()

    def remaining(self) -> list[int]:
        """Numbers of trials that have not ended."""
        trials = self.ledger.trials
        return [n for n in range(1, self.sampler.total + 1) if n not in trials or not trials[n].ended]

    def next_trial(self) -> int | None:
        """The trial to start or resume; None where there is none now.

        First those that an interruption has cut short, then those that are promoted from their rung, then new ones.
        """
        left = [number for number in self.remaining() if number not in self.active]
        waiting = {number for number in left if self.scheduler.waits_at(number) is not None}
        for number in left:
            if number in self.ledger.trials and number not in waiting:
                return number
        best = self.scheduler.promote(waiting) or min(set(left) - waiting, default=None)
        finished = any(trial.state == "finished" for trial in self.ledger.trials.values())
        if best is None and not self.active and not finished:
            best = self.scheduler.promote(waiting, force=True)
        return best

    def next_task(self, number: int, parent: RunDirectory | None) -> dict[str, Any] | None:
        """What Ray Tune runs for a trial; None where its settings contradict each other, which ends the trial.

        For a trial that is over it is the reports alone, so that Ray Tune's files have all trials.
        """
        trial = self.ledger.trials.get(number) or self.ledger.add(number, self.sampler.settings(number))
        self.trial_folder(number).control_files.clear(PAUSE)
        try:
            config = dataclasses.replace(self.space, base=self.resolved).config(trial.settings)
        except ConfigError as error:
            if not trial.ended:
                self._record_end(number, "failed", str(error))
            return None
        if not trial.ended:
            self.active.add(number)
            if number not in self._tracking:
                folder = self.trial_folder(number)
                self._tracking[number] = tracking_of(config, folder, self.folder, self.log, f"{number:03d}")
        storage = str(join_location(self.folder.display_path, TRIALS))
        task = TrialTask(
            to_dict(override(config, {"run.name": f"{number:03d}", "run.storage": storage})),
            self.trial_folder(number).uri,
            self.folder.uri,
            parent.uri if parent is not None else None,
            self.shared_phases[-1][0] if self.shared_phases else "",
            self.metric,
            list(trial.reports.items()) if trial.ended else [],
            trial.ended,
        )
        # As bytes: Ray Tune searches a dict for values to resolve, and shows a string among the settings.
        known = {"number": number, "name": f"{number:03d}", "ended": trial.ended}
        return {**trial.settings, **known, "task": json.dumps(asdict(task)).encode()}

    # ------------------------------------------------------------------------------------------------ events

    def trial_started(self, number: int) -> None:
        """A trial's process runs."""
        self.started.setdefault(number, time.monotonic())
        if number not in self._boards and "tensorboard" in self.resolved.run.loggers:
            trial = self.ledger.trials[number]
            self._boards[number] = TensorBoard(self.folder.path / "tensorboard" / f"{number:03d}", warn=self.log)
            self._boards[number].hyperparameters(trial.settings, ["search/score", "val/dice/mean"])

    def report(self, number: int, iteration: int, value: float, values: dict[str, float]) -> None:
        """Write a report into the ledger, and ask the trial to end there if the scheduler says so."""
        if not self.ledger.report(number, iteration, values, self._seconds_of(number)):
            return
        if number in self._boards:
            self._boards[number].record({"global_step": iteration, "search/score": value, **values})
        self.log(f"trial {number:03d} iteration {iteration}: {self.metric.replace('_', ' ')} {value:.4f}")
        if iteration < self.iterations:
            ends = self.scheduler.report(number, iteration, value)
            self._tell_of_equal_scores(number, iteration)
        else:
            ends = self.iterations < self.resolved.schedule[-1][1]
        if ends:
            try:
                self.trial_folder(number).control_files.write(PAUSE, f"waits at iteration {iteration}")
            except StorageError as error:
                self._record_error(number, error)

    def _tell_of_equal_scores(self, number: int, iteration: int) -> None:
        """Say so where the first trials at a rung have the same score: it cannot tell them apart."""
        enough = max(2, int(self.space.search.reduction_factor))
        for rung in self.rungs:
            trials = self.ledger.trials
            arrived = {n: min((at for at in trial.reports if at >= rung), default=0) for n, trial in trials.items()}
            scores = [score(trials[n].reports[at], self.metric) for n, at in arrived.items() if at]
            if arrived[number] == iteration and len(scores) == enough and len(set(scores)) == 1:
                self.log(
                    f"the first {enough} trials at the rung {rung:g} all score {scores[0]:.4f}, so it does not tell "
                    "them apart and they continue; search.grace_period=ITERATIONS sets a later first rung"
                )

    def track(self) -> None:
        """Pass on to trackers (run.loggers) what trials have measured; called as often as one likes."""
        for tracking in list(self._tracking.values()):  # another thread adds some
            tracking.update()

    def trial_lost(self, number: int, error: str) -> None:
        """A trial's process failed or was lost, as ``error`` says; Ray Tune starts another."""
        self._count_seconds(number)
        self.log(f"trial {number:03d} lost its process and resumes from its last checkpoint: {error}")

    def _seconds_of(self, number: int) -> float:
        now = time.monotonic()
        return self._seconds.get(number, 0.0) + now - self.started.get(number, now)

    def _count_seconds(self, number: int) -> None:
        """A trial's process does not run any more."""
        self._seconds[number] = self._seconds_of(number)
        self.started.pop(number, None)

    def trial_ended(self, number: int, error: str = "") -> None:
        """A trial's process has ended, or was lost for good, as ``error`` says."""
        self.active.discard(number)
        self._count_seconds(number)
        try:
            if number in self.unreachable:
                raise StorageError(self.unreachable.pop(number))
            self._read_end(number, error)
            self._stop_hopeless_trials()
        except StorageError as unreachable:
            self._record_error(number, unreachable)

    def stop_waiting_trials(self) -> None:
        """Stop all trials that still wait, at the end of a search that was neither interrupted nor had errors."""
        if not self.errors and not self.stopping.is_set():
            for number in self.remaining():
                self._stop(number)

    def close(self) -> None:
        """Close the TensorBoard files and trackers, and release what trials have reserved."""
        for tracking in self._tracking.values():
            tracking.close("interrupted")
        for board in self._boards.values():
            board.close()
        self._release_all()

    def _release_all(self) -> None:
        for number in list(self.ledger.trials):
            release(self.trial_folder(number))

    def _record_error(self, number: int, error: MpsclError) -> None:
        self.errors.append(error)
        self.log(f"trial {number:03d} cannot continue now, and no other is started: {error}")

    def _read_end(self, number: int, lost_by: str) -> None:
        """Write the end of a trial into the ledger, from its status.json; nothing where it is to resume later."""
        folder = self.trial_folder(number)
        release(folder)
        pause = folder.control_files.read(PAUSE)
        status = folder.read_status()
        state = status.get("state")
        if state == "finished":
            # A method's guard (Method.guard) can end the last phase before its iterations are done.
            last = (folder.read_metrics() or [{"iteration": 0, "iterations": 0}])[-1]
            early = last["iteration"] < last["iterations"]
            reason = f"the adaptation did harm and ended at iteration {last['iteration']}" if early else ""
            self._record_end(number, "stopped" if early else "finished", reason)
        elif state == "failed" and status["exit_code"] in _INFRASTRUCTURE_ERRORS:
            kind = _INFRASTRUCTURE_ERRORS[status["exit_code"]]
            self._record_error(number, kind(f"trial {number}: {status['reason']}"))
        elif state == "failed":
            self._record_end(number, "failed", status.get("reason", ""))
        elif pause is not None:
            if not self._is_over(number):
                self.log(f"trial {number:03d} {pause}")
        elif state == "interrupted" or self.stopping.is_set():
            self.log(f"trial {number:03d} is interrupted and will resume")
        else:
            times = self.resolved.run.max_failures + 1
            self._record_end(number, "failed", f"its process failed or was lost {times} times: {lost_by}")

    def _stop_hopeless_trials(self) -> None:
        """Stop trials that can never continue, so that no checkpoint is kept without need."""
        for number in self.remaining():
            if number not in self.active and self._is_over(number):
                self._stop(number)

    def _is_over(self, number: int) -> bool:
        trial = self.ledger.trials.get(number)
        at_limit = trial is not None and self.iterations <= trial.iteration < self.resolved.schedule[-1][1]
        return at_limit or self.scheduler.cannot_be_promoted(number)

    def _stop(self, number: int) -> None:
        """The end of a trial before that of its phase. Its settings and metrics stay.

        Its checkpoints are deleted, unless it was stopped by ``search.max_t``.
        """
        behind = self.scheduler.waits_at(number)
        if behind is None:
            self._record_end(number, "stopped", f"search.max_t is {self.iterations}")
            return
        self.trial_folder(number).store.delete_checkpoints()
        self._record_end(number, "stopped", f"fell behind at iteration {behind}")

    def _record_end(self, number: int, state: End, reason: str = "") -> None:
        self.ledger.end(number, state, reason, self._seconds.get(number, 0.0))
        trial = self.ledger.trials[number]
        board = self._boards.pop(number, None)
        if board is not None:
            board.close()
        tracking = self._tracking.pop(number, None)
        if tracking is not None:
            value = self.score(trial)
            tracking.close(state, {} if value is None else {"search/score": value})
        self.sampler.ended(trial, self.score(trial) if trial.state != "failed" else None)
        self.log(f"trial {number:03d} {trial.state}{': ' if trial.reason else ''}{trial.reason}")
