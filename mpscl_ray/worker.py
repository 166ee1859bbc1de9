"""What one Ray Train worker runs: the only user of ``ray.train`` inside a worker."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from torch import Tensor

from mpscl_ray import training
from mpscl_ray.config import config_from_dict
from mpscl_ray.durable_files import write_atomically
from mpscl_ray.errors import MpsclError
from mpscl_ray.plots import panel, plot_progress
from mpscl_ray.progress import TensorBoard
from mpscl_ray.run_folder import RunFolder

log = logging.getLogger(__name__)

STOP_FILE = "stop-requested"
"""Name of the file in the run folder that asks the workers to write a checkpoint and end."""

FAILURE_FILE = "failure.json"
"""Name of the file in the run folder in which a worker leaves an error that no restart will mend."""

NOTICES_FILE = "notices.log"
"""Name of the file in the run's logs that has, a line each, what the user should see of workers and their losses."""


@dataclass(frozen=True)
class WorkerTask:
    """What the driver hands to each worker.

    Attributes:
        config: nested plain values of the config.
        folder: run folder.
        data: slices, as handles that each worker opens.
    """

    config: dict[str, Any]
    folder: str
    data: training.TrainingData


def run_worker(task: WorkerTask) -> dict[str, Any]:
    """Train on this worker; returns the outcome as plain values, the same on every worker.

    An error that a restart cannot mend (settings, data, storage) is left in the run folder, where the restarted
    workers find it and end at once: Ray Train restarts on any exception and knows none that is final. Returning
    instead of raising would leave the other workers waiting for this one.
    """
    folder = RunFolder(Path(task.folder))
    failure = folder.path / FAILURE_FILE
    if failure.exists():
        return {"state": "failed", **json.loads(failure.read_text(encoding="utf-8"))}
    rank = ray.train.get_context().get_world_rank()
    config = config_from_dict(task.config)
    _log_to(folder.logs / f"worker-{rank}.log")
    torch.set_num_threads(max(1, int(config.scaling.cpus_per_worker)))
    device = ray.train.torch.get_device()
    if isinstance(device, list):
        device = device[0]

    observer = _RunObserver(folder, task.data.classes, writes=rank == 0)
    try:
        outcome = training.train(
            config, task.data, folder, device, observer, stop_requested=(folder.path / STOP_FILE).exists
        )
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


def add_notice(folder: RunFolder, text: str) -> None:
    """Leave a sentence for the terminal of the command that runs the training."""
    with (folder.logs / NOTICES_FILE).open("a", encoding="utf-8") as stream:
        stream.write(" ".join(text.split()) + "\n")


class _RunObserver(training.Observer):
    """Reports validations to Ray Train; worker 0 keeps TensorBoard, curves and notices of the run folder up to date."""

    def __init__(self, folder: RunFolder, classes: tuple[str, ...], writes: bool) -> None:
        self.folder, self.classes, self.writes = folder, classes, writes
        self.board: TensorBoard | None = None

    def started(self, step: int) -> None:
        log.info("training starts at step %d", step)
        if self.writes:
            self.board = TensorBoard(self.folder.tensorboard, resume_step=step, notice=self.notice)

    def notice(self, text: str) -> None:
        log.warning("%s", text)
        add_notice(self.folder, text)

    def record(self, record: Mapping[str, Any], validated: bool) -> None:
        if self.board is not None:
            self.board.record(record)
        if validated:
            if self.writes:
                plot_progress(self.folder.read_metrics(), self.folder.progress_image, self.folder.name)
            # A report makes all workers wait for the controller: only after a validation.
            ray.train.report(dict(record))

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
