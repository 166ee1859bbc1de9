"""A search on Ray Tune: the searcher and the callback that connect it to a study. Ray Tune itself stops no trial.

Each start of a search runs Ray Tune from scratch. Trials that are over report again what the ledger has of them, so
that the files of Ray Tune, which its own tools open, have all trials.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune import Callback, Stopper
from ray.tune.search import Searcher

from mpscl_ray.errors import InsufficientResources, Interrupted
from mpscl_ray.runs.control_files import STOP_FILE
from mpscl_ray.runs.position import StatusUpdates
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.runs.signals import Interruption
from mpscl_ray.train.ray.one_process import own_resources
from mpscl_ray.train.ray.prometheus import CommandGauges
from mpscl_ray.train.ray.room import Room
from mpscl_ray.tune.study import Study
from mpscl_ray.tune.trainable import UNREACHABLE, train_trial

TUNE_FOLDER = "tune"
"""Ray Tune's folder in that of a search: its state, and result.json, progress.csv and TensorBoard events of trials."""

TRIAL_MEMORY = 100 * 2**20
"""Bytes of memory that the process beside the workers of a trial asks for. It asks for no CPU: they get them all."""

_TUNE_SETTINGS = {
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}
"""Turns off Ray Tune's own table, which :mod:`mpscl_ray.tune.display` replaces."""

_POLL_S = 0.25


def run_trials(
    study: Study, parent: RunDirectory | None, room: Room, interruption: Interruption, redraw: Callable[[], None]
) -> None:
    """Run all trials that are left; returns when none runs any more: all ended, or the search was interrupted.

    Args:
        study: of the search.
        parent: the run that trials are forked from; None where they share nothing.
        room: how many run at once.
        interruption: asks all trials to write a checkpoint and end.
        redraw: called several times a second.

    Raises:
        ClusterError, StorageError: a trial could not continue; the other trials have ended or wait.
    """
    for name, value in _TUNE_SETTINGS.items():
        os.environ.setdefault(name, value)
    study.recover()
    if not study.remaining():
        return
    shutil.rmtree(study.folder.path / TUNE_FOLDER, ignore_errors=True)
    tuner = _tuner(study, parent, room)
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            tuner.fit()
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            failures.append(error)

    # The main thread stays free for signals and for the display.
    thread = threading.Thread(target=fit, name="ray tune", daemon=True)
    thread.start()
    status = StatusUpdates(study.folder, study.counts)
    gauges = CommandGauges(study.folder.name, study.readings)

    def show() -> None:
        redraw()
        status.update()
        study.track()
        gauges.update()

    _wait(thread, study, room, interruption, show)
    room.close()
    if not failures:
        study.stop_waiting_trials()
    redraw()
    status.update(at_once=True)
    study.close()
    gauges.close()
    for error in (*failures, *study.errors):
        raise error


def _tuner(study: Study, parent: RunDirectory | None, room: Room) -> tune.Tuner:
    trainable = tune.with_parameters(train_trial, shared=study.shared)
    own = own_resources(study.resolved, study.shared.use_gpu)
    bundle: dict[str, int | float] = {**own.resources} or {"memory": TRIAL_MEMORY}
    labels: dict[str, Any] = {"bundle_label_selector": [own.node_labels]} if own.node_labels else {}
    resources = tune.PlacementGroupFactory([bundle], **labels)
    return tune.Tuner(
        tune.with_resources(trainable, resources),
        tune_config=tune.TuneConfig(
            search_alg=LedgerSearcher(study, parent, room),
            num_samples=-1,
            reuse_actors=True,
            trial_dirname_creator=_folder_name,
        ),
        run_config=tune.RunConfig(
            name=TUNE_FOLDER,
            storage_path=str(study.folder.path.absolute()),
            callbacks=[StudyCallback(study)],
            stop=StudyStopper(study),
            failure_config=tune.FailureConfig(max_failures=study.resolved.run.max_failures),
            verbose=0,
        ),
    )


def _folder_name(trial: Any) -> str:
    """A trial that waited at a rung has one for each of its starts."""
    return f"{trial.config['number']:03d}-{trial.trial_id}"


def _wait(
    thread: threading.Thread, study: Study, room: Room, interruption: Interruption, redraw: Callable[[], None]
) -> None:
    """Wait for Ray Tune; an interruption is passed on to the trials."""
    folder = study.folder
    while thread.is_alive():
        if folder.store.sync_error is not None:
            raise folder.store.sync_error
        study.look_for_stop(interruption)
        if interruption.requested and not study.stopping:
            study.stopping = True
            folder.control_files.write(STOP_FILE, "")
            # Written now: a job manager may kill the command before the trials have ended.
            reason = f"stopped by {interruption.signal_name}; trials resume from their last checkpoints"
            folder.write_status("interrupted", exit_code=Interrupted.exit_code, reason=reason)
        idle = not (study.started or study.stopping or study.errors)
        shortage = room.shortage() if idle else None
        if shortage is not None:
            study.errors.append(InsufficientResources(shortage))
        redraw()
        thread.join(_POLL_S)


class NotPicklable:
    """Mixin for what Ray Tune calls and would pickle to restore it, which the ledger makes needless."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return object, ()


class LedgerSearcher(NotPicklable, Searcher):
    """Gives Ray Tune the trials that are left."""

    def __init__(self, study: Study, parent: RunDirectory | None, room: Room) -> None:
        super().__init__(metric="score", mode="max")
        self._study, self._parent, self._room = study, parent, room
        self._ended = [number for number, trial in study.ledger.trials.items() if trial.ended]

    def suggest(self, trial_id: str) -> Any:
        study = self._study
        while not study.errors and not study.stopping:
            if self._ended:
                task = study.next_task(self._ended.pop(0), self._parent)
                if task is not None:
                    return task
                continue
            if study.active and not self._room.has_place(len(study.active)):
                return None
            number = study.next_trial()
            if number is None:
                return None if study.active else Searcher.FINISHED
            task = study.next_task(number, self._parent)
            if task is not None:
                return task
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """StudyCallback does it."""

    def save(self, checkpoint_path: str) -> None:
        """The ledger has it all."""


class StudyStopper(NotPicklable, Stopper):
    """Ends Ray Tune, once no trial runs, where trials wait for a place which they no longer need."""

    def __init__(self, study: Study) -> None:
        self._study = study

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return bool(self._study.stopping or self._study.errors) and not self._study.started


class StudyCallback(NotPicklable, Callback):
    """Passes on to the study that a trial starts, what it reports, and that it is over."""

    def __init__(self, study: Study) -> None:
        self._study = study

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        if UNREACHABLE in result:
            self._study.unreachable[result["number"]] = result[UNREACHABLE]
        elif "score" in result:
            self._study.report(result["number"], result["iteration"], result["score"], result["values"])

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        if not trial.config["ended"]:
            self._study.trial_started(trial.config["number"])

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        if not trial.config["ended"]:
            self._study.trial_lost(trial.config["number"])

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        if not trial.config["ended"]:
            self._study.trial_ended(trial.config["number"])

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        if not trial.config["ended"]:
            self._study.trial_ended(trial.config["number"])
