"""What one Ray Train worker runs: the only user of ``ray.train`` inside a worker."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch

from mpscl_ray.config import Config, config_from_dict
from mpscl_ray.distributed import collectives
from mpscl_ray.errors import MpsclError, StorageError
from mpscl_ray.methods.base import Batch
from mpscl_ray.runs import safe_json
from mpscl_ray.runs.atomic_files import write_atomically
from mpscl_ray.runs.control_files import FAILURE_FILE, STOP_FILE, VALIDATION_GATE_FILE
from mpscl_ray.runs.run_directory import RunDirectory, open_run
from mpscl_ray.train import loop
from mpscl_ray.train.outcome import TrainResult
from mpscl_ray.train.ray.account import CheckpointReports
from mpscl_ray.train.ray.datasets import take_shards
from mpscl_ray.train.ray.hanging import StepWatch
from mpscl_ray.train.ray.placement_groups import record_placement_group
from mpscl_ray.train.ray.preemption import PreemptionNotice
from mpscl_ray.train.ray.prometheus import Monitoring
from mpscl_ray.train.run_callback import RunCallback

log = logging.getLogger(__name__)


def run_worker(
    settings: dict[str, Any], *, folder: str, token: str, datasets: Sequence[str], display_name: str
) -> dict[str, Any]:
    """Train on this worker; returns the result as plain values, the same on every worker.

    An error that no restart can fix (settings, data, storage) is written into the run folder, where the restarted
    workers find it and end at once, because Ray Train restarts on any exception. Returning instead of raising would
    leave the other workers waiting for this one.

    Args:
        folder: path or URL of the run folder.
        token: proves that the command with the lock of the run started the worker.
        datasets: names of the trainer's datasets.
        display_name: name of the run in its metrics.
    """
    rank = ray.train.get_context().get_world_rank()
    config = config_from_dict(settings)
    run = open_run(folder, f"worker-{rank}", 60 * config.run.storage_retry_minutes)
    run.store.init_worker_dir()
    failure = run.path / FAILURE_FILE
    if failure.exists():
        return {"state": "failed", **safe_json.read_object(failure)}
    log_to(run.logs / f"worker-{rank}.log")
    torch.set_num_threads(max(1, int(config.scaling.cpus_per_worker)))
    device = ray.train.torch.get_device()
    data = take_shards(config, datasets)
    callback = WorkerCallback(
        run, config, data.classes, Monitoring(display_name, rank, device), CheckpointReports(rank), rank == 0
    )
    result: TrainResult | None = None

    def stop_requested() -> bool:
        return (run.path / STOP_FILE).exists() or run.store.sync_error is not None

    try:
        with run.store.worker_lock(token, rank):
            if rank == 0:
                record_placement_group(run)
            notice = PreemptionNotice(callback.on_warning if rank == 0 else log.warning)
            result = loop.train(config, data, run, device, callback, stop_requested, notice)
            callback.close()
    except MpsclError as error:
        log.error("%s", error)
        content = {"exit_code": error.exit_code, "reason": str(error)}
        if result is not None and error is run.store.sync_error:
            # All workers ended in order because worker 0 cannot reach the storage, so it cannot write there either.
            return {"state": "failed", **content}
        write_atomically(failure, json.dumps(content).encode())
        run.store.upload(failure)
        raise
    except Exception as error:
        log.exception("this worker fails")
        no_answer = callback.watch.explain(error)
        if no_answer is not None:
            raise no_answer from error
        raise
    finally:
        callback.close()
    log.info("worker ends: %s", result)
    return dataclasses.asdict(result)


STOP_THERE = "stop"
"""After the global step in VALIDATION_GATE_FILE: the run should stop."""

_DECISION_S = 0.05, 0.5
"""Poll interval for a decision, on a disk and in a bucket."""


def wait_for_decision(folder: RunDirectory, step: int, patience_s: float = 60.0) -> bool:
    """Wait until the scheduler has decided on a validation; returns at once for a run without a scheduler.

    Without the wait a run that should be stopped would train on until the decision arrives. When this returns, a run
    that should stop has STOP_FILE in its folder. ``step`` is the global step of the validation.

    Returns:
        Whether a decision arrived; False only after ``patience_s``.
    """
    deadline = time.monotonic() + patience_s
    while True:
        with suppress(StorageError):  # training continues during an outage of the storage
            decision = folder.control_files.read(VALIDATION_GATE_FILE)
            if decision is None:
                return True
            decided, _, verdict = decision.partition(" ")
            if verdict == STOP_THERE:
                (folder.path / STOP_FILE).touch()
            if int(decided) >= step:
                return True
            folder.store.flush()  # the scheduler must see the validation
        if time.monotonic() > deadline:
            return False
        time.sleep(_DECISION_S[folder.store.poll_interval_s > 0])


class WorkerCallback(RunCallback):
    """Exports metrics and reports checkpoints to Ray Train; worker 0 writes TensorBoard, curves and warnings.

    Args:
        reports: to Ray Train; None where it does not run.
    """

    def __init__(
        self,
        folder: RunDirectory,
        config: Config,
        classes: tuple[str, ...],
        monitoring: Monitoring,
        reports: CheckpointReports | None,
        writes: bool,
    ) -> None:
        super().__init__(folder, config, classes, writes)
        self.monitoring, self.scaling, self.reports = monitoring, config.scaling, reports
        self.watch = StepWatch(folder.logs / f"worker-{collectives.rank()}.log", config.scaling.collective_timeout_s)
        self.waits = False
        """Whether a scheduler decides after each validation if the run continues."""

    def on_start(self, step: int) -> None:
        least, most = self.scaling.limits
        workers = collectives.world_size()
        log.info("training starts at step %d with %d workers", step, workers)
        if self.writes and least < most:
            self.on_warning(f"training with {workers} of {least} to {most} workers")
        with suppress(StorageError):  # then there is no wait
            self.waits = self.writes and self.folder.control_files.read(VALIDATION_GATE_FILE) is not None
        self.monitoring.saved()
        if step > 0 and self.reports is not None:
            self.reports.resumed(step)
        self.watch.start(step)
        super().on_start(step)

    def on_batch(self, batch: Batch) -> None:
        self.watch.step_begins()

    def on_warning(self, text: str) -> None:
        log.warning("%s", text)
        super().on_warning(text)

    def on_metrics(self, record: Mapping[str, Any], validated: bool) -> None:
        self.monitoring.record(record)
        super().on_metrics(record, validated)
        if validated:
            if self.reports is not None:
                self.reports.validated(record)
            if self.waits:
                self.waits = wait_for_decision(self.folder, record["global_step"])

    def close(self) -> None:
        self.watch.close()
        self.monitoring.close()
        super().close()

    def on_checkpoint(self, step: int) -> None:
        self.monitoring.saved()
        stored = not self.writes or self.folder.store.flush()
        if self.reports is not None:
            self.reports.completed(step, stored)


def log_to(file: Path) -> logging.Logger:
    """Append this process's log to a file of the run; returns the logger."""
    logger = logging.getLogger("mpscl_ray")
    logger.setLevel(logging.INFO)
    for previous in logger.handlers:  # of another training in this process
        previous.close()
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter(f"%(asctime)s pid {os.getpid()} %(levelname)s %(message)s"))
    logger.handlers = [handler]
    logger.propagate = False
    logger.info("worker starts: python %s, torch %s", sys.version.split()[0], torch.__version__)
    return logger
