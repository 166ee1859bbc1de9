"""The checkpoints of a training: what they hold, and from which one a run resumes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpscl_ray.config import Config
from mpscl_ray.distributed import collectives
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.methods.base import Method
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train.phases import network_arguments


@dataclass
class TrainerState:
    """How far a run is: what a resumed run needs beside weights, optimisers and random state."""

    phase: int = 0
    """Number of the phase in the schedule."""
    iteration: int = 0
    """Iterations done in this phase."""
    step: int = 0
    """Iterations done in all phases; also the position in the data."""
    best: float | None = None
    """Selection score of the best validation of this phase so far; None before the first."""
    first_agreement: float | None = None
    """Class-ratio agreement before the first step of a phase with a guard; None in the others."""
    agreement: float | None = None
    """The same at the last validation."""
    ended: bool = False
    """Whether the guard has ended this phase."""
    lr_factor: float = 1.0
    """Of all learning rates of this phase: below 1 after steps that were not finite."""

    def note_agreement(self, value: float | None) -> None:
        """Keep the agreement that a validation has found; None where it cannot be computed."""
        self.agreement = value
        if self.first_agreement is None:
            self.first_agreement = value

    def harmed(self, guard: float | None) -> bool:
        """Whether the agreement has fallen by more than the guard of the phase allows."""
        if guard is None or self.first_agreement is None or self.agreement is None:
            return False
        return self.first_agreement - self.agreement > guard


def newest_checkpoint(run: RunDirectory) -> tuple[Path | None, list[str]]:
    """The checkpoint that a run resumes from, and a sentence for each newer one that is damaged.

    Raises:
        DataError: there are checkpoints, and all of them are damaged.
    """
    found, warnings = run.store.latest_checkpoint()
    if found is None and warnings:
        raise DataError(
            f"every checkpoint in {run.checkpoints} is damaged ({'; '.join(warnings)}); put an intact one back, or "
            "start from scratch with another run.name"
        )
    return found, warnings


class Checkpointer:
    """Saves and loads checkpoints. Every worker calls it at the same steps; worker 0 writes, all read.

    The state is copied in the training thread; another thread hashes and writes it while training goes on. A kill in
    between loses what a kill before :meth:`save` would have lost. Checkpoints of one step share the file of tensors,
    those of one phase the file of tensors that do not change in it.
    """

    def __init__(self, config: Config, classes: tuple[str, ...], run: RunDirectory, device: torch.device) -> None:
        self.config, self.classes, self.folder, self.device = config, classes, run, device
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._jobs: list[Future[int | None]] = []
        self._snapshot: checkpoint.Snapshot | None = None
        self._step, self._written = -1, Path()
        self._completed: int | None = None

    def save(self, directory: Path, method: Method, phase: str, state: TrainerState) -> None:
        """Begin to write a checkpoint, after making sure that all workers would write the same."""
        again = self._step == state.step
        if not again:
            collectives.assert_same_weights(method.networks)
            self._step = state.step
        if collectives.rank() != 0:
            return
        if not again or self._snapshot is None:
            self._collect(wait=True)  # so that at most one state is kept in memory
            changing = method.state_dict()
            fixed = {key: changing.pop(key) for key in method.fixed_state if key in changing}
            content = {
                "method": changing,
                "fixed": fixed,
                "random": _random_state(self.device),
                "position": dataclasses.asdict(state),
                "phase": phase,
                "network": network_arguments(self.config, len(self.classes), phase),
                "classes": list(self.classes),
                "selected_by": None,
            }
            self._snapshot = checkpoint.Snapshot.take(content)
        snapshot = self._snapshot
        if directory == self.folder.best:
            snapshot = snapshot.replace(selected_by=self.config.run.select)
        self._jobs.append(self._thread.submit(self._write, directory, snapshot, self._written, again))
        self._written = directory

    def poll(self) -> int | None:
        """Step of the newest checkpoint to resume from, if one was completed since the last call. Does not wait.

        Raises:
            StorageError: a checkpoint could not be written.
        """
        self._collect(wait=False)
        completed, self._completed = self._completed, None
        return completed

    def finish(self) -> int | None:
        """Wait until all checkpoints are complete and every worker can read them; the rest as :meth:`poll`, on all."""
        self._collect(wait=True)
        self._step = -1  # what is saved next, by another phase, may be another state of the same step
        return collectives.broadcast_object(self.poll())

    def close(self) -> None:
        """Let a checkpoint in work be completed, whatever ended the training."""
        self._thread.shutdown(wait=True)

    def _collect(self, *, wait: bool) -> None:
        """Take the results of the checkpoints that are complete, or of all."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            if wait or job.done():
                step = job.result()
                self._completed = self._completed if step is None else step
            else:
                self._jobs.append(job)
        if not self._jobs:
            self._snapshot = None

    def _write(self, directory: Path, snapshot: checkpoint.Snapshot, before: Path, same_step: bool) -> int | None:
        """Write a checkpoint after ``before``, perhaps of the same step; returns its step if a run resumes from it."""
        checkpoint.write(directory, snapshot, same_tensors=before if same_step else None, before=before)
        if directory.parent != self.folder.checkpoints:
            return None
        checkpoint.prune(self.folder.checkpoints, self.config.run.keep_checkpoints, intact=directory)
        return checkpoint.step_of(directory)

    def load_newest(self, warn: Callable[[str], None]) -> tuple[dict[str, Any], TrainerState] | None:
        """The newest intact checkpoint, chosen by worker 0 for all; None for a new run.

        Worker 0 calls ``warn`` with a sentence for each damaged checkpoint, and with one on what is resumed.

        Raises:
            ConfigError: it is of a phase that the settings do not have.
            DataError: all are damaged.
        """
        found: Path | None = None
        if collectives.rank() == 0:
            found, warnings = newest_checkpoint(self.folder)
            for warning in warnings:
                warn(warning)
        name = collectives.broadcast_object(found.name if found else None)
        if name is None:
            return None
        self._written = self.folder.store.localize(self.folder.checkpoints / name)
        content = checkpoint.load(self._written)
        state = self._state(content, name)
        if collectives.rank() == 0:
            warn(f"resuming from the checkpoint {name}: iteration {state.iteration} of the phase {content['phase']}")
        return content, state

    def restore(self, content: Mapping[str, Any], method: Method, iterations: int) -> None:
        """Load method and random state of a checkpoint, for a phase that may have become longer or shorter since."""
        content["method"]["phase"]["iterations"] = iterations
        method.load_state_dict({**content["method"], **content.get("fixed", {})})
        torch.set_rng_state(content["random"]["torch"])
        if "cuda" in content["random"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(content["random"]["cuda"], self.device)

    def _state(self, content: Mapping[str, Any], name: str) -> TrainerState:
        """State of a checkpoint within the schedule, which may have gained or lost other phases since."""
        phases = [phase for phase, _ in self.config.schedule]
        if content["phase"] not in phases:
            raise ConfigError(
                f"the checkpoint {name} is of the phase {content['phase']}, and the settings have only "
                f"{', '.join(phases)}; give that phase its iterations back, or start from scratch with another run.name"
            )
        return TrainerState(**{**content["position"], "phase": phases.index(content["phase"])})


def _random_state(device: torch.device) -> dict[str, Any]:
    state: dict[str, Any] = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state
