"""Trainings of a search or a comparison as trials of one Ray Tune, which stops none of them itself.

Each start runs Ray Tune from scratch: what must last is in the files of the search or the comparison.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import Callback, Stopper
from ray.tune.search import Searcher

from mpscl_ray.config import Config
from mpscl_ray.errors import InsufficientResources, Interrupted, MpsclError, StorageError
from mpscl_ray.runs.control_files import STOP_FILE
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.runs.signals import Interruption
from mpscl_ray.train.ray.one_process import own_resources
from mpscl_ray.train.ray.room import Room

TUNE_FOLDER = "tune"
"""Ray Tune's folder in that of the command: its state, and for each trial result.json, progress.csv and TensorBoard
events."""

NO_MORE = Searcher.FINISHED
"""Answer of :meth:`Trials.next`: no trial comes any more."""

TRIAL_MEMORY = 100 * 2**20
"""Bytes of memory that the process beside the workers of a trial asks for. It asks for no CPU: they get them all."""

_TUNE_SETTINGS = {
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}
"""Turns off Ray Tune's own table."""

_POLL_S = 0.25

Settings = dict[str, Any]
"""What a trial gets: numbers and words, which Ray Tune shows, and the rest as bytes, which it does not look into."""


@dataclass
class Trials(ABC):
    """Says which trial is next, and is told what becomes of it. Ray Tune's thread calls its methods."""

    folder: RunDirectory
    """Of the command; ``stop-requested`` in it asks all trials to write a checkpoint and end."""
    running: Collection[Any]
    """The trials that have a process now."""
    errors: list[MpsclError] = field(default_factory=list)
    """Of the cluster or the storage, for which no training is to blame. Nothing new starts when there is one."""
    stopping: threading.Event = field(default_factory=threading.Event)
    """Whether all trials are asked to end."""

    @abstractmethod
    def next(self) -> Settings | str | None:
        """Settings of the next trial; None where there is none now, ``NO_MORE`` where none comes any more."""

    @abstractmethod
    def started(self, trial: Settings) -> None:
        """A trial's process runs."""

    @abstractmethod
    def reported(self, trial: Settings, result: dict[str, Any]) -> None:
        """A trial has called ``ray.tune.report``."""

    @abstractmethod
    def lost(self, trial: Settings, error: str) -> None:
        """A trial's process failed or was lost, as ``error`` says, and Ray Tune starts another."""

    @abstractmethod
    def ended(self, trial: Settings, error: str) -> None:
        """A trial is over; ``error`` says what its process failed with the last time, or is empty."""


def trial_resources(config: Config, use_gpu: bool) -> tune.PlacementGroupFactory:
    """What a trial reserves: a worker's place where it trains itself, else next to nothing."""
    own = own_resources(config, use_gpu)
    bundle: dict[str, int | float] = {**own.resources} or {"memory": TRIAL_MEMORY}
    labels: dict[str, Any] = {"bundle_label_selector": [own.node_labels]} if own.node_labels else {}
    return tune.PlacementGroupFactory([bundle], **labels)


def run_trials(
    trials: Trials,
    trainable: Callable[[Settings], None],
    resources: tune.PlacementGroupFactory | Callable[[Settings], tune.PlacementGroupFactory],
    max_failures: int,
    room: Room,
    interruption: Interruption,
    show: Callable[[], None],
) -> None:
    """Run trials until none runs any more: all have ended, or the command was interrupted.

    Args:
        trainable: of Ray Tune.
        resources: of a trial, see :func:`trial_resources`.
        max_failures: how often the process of a trial may be lost or fail.
        room: how many run at once.
        interruption: asks all trials to end.
        show: called several times a second.

    Raises:
        ClusterError, StorageError: a trial could not continue; the other trials have ended or wait.
    """
    for name, value in _TUNE_SETTINGS.items():
        os.environ.setdefault(name, value)
    # Ray Tune prints the traceback of each failure, which `lost` and `ended` say in a sentence.
    logging.getLogger("ray.tune.execution.tune_controller").setLevel(logging.CRITICAL)
    shutil.rmtree(trials.folder.path / TUNE_FOLDER, ignore_errors=True)
    tuner = tune.Tuner(
        tune.with_resources(trainable, resources),
        tune_config=tune.TuneConfig(
            search_alg=_Searcher(trials), num_samples=-1, reuse_actors=True, trial_dirname_creator=_folder_name
        ),
        run_config=tune.RunConfig(
            name=TUNE_FOLDER,
            storage_path=str(trials.folder.path.absolute()),
            callbacks=[_Callback(trials)],
            stop=_Stopper(trials),
            failure_config=tune.FailureConfig(max_failures=max_failures),
            verbose=0,
        ),
    )
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            tuner.fit()
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            failures.append(error)

    # The main thread stays free for signals and for the display.
    thread = threading.Thread(target=fit, name="ray tune", daemon=True)
    thread.start()
    try:
        _wait(thread, trials, room, interruption, show)
    finally:
        room.close()
    for error in (*failures, *trials.errors):
        raise error


def _folder_name(trial: Any) -> str:
    """A trial that waited at a rung has one for each of its starts."""
    return f"{trial.config['name']}-{trial.trial_id}"


class StopFile:
    """``stop-requested`` in the folder of a command, which asks it to stop as a signal does."""

    def __init__(self, folder: RunDirectory) -> None:
        self._folder, self._next_look = folder, 0.0

    def look(self, interruption: Interruption) -> None:
        """Interrupt if the file is there; may be called as often as one likes."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + self._folder.store.poll_interval_s
        with suppress(StorageError):  # the folder itself reports a storage that fails for long
            if self._folder.control_files.read(STOP_FILE) is not None:
                interruption.request(f"the file {STOP_FILE} in its folder")


def _wait(
    thread: threading.Thread, trials: Trials, room: Room, interruption: Interruption, show: Callable[[], None]
) -> None:
    """Wait for Ray Tune; an interruption is passed on to the trials."""
    folder = trials.folder
    stop_file = StopFile(folder)
    while thread.is_alive():
        if folder.store.sync_error is not None:
            raise folder.store.sync_error
        stop_file.look(interruption)
        if interruption.requested and not trials.stopping.is_set():
            trials.stopping.set()
            folder.control_files.write(STOP_FILE, "")
            # Written now: a job manager may kill the command before the trials have ended.
            reason = f"stopped by {interruption.signal_name}; what runs resumes from its last checkpoint"
            folder.write_status("interrupted", exit_code=Interrupted.exit_code, reason=reason)
        room.yield_place()
        idle = not (trials.running or trials.stopping.is_set() or trials.errors)
        shortage = room.shortage() if idle else None
        if shortage is not None:
            trials.errors.append(InsufficientResources(shortage))
        show()
        thread.join(_POLL_S)


class _NotPicklable:
    """Mixin for what Ray Tune calls and would pickle to restore it, which nothing here does."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return object, ()


class _Searcher(_NotPicklable, Searcher):
    """Gives Ray Tune the next trial."""

    def __init__(self, trials: Trials) -> None:
        super().__init__(metric="score", mode="max")
        self._trials = trials

    def suggest(self, trial_id: str) -> Any:
        if self._trials.errors or self._trials.stopping.is_set():
            return NO_MORE
        return self._trials.next()

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """_Callback does it."""

    def save(self, checkpoint_path: str) -> None:
        """The files of the command have it all."""


class _Stopper(_NotPicklable, Stopper):
    """Ends Ray Tune, once no trial runs, where trials wait for a place which they no longer need."""

    def __init__(self, trials: Trials) -> None:
        self._trials = trials

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return bool(self._trials.stopping.is_set() or self._trials.errors) and not self._trials.running


class _Callback(_NotPicklable, Callback):
    """Passes on that a trial starts, what it reports, and that it is over."""

    def __init__(self, trials: Trials) -> None:
        self._trials = trials

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        self._trials.reported(trial.config, result)

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._trials.started(trial.config)

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._trials.lost(trial.config, _error_of(trial))

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._trials.ended(trial.config, "")

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._trials.ended(trial.config, _error_of(trial))


def _error_of(trial: Any) -> str:
    """What the process of a trial failed with the last time: Ray Tune writes the text of every failure."""
    text = Path(trial.error_file).read_text(encoding="utf-8", errors="replace") if trial.error_file else ""
    return (text.strip().splitlines() or ["no message"])[-1][:300]
