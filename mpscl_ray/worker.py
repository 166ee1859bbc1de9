"""What one Ray Train worker runs: the only user of ``ray.train`` inside a worker."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.util.placement_group import get_current_placement_group
from torch import Tensor

from mpscl_ray import training
from mpscl_ray.config import config_from_dict
from mpscl_ray.durable_files import write_atomically
from mpscl_ray.errors import ClusterError, MpsclError
from mpscl_ray.monitoring import Monitoring
from mpscl_ray.plots import panel, plot_progress
from mpscl_ray.progress import TensorBoard
from mpscl_ray.run_folder import RunFolder
from mpscl_ray.training_data import TrainingData

log = logging.getLogger(__name__)

STOP_FILE = "stop-requested"
"""Name of the file in the run folder that asks the workers to write a checkpoint and end."""

FAILURE_FILE = "failure.json"
"""Name of the file in the run folder in which a worker leaves an error that no restart will mend."""

NOTICES_FILE = "notices.log"
"""Name of the file in the run's logs that has, a line each, what the user should see of workers and their losses."""

PLACE_FILE = ".placement-group"
"""Name of the file in the run folder that names the placement group of the workers, while they have one."""

_FORMER_WORKER_S = 60.0
"""So long may a worker take to end after the command that started it was killed."""


def run_worker(settings: dict[str, Any], *, folder: str, data: TrainingData) -> dict[str, Any]:
    """Train on this worker; returns the outcome as plain values, the same on every worker.

    An error that a restart cannot mend (settings, data, storage) is left in the run folder, where the restarted
    workers find it and end at once: Ray Train restarts on any exception and knows none that is final. Returning
    instead of raising would leave the other workers waiting for this one.

    Args:
        settings: nested plain values of the config.
        folder: path of the run folder.
        data: slices, as handles that each worker opens.
    """
    run = RunFolder(Path(folder))
    failure = run.path / FAILURE_FILE
    if failure.exists():
        return {"state": "failed", **json.loads(failure.read_text(encoding="utf-8"))}
    rank = ray.train.get_context().get_world_rank()
    config = config_from_dict(settings)
    _log_to(run.logs / f"worker-{rank}.log")
    torch.set_num_threads(max(1, int(config.scaling.cpus_per_worker)))
    device = ray.train.torch.get_device()
    observer = _RunObserver(run, data.classes, Monitoring(run.name, rank, device), writes=rank == 0)
    try:
        with _only_writer(run) if rank == 0 else nullcontext():
            outcome = training.train(config, data, run, device, observer, stop_requested=(run.path / STOP_FILE).exists)
    except MpsclError as error:
        log.error("%s", error)
        write_atomically(failure, json.dumps({"exit_code": error.exit_code, "reason": str(error)}).encode())
        raise
    except Exception:
        log.exception("this worker fails")
        raise
    finally:
        observer.close()
    log.info("worker ends: %s", outcome)
    return dataclasses.asdict(outcome)


@contextmanager
def _only_writer(folder: RunFolder) -> Iterator[None]:
    """Hold the right to write checkpoints; the system takes it from a process that ends, however it ends.

    A command that is killed gives its run free at once, but on a cluster its workers live on for some seconds.

    Raises:
        ClusterError: another worker goes on holding it.
    """
    with (folder.path / ".worker-lock").open("a+", encoding="utf-8") as file:
        deadline = time.monotonic() + _FORMER_WORKER_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise ClusterError(
                        f"a worker of an earlier start ({file.read().strip()}) still trains the run {folder.path}; end "
                        "it, or wait until the cluster has, and give the same command again"
                    ) from None
                time.sleep(0.5)
            except OSError:
                break  # Some network file systems have no locks.
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        group = get_current_placement_group()
        if group is not None:
            write_atomically(folder.path / PLACE_FILE, group.id.hex().encode())
        yield


def add_notice(folder: RunFolder, text: str) -> None:
    """Leave a sentence for the terminal of the command that runs the training."""
    with (folder.logs / NOTICES_FILE).open("a", encoding="utf-8") as stream:
        stream.write(" ".join(text.split()) + "\n")


class _RunObserver(training.Observer):
    """Exports metrics, and reports validations to Ray Train; worker 0 keeps TensorBoard, curves and notices of the run
    folder up to date."""

    def __init__(self, folder: RunFolder, classes: tuple[str, ...], monitoring: Monitoring, writes: bool) -> None:
        self.folder, self.classes, self.monitoring, self.writes = folder, classes, monitoring, writes
        self.board: TensorBoard | None = None

    def started(self, step: int) -> None:
        log.info("training starts at step %d", step)
        self.monitoring.saved()
        if self.writes:
            self.board = TensorBoard(self.folder.tensorboard, resume_step=step, notice=self.notice)

    def notice(self, text: str) -> None:
        log.warning("%s", text)
        add_notice(self.folder, text)

    def record(self, record: Mapping[str, Any], validated: bool) -> None:
        self.monitoring.record(record)
        if self.board is not None:
            self.board.record(record)
        if validated:
            if self.writes:
                plot_progress(self.folder.read_metrics(), self.folder.progress_image, self.folder.name)
            # A report makes all workers wait for the controller: only after a validation.
            ray.train.report(dict(record))

    def saved(self) -> None:
        self.monitoring.saved()

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
