"""A fit that computes nothing and leaves what a training leaves: for tests of what runs trainings, not of training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from mpscl_ray.config import SOURCE_ONLY, Config, is_adaptation
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.control_files import STOP_FILE
from mpscl_ray.runs.run_directory import RunDirectory, open_run
from mpscl_ray.train.checkpointing import newest_checkpoint
from mpscl_ray.train.phases import build_segmenter, network_arguments
from mpscl_ray.train.ray.worker import wait_for_decision
from mpscl_ray.train.streams import TrainingData
from mpscl_ray.tune.criteria import CRITERIA

TOO_LARGE = 1e30
"""A contrastive weight or learning rate from which on the loss is not finite."""


def quality(config: Config) -> float:
    """Score of a run at its end: the larger weight and margin of the contrast, the better."""
    gamma, margin = (getattr(config.method, name, 0.0) for name in ("gamma", "margin_source"))
    return float(0.2 + gamma / (1 + gamma) / 2 + margin / 10)


def fit(
    config: Config,
    folder: RunDirectory,
    data: TrainingData,
    use_gpu: bool,
    display_name: str,
    *,
    seconds_a_step: float = 0.0,
) -> dict[str, Any]:
    """Write metrics, checkpoints and the log of worker 0, from the newest checkpoint to the end or a stop."""
    run = open_run(folder.uri, "worker-0", 60 * config.run.storage_retry_minutes)
    run.store.init_worker_dir()
    with run.store.worker_lock(folder.store.fencing_token, 0):
        return _Stub(config, run, data, seconds_a_step).run()


class _Stub:
    def __init__(self, config: Config, run: RunDirectory, data: TrainingData, seconds_a_step: float) -> None:
        self.config, self.folder, self.classes, self.seconds_a_step = config, run, data.classes, seconds_a_step
        self.schedule = config.schedule
        found, _ = newest_checkpoint(run)
        self.position: dict[str, Any] = {"phase": 0, "iteration": 0, "step": 0, "best": None}
        if found is not None:
            self.position = dict(checkpoint.load(found)["position"])
        run.rewind_metrics(self.position["step"])
        with (run.logs / "worker-0.log").open("a") as log:
            log.write(f"training starts at step {self.position['step']} with 1 workers\n")

    def run(self) -> dict[str, Any]:
        for number in range(self.position["phase"], len(self.schedule)):
            name, iterations = self.schedule[number]
            if number != self.position["phase"]:
                self.position |= {"phase": number, "iteration": 0}
            while self.position["iteration"] < iterations:
                state = self.step(name, iterations)
                if state is not None:
                    losses = {"loss_cross_entropy_main": float("nan")} if state == "non_finite" else {}
                    return self.outcome(state, name) | {"losses": losses}
            self.save(name, self.folder.phases / name)
        return self.outcome("finished", self.schedule[-1][0])

    def outcome(self, state: str, phase: str) -> dict[str, Any]:
        return {"state": state, "phase": phase, "iteration": self.position["iteration"], "step": self.position["step"]}

    def step(self, name: str, iterations: int) -> str | None:
        """One iteration; how the run ends with it, if it does."""
        time.sleep(self.seconds_a_step)
        for key in ("iteration", "step"):
            self.position[key] += 1
        weight = getattr(self.config.method, "gamma", 0.0) if is_adaptation(name) else 0.0
        first_lr = self.config.phases.source_only_lr
        lr = first_lr if name == SOURCE_ONLY and first_lr is not None else self.config.optim.lr
        if max(weight, lr) >= TOO_LARGE:
            return "non_finite"
        iteration, run = self.position["iteration"], self.config.run
        at_end = iteration == iterations
        validating = iteration % run.validate_every == 0 or at_end
        saving = iteration % run.checkpoint_every == 0 or at_end
        if iteration % run.log_every == 0 or validating or saving:
            self.folder.append_metrics(self.record(name, iterations, validating))
        if validating:
            wait_for_decision(self.folder, self.position["step"])
        stopping = (self.folder.path / STOP_FILE).exists()
        if saving or stopping:
            self.save(name, self.folder.checkpoints / checkpoint.checkpoint_name(self.position["step"]))
            self.folder.store.flush()
        return "interrupted" if stopping else None

    def record(self, name: str, iterations: int, validating: bool) -> dict[str, Any]:
        iteration = self.position["iteration"]
        record = {
            "global_step": self.position["step"],
            "phase": name,
            "iteration": iteration,
            "iterations": iterations,
            "train/loss_segmentation": 1.0 / self.position["step"],
        }
        if not validating:
            return record
        score = quality(self.config) * iteration / iterations
        dice = {
            f"{prefix}/dice/{name}": score for prefix in ("val", "val/source") for name in (*self.classes[1:], "mean")
        }
        criteria = {f"val/unsupervised/{name}": score for name in CRITERIA}
        return record | dice | criteria | {"val/entropy": 0.1}

    def save(self, phase: str, directory: Path) -> None:
        torch.manual_seed(self.config.run.seed)
        state = {
            "method": {"networks": {"segmenter": build_segmenter(self.config, len(self.classes), phase).state_dict()}},
            "position": self.position,
            "phase": phase,
            "network": network_arguments(self.config, len(self.classes), phase),
            "classes": list(self.classes),
            "selected_by": None,
        }
        checkpoint.save(directory, state)
        if directory.parent == self.folder.checkpoints:
            checkpoint.prune(self.folder.checkpoints, self.config.run.keep_checkpoints)
