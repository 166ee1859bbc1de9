"""What runs in the process of a cell: the fork, the training, and the scores."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray import tune

from mpscl_ray.compare.cells import Cell
from mpscl_ray.config import Config
from mpscl_ray.errors import MpsclError, StorageError
from mpscl_ray.evaluate.run import evaluate_phases
from mpscl_ray.runs.control_files import STOP_FILE
from mpscl_ray.runs.fork import fork
from mpscl_ray.runs.run_directory import RunDirectory, open_run
from mpscl_ray.runs.storage import S3Path, join_location
from mpscl_ray.train.ray import trials
from mpscl_ray.train.ray.concurrent import Shared, run_trial
from mpscl_ray.train.ray.launch import Launch
from mpscl_ray.train.ray.one_process import trains_in_one_process
from mpscl_ray.train.ray.resources import evaluation_place

OUTCOME = "outcome"
"""Key of a cell's last report: what became of it, as JSON in bytes."""

_REPORT_S = 30.0
"""Seconds between two reports of how long a cell has run: what a kill loses of its wall time."""


def cell_location(comparison: RunDirectory, name: str) -> Path | S3Path:
    """Run folder of a cell, or its URL."""
    return join_location(comparison.uri, "cells", name)


def train_cell(
    settings: trials.Settings,
    cells: Mapping[str, Cell],
    comparison_uri: str,
    resume_command: str,
    shared: Mapping[str, Shared],
) -> None:
    """The trainable of Ray Tune: reports what :func:`run_cell` returns, and until then how long it has run."""
    name = settings["name"]
    found = run_cell(
        cells[name], tuple(settings["fork"].decode().split()), comparison_uri, resume_command, shared[name]
    )
    dice = found["summary"]["structures"]["mean"]["dice"]["mean"] if found.get("summary") else None
    tune.report({"state": found["state"], "dice": dice, OUTCOME: json.dumps(found).encode()})


def run_cell(
    cell: Cell, fork_point: tuple[str, ...], comparison_uri: str, resume_command: str, shared: Shared
) -> dict[str, Any]:
    """Train a cell and score the end of its last phase.

    Args:
        cell: what to train.
        fork_point: cell and phase to fork from; () for none.
        comparison_uri: address of the comparison's folder, where STOP_FILE asks the cell to stop.
        resume_command: for the cell's status.json.
        shared: of :func:`~mpscl_ray.train.ray.concurrent.open_shared`.

    Returns:
        Fields of :class:`~mpscl_ray.compare.cells.Entry`; an MpsclError is in ``reason`` and not raised: to try again
        would not help.
    """
    started = time.monotonic()
    config, comparison = cell.config, open_run(comparison_uri)
    patience_s = 60 * config.run.storage_retry_minutes
    folder = open_run(cell_location(comparison, cell.name), "command", patience_s)
    phases = [name for name, _ in config.schedule]
    found: dict[str, Any] = {"phase_seconds": {}}
    next_poll, next_report = 0.0, started + _REPORT_S

    def note_phases() -> None:
        for phase in folder.store.finished_phases():
            if phase in phases and phase not in before:
                found["phase_seconds"].setdefault(phase, time.monotonic() - started)

    def poll(training: Launch) -> None:
        nonlocal next_poll, next_report
        now = time.monotonic()
        if now >= next_report:
            next_report = now + _REPORT_S
            tune.report({"seconds": now - started})
        if now < next_poll:
            return
        next_poll = now + folder.store.poll_interval_s
        # The training itself reports a storage that does not answer.
        with suppress(StorageError):
            note_phases()
            if comparison.control_files.read(STOP_FILE) is not None:
                training.request_stop()

    try:
        if fork_point:
            parent, phase = fork_point
            fork(folder, open_run(cell_location(comparison, parent), patience_s=patience_s), phase)
        before = set(folder.store.finished_phases())
        outcome = run_trial(config, folder, shared, poll, resume_command=resume_command, reserved=True)
        note_phases()
        if outcome.state == "finished":
            found |= {"state": "finished", **_scores(folder, config, shared.use_gpu)}
        else:
            found["state"] = "interrupted"
    except MpsclError as error:
        found |= {"state": "failed", "reason": str(error)}
    return {**found, "seconds": time.monotonic() - started}


def _scores(folder: RunDirectory, config: Config, use_gpu: bool) -> dict[str, Any]:
    """Scores at the end of the last phase, and the volumes that they are of.

    A process that has trained itself has the place of a worker, and scores them there.
    """
    phase = config.schedule[-1][0]
    where: dict[str, Any] = {"workers": 0, "device": "cuda" if use_gpu else "cpu"}
    if not trains_in_one_process(config):
        where = {"place": evaluation_place(config, use_gpu)}
    evaluation = evaluate_phases(folder.uri, [phase], progress=False, **where)[phase]
    scored_on = {
        "split": evaluation.split,
        "volumes": len(evaluation.scores),
        "modality": evaluation.modality,
        "dataset": str(evaluation.dataset),
        "protocol": evaluation.protocol,
    }
    return {"summary": evaluation.summary.to_json(), "scored_on": scored_on}
