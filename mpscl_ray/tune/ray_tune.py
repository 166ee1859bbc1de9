"""The trials of a search on Ray Tune.

Trials that are over report again what the ledger has of them, so that the files of Ray Tune, which its own tools open,
have all trials.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray import tune

from mpscl_ray.runs.position import StatusUpdates
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.runs.signals import Interruption
from mpscl_ray.train.ray import trials
from mpscl_ray.train.ray.prometheus import CommandGauges
from mpscl_ray.train.ray.room import Room
from mpscl_ray.tune.study import Study
from mpscl_ray.tune.trainable import UNREACHABLE, train_trial


def run_study(
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
    study.recover()
    if not study.remaining():
        return
    status = StatusUpdates(study.folder, study.counts)
    gauges = CommandGauges(study.folder.name, study.readings)

    def show() -> None:
        redraw()
        status.update()
        study.track()
        gauges.update()

    trainable = tune.with_parameters(train_trial, shared=study.shared)
    resources = trials.trial_resources(study.resolved, study.shared.use_gpu)
    failures = study.resolved.run.max_failures
    try:
        trials.run_trials(StudyTrials(study, parent, room), trainable, resources, failures, room, interruption, show)
        study.stop_waiting_trials()
    finally:
        redraw()
        status.update(at_once=True)
        study.close()
        gauges.close()


class StudyTrials(trials.Trials):
    """The trials of a study that are left, after those that are over."""

    def __init__(self, study: Study, parent: RunDirectory | None, room: Room) -> None:
        super().__init__(study.folder, study.started, study.errors, study.stopping)
        self._study, self._parent, self._room = study, parent, room
        self._ended = [number for number, trial in study.ledger.trials.items() if trial.ended]

    def next(self) -> trials.Settings | str | None:
        study = self._study
        while True:
            if self._ended:
                number: int | None = self._ended.pop(0)
            elif study.active and not self._room.has_place(len(study.active)):
                return None
            else:
                number = study.next_trial()
            if number is None:
                return None if study.active else trials.NO_MORE
            task = study.next_task(number, self._parent)
            if task is not None:
                return task

    def started(self, trial: trials.Settings) -> None:
        if not trial["ended"]:
            self._study.trial_started(trial["number"])

    def reported(self, trial: trials.Settings, result: dict[str, Any]) -> None:
        if UNREACHABLE in result:
            self._study.unreachable[trial["number"]] = result[UNREACHABLE]
        elif "score" in result:
            self._study.report(trial["number"], result["iteration"], result["score"], result["values"])

    def lost(self, trial: trials.Settings, error: str) -> None:
        if not trial["ended"]:
            self._study.trial_lost(trial["number"], error)

    def ended(self, trial: trials.Settings, error: str) -> None:
        if not trial["ended"]:
            self._study.trial_ended(trial["number"], error)
