"""What one Ray Train worker runs: the only user of ``ray.train`` inside a worker."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from torch import Tensor

from mpscl_ray.config import ScalingConfig, config_from_dict
from mpscl_ray.errors import MpsclError, StorageError
from mpscl_ray.runs.atomic_files import write_atomically
from mpscl_ray.runs.control_files import FAILURE_FILE, STOP_FILE, VALIDATION_GATE_FILE
from mpscl_ray.runs.plots import panel, plot_progress
from mpscl_ray.runs.run_directory import RunDirectory, open_run
from mpscl_ray.runs.tensorboard import TensorBoard
from mpscl_ray.train import loop
from mpscl_ray.train.ray.placement_groups import leave_place
from mpscl_ray.train.ray.prometheus import Monitoring
from mpscl_ray.train.streams import TrainingData

log = logging.getLogger(__name__)


def run_worker(
    settings: dict[str, Any], *, folder: str, token: str, data: TrainingData, display_name: str
) -> dict[str, Any]:
    """Train on this worker; returns the outcome as plain values, the same on every worker.

    An error that a restart cannot mend (settings, data, storage) is left in the run folder, where the restarted
    workers find it and end at once: Ray Train restarts on any exception and knows none that is final. Returning
    instead of raising would leave the other workers waiting for this one.

    Args:
        settings: nested plain values of the config.
        folder: path or URL of the run folder.
        token: proves that the command that holds the run has sent the worker.
        data: slices, as handles that each worker opens.
        display_name: name of the run in its metrics.
    """
    rank = ray.train.get_context().get_world_rank()
    config = config_from_dict(settings)
    run = open_run(folder, f"worker-{rank}", 60 * config.run.outage_min)
    run.store.init_worker_dir()
    failure = run.path / FAILURE_FILE
    if failure.exists():
        return {"state": "failed", **json.loads(failure.read_text(encoding="utf-8"))}
    _log_to(run.logs / f"worker-{rank}.log")
    torch.set_num_threads(max(1, int(config.scaling.cpus_per_worker)))
    device = ray.train.torch.get_device()
    observer = _RunObserver(run, data.classes, Monitoring(display_name, rank, device), config.scaling, writes=rank == 0)
    outcome: loop.Outcome | None = None

    def stop_requested() -> bool:
        return (run.path / STOP_FILE).exists() or run.store.sync_error is not None

    try:
        with run.store.worker_lock(token, rank):
            if rank == 0:
                leave_place(run)
            outcome = loop.train(config, data, run, device, observer, stop_requested)
            observer.close()
    except MpsclError as error:
        log.error("%s", error)
        told = {"exit_code": error.exit_code, "reason": str(error)}
        if outcome is not None and error is run.store.sync_error:
            # All workers have ended in order, because worker 0 cannot reach the storage; there is no place to say so.
            return {"state": "failed", **told}
        write_atomically(failure, json.dumps(told).encode())
        run.store.upload(failure)
        raise
    except Exception:
        log.exception("this worker fails")
        raise
    finally:
        observer.close()
    log.info("worker ends: %s", outcome)
    return dataclasses.asdict(outcome)


STOP_THERE = "stop"
"""Behind the global step in VALIDATION_GATE_FILE: the run is to end."""

_DECISION_S = 0.05, 0.5
"""Time between two looks for a decision, on a disk and in a bucket."""


def wait_for_decision(folder: RunDirectory, step: int, patience_s: float = 60.0) -> bool:
    """Wait until it is decided whether a run goes on after a validation; at once where nobody decides.

    Without it a run that has fallen behind others would train on until word of it comes. One that is to end finds the
    wish to stop in its folder when this returns.

    Args:
        folder: of the run.
        step: global step of the validation.
        patience_s: longest wait.

    Returns:
        Whether a decision came; False only after the longest wait.
    """
    deadline = time.monotonic() + patience_s
    while True:
        with suppress(StorageError):  # the run goes on while its storage is away
            told = folder.control_files.read(VALIDATION_GATE_FILE)
            if told is None:
                return True
            decided, _, wish = told.partition(" ")
            if wish == STOP_THERE:
                (folder.path / STOP_FILE).touch()
            if int(decided) >= step:
                return True
            folder.store.flush()  # who decides must see the validation
        if time.monotonic() > deadline:
            return False
        time.sleep(_DECISION_S[folder.store.poll_interval_s > 0])


class _RunObserver(loop.Observer):
    """Exports metrics, and reports validations to Ray Train; worker 0 keeps TensorBoard, curves and notices of the run
    folder up to date."""

    def __init__(
        self,
        folder: RunDirectory,
        classes: tuple[str, ...],
        monitoring: Monitoring,
        scaling: ScalingConfig,
        writes: bool,
    ) -> None:
        self.folder, self.classes, self.monitoring, self.writes = folder, classes, monitoring, writes
        self.scaling = scaling
        self.waits = False
        """Whether somebody decides after each validation if the run goes on."""
        self.board: TensorBoard | None = None

    def started(self, step: int) -> None:
        workers, least, most = ray.train.get_context().get_world_size(), *self.scaling.limits
        log.info("training starts at step %d with %d workers", step, workers)
        if self.writes and least < most:
            self.notice(f"training with {workers} of {least} to {most} workers")
        with suppress(StorageError):  # then nothing is waited for
            self.waits = self.writes and self.folder.control_files.read(VALIDATION_GATE_FILE) is not None
        self.monitoring.saved()
        if self.writes:
            self.board = TensorBoard(self.folder.tensorboard, resume_step=step, warn=self.notice)

    def notice(self, text: str) -> None:
        log.warning("%s", text)
        self.folder.add_warning(text)

    def record(self, record: Mapping[str, Any], validated: bool) -> None:
        self.monitoring.record(record)
        if self.board is not None:
            self.board.record(record)
        if validated:
            if self.writes:
                plot_progress(self.folder.read_metrics(), self.folder.progress_image, self.folder.name)
            # A report makes all workers wait for the controller: only after a validation.
            ray.train.report(dict(record))
            if self.waits:
                self.waits = wait_for_decision(self.folder, record["global_step"])

    def saved(self) -> None:
        self.monitoring.saved()
        if self.writes:
            self.folder.store.flush()

    def panel(self, step: int, images: Tensor, predictions: Tensor, labels: Tensor | None) -> None:
        maps = {"prediction": predictions.numpy()} | ({} if labels is None else {"label": labels.numpy()})
        if self.board is not None:
            self.board.panel(step, "target", panel(images.numpy(), maps, self.classes))

    def close(self) -> None:
        """Close the event file."""
        if self.board is not None:
            self.board.close()


def _log_to(file: Path) -> None:
    """Send this worker's log to a file of the run, with the lines of earlier starts kept."""
    logger = logging.getLogger("mpscl_ray")
    logger.setLevel(logging.INFO)
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter(f"%(asctime)s pid {os.getpid()} %(levelname)s %(message)s"))
    logger.handlers = [handler]
    logger.propagate = False
    logger.info("worker starts: python %s, torch %s", sys.version.split()[0], torch.__version__)
