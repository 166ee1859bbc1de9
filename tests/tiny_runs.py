"""Trainings without Ray on what tests.tiny makes: in this process, or one for each worker of a gloo group."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpscl_ray.config import Config, to_yaml
from mpscl_ray.methods.base import Batch
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train import loop
from mpscl_ray.train.domains import load_domains, model_description
from mpscl_ray.train.loop import Callback
from mpscl_ray.train.outcome import TrainResult
from tests.tiny import local_data, tiny_config


class RecordingCallback(Callback):
    """Remembers what a callback receives."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.warnings: list[str] = []
        self.batches: list[Batch] = []
        self.validated: list[int] = []
        self.panels: list[tuple[int, Tensor, Tensor, Tensor | None]] = []

    def on_start(self, step: int) -> None:
        self.starts.append(step)

    def on_warning(self, text: str) -> None:
        self.warnings.append(text)

    def on_batch(self, batch: Batch) -> None:
        self.batches.append(batch)

    def on_metrics(self, record: Mapping[str, Any], validated: bool) -> None:
        if validated:
            self.validated.append(record["global_step"])

    def on_images(self, step: int, images: Tensor, predictions: Tensor, labels: Tensor | None) -> None:
        self.panels.append((step, images, predictions, labels))


class Spoilt(RecordingCallback):
    """Makes a pixel of the batch of some steps NaN, of each as often as it is named."""

    def __init__(self, *steps: int) -> None:
        super().__init__()
        self.steps, self.step = list(steps), 0

    def on_start(self, step: int) -> None:
        super().on_start(step)
        self.step = step

    def on_batch(self, batch: Batch) -> None:
        self.step += 1
        super().on_batch(batch)
        if self.step in self.steps:
            self.steps.remove(self.step)
            batch.source_image[0, 0, 3, 3] = math.nan


class Killed(BaseException):
    """Stands for the end of the process."""


class Killer(Callback):
    """Kills a run when the metrics of a step have been read, before a checkpoint of that step.

    Args:
        when: whether to kill, for each record.
    """

    def __init__(self, when: Callable[[Mapping[str, Any]], bool]) -> None:
        self.when = when

    def on_metrics(self, record: Mapping[str, Any], validated: bool) -> None:
        if self.when(record):
            raise Killed


_CALLS = itertools.count(1000)


def train(
    config: Config,
    run: Path,
    stop_after: int | None = None,
    callback: Callback | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[TrainResult, RunDirectory]:
    """Train as one worker of those that there are; ``stop_after`` counts the steps of this call.

    The global random states are others at each call, as in another process.
    """
    folder = RunDirectory(run)
    folder.create()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(next(_CALLS))
    steps = itertools.count(1)
    outcome = loop.train(
        config,
        local_data(config),
        folder,
        torch.device("cpu"),
        callback,
        lambda: next(steps) == stop_after,
        poll_interval_s=0,
        dtype=dtype,
    )
    return outcome, folder


def tiny_run(
    folder: Path, source: Path, target: Path, overrides: Sequence[str] = (), stop_after: int | None = None
) -> Path:
    """A run as the train command leaves it, less its evaluation."""
    config = tiny_config(source, target, [*overrides, f"run.name={folder.name}"])
    outcome, run = train(config, folder, stop_after)
    run.write_config(to_yaml(config))
    run.write_model(model_description(config, load_domains(config)[0]))
    position = {"phase": outcome.phase, "iteration": outcome.iteration, "global_step": outcome.step}
    run.write_status("finished" if outcome.state == "finished" else "interrupted", exit_code=0, **position)
    return folder


def train_and_watch(
    config: Config, run: Path, stop_after: int | None, dtype: torch.dtype
) -> tuple[TrainResult, list[list[list[str]]]]:
    """Train; the outcome and, by step and domain, a hash of each slice that was trained on."""
    watcher = RecordingCallback()
    outcome, _ = train(config, run, stop_after, watcher, dtype)
    return outcome, [hashes(batch) for batch in watcher.batches]


def hashes(batch: Batch) -> list[list[str]]:
    """A hash of each slice, its label included, by domain."""

    def of(*tensors: Tensor) -> list[str]:
        rows = zip(*(tensor.numpy() for tensor in tensors), strict=True)
        return [hashlib.sha256(b"".join(array.tobytes() for array in row)).hexdigest()[:16] for row in rows]

    domains = [of(batch.source_image, batch.source_label)]
    return domains if batch.target_image is None else [*domains, of(batch.target_image)]
