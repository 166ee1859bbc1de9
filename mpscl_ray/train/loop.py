"""The training of one worker: phases, checkpoints, validation.

Knows nothing of Ray: a single process, torchrun and Ray run it alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mpscl_ray.config import SOURCE_ONLY, Config, is_adaptation, reads_target
from mpscl_ray.data import TARGET_DOMAIN
from mpscl_ray.data.loader import Slices, collate
from mpscl_ray.data.slice_selection import evenly_spaced
from mpscl_ray.distributed import collectives
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.methods.base import Batch, Method
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train.feature_log import FeatureRecord
from mpscl_ray.train.phases import (
    build_method,
    build_segmenter,
    load_pretrained_weights,
    network_arguments,
    prepare,
    transfer_weights,
)
from mpscl_ray.train.streams import TrainingData, open_streams, training_slices
from mpscl_ray.train.timing import POLL_INTERVAL_S, StopPoller, ThroughputMeter
from mpscl_ray.train.validation import Validation, selection_score, target_criteria, validate

PANEL_SLICES = 4
"""Slices in the panel of image, prediction and label."""


@dataclass
class TrainResult:
    """How training ended.

    Attributes:
        state: finished; interrupted (resumable); or non_finite (resumable from the checkpoint before).
        phase: phase it ended in.
        iteration: iterations of this phase that were done; for non_finite, at the reading that showed it.
        step: the same over all phases.
        losses: component losses of the first non-finite step.
    """

    state: Literal["finished", "interrupted", "non_finite"]
    phase: str
    iteration: int
    step: int
    losses: dict[str, float] = field(default_factory=dict)


@dataclass
class TrainerState:
    """How far a run is: all that a resumed run has to know beside weights, optimisers and random state.

    Attributes:
        phase: number of the phase in the schedule.
        iteration: iterations done in this phase.
        step: iterations done in all phases; also the position in the data.
        best: selection score of the best validation of this phase so far; None before the first.
    """

    phase: int = 0
    iteration: int = 0
    step: int = 0
    best: float | None = None


class Callback:
    """Is told what happens, on every worker at the same points; does nothing unless a method is overridden."""

    def on_start(self, step: int) -> None:
        """Training begins at this step: 0, or that of the checkpoint it goes on from."""

    def on_batch(self, batch: Batch) -> None:
        """The next step trains on this batch."""

    def on_warning(self, text: str) -> None:
        """Worker 0 only: a sentence that whoever runs the training should read."""

    def on_metrics(self, record: Mapping[str, Any], validated: bool) -> None:
        """Metrics were read; ``validated`` if the record has those of a validation."""

    def on_checkpoint(self) -> None:
        """A checkpoint was written from which the run can go on."""

    def on_images(self, step: int, images: Tensor, predictions: Tensor, labels: Tensor | None) -> None:
        """Worker 0 only: some slices (N, H, W) of a validation volume of the target, predicted, and their labels."""


def train(
    config: Config,
    data: TrainingData,
    run: RunDirectory,
    device: torch.device,
    callback: Callback | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    *,
    poll_interval_s: float = POLL_INTERVAL_S,
    dtype: torch.dtype = torch.float32,
) -> TrainResult:
    """Train from the newest intact checkpoint, or from the start, to the end of the last phase.

    Args:
        config: the settings; the batch is divided among the workers of the process group there is.
        data: slices; the same on every worker.
        run: folder on a file system that all workers share; worker 0 writes, all read.
        device: of this worker.
        callback: told of batches, metrics, panels and notices.
        stop_requested: asked on worker 0 now and then; True ends training after a checkpoint.
        poll_interval_s: seconds, about, between two such questions; 0 asks after each step.
        dtype: of the weights, and so of what is computed from the images, which stay in single precision.

    Raises:
        ConfigError: the newest checkpoint is of a phase that the settings do not have.
        DataError: a checkpoint or a dataset is damaged beyond what can be passed over.
        StorageError: a checkpoint cannot be written.
    """
    looks = StopPoller(stop_requested, poll_interval_s)
    return _Training(config, data, run, device, callback or Callback(), looks, dtype).run()


def newest_checkpoint(run: RunDirectory) -> tuple[Path | None, list[str]]:
    """The checkpoint that a run goes on from, and a sentence for each newer one that is damaged.

    Raises:
        DataError: there are checkpoints, and all of them are damaged.
    """
    found, notices = run.store.latest_checkpoint()
    if found is None and notices:
        raise DataError(
            f"every checkpoint in {run.checkpoints} is damaged ({'; '.join(notices)}); put an intact one back, or "
            "start anew with another run.name"
        )
    return found, notices


class _Training:
    """State of one call of :func:`train`."""

    def __init__(
        self,
        config: Config,
        data: TrainingData,
        run: RunDirectory,
        device: torch.device,
        callback: Callback,
        looks: StopPoller,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.data, self.folder, self.device = config, data, run, device
        self.callback, self.looks, self.dtype = callback, looks, dtype
        self.features = FeatureRecord(run.path)
        self.rank, self.world_size = collectives.rank(), collectives.world_size()
        self.position = TrainerState()
        self.schedule = config.schedule
        torch.manual_seed(config.run.seed)

    def run(self) -> TrainResult:
        resumed = self._load_newest()
        self.callback.on_start(self.position.step)
        weights: dict[str, dict[str, Tensor]] = {}
        for number in range(self.position.phase, len(self.schedule)):
            name, iterations = self.schedule[number]
            # A segmenter of its own for each phase: DistributedDataParallel leaves hooks on the parameters it wrapped.
            segmenter = build_segmenter(self.config, len(self.data.classes), name).to(self.dtype)
            if resumed is None and not weights:
                self._notice(load_pretrained_weights(segmenter, self.config))
            method = build_method(self.config, name, segmenter, len(self.data.classes), self.device)
            transfer_weights(method.networks, weights)
            if resumed is not None:
                resumed["method"]["phase"]["iterations"] = iterations  # the decay follows a phase that was made longer
                method.load_state_dict(resumed["method"])
                _restore_random_state(resumed["random"], self.device)
                resumed = None
            else:
                self.position = TrainerState(number, 0, self.position.step)
                method.start_phase(iterations)
                if is_adaptation(name):
                    slices = training_slices(
                        self.config, self.data, self.device, self._pretrained_weights, self.rank, self.world_size
                    )
                    prepare(method, self.config, slices)
                    if self.rank == 0:
                        self.features.rewind(self.position.step - 1)  # a start that was interrupted may have looked
                    self._look_at_features(name, method)
            ended = self._run_phase(name, iterations, method)
            if ended is not None:
                return ended
            self._save(method, name, self.folder.phases / name)
            weights = {network: module.state_dict() for network, module in method.networks.items()}
        last, iterations = self.schedule[-1]
        return TrainResult("finished", last, iterations, self.position.step)

    def _run_phase(self, name: str, iterations: int, method: Method) -> TrainResult | None:
        """Iterations of one phase from where it stands; an outcome only if the run ends here."""
        run, position = self.config.run, self.position
        source, target = open_streams(
            self.config, self.data, method, name, position.step, self.device, self.rank, self.world_size
        )
        clock = ThroughputMeter(position.step, source, target)
        try:
            while position.iteration < iterations:
                labelled = source.next()
                batch = Batch(labelled["image"], labelled["label"], target.next()["image"] if target else None)
                self.callback.on_batch(batch)
                metrics = method.step(batch, position.iteration)
                position.iteration += 1
                position.step += 1
                at_end = position.iteration == iterations
                validating = position.iteration % run.validate_every == 0 or at_end
                saving = position.iteration % run.checkpoint_every == 0 or at_end
                stopping = self.looks.should_stop(position.step)
                if not (position.iteration % run.report_every == 0 or validating or saving or stopping):
                    continue
                record = self._read(name, iterations, metrics, clock)
                if record["train/non_finite"]:
                    losses = collectives.reduce_metrics(method.non_finite_losses())
                    return TrainResult("non_finite", name, position.iteration, position.step, losses)
                if validating:
                    record |= self._validate(name, method)
                if self.rank == 0:
                    self.folder.append_metrics(record)
                self.callback.on_metrics(record, validating)
                if validating:
                    self.looks.poll_soon()  # whoever watches may have made up their mind by what they saw
                if saving or stopping:
                    self._save(method, name, self.folder.checkpoints / checkpoint.checkpoint_name(position.step))
                    self.callback.on_checkpoint()
                if stopping:
                    return TrainResult("interrupted", name, position.iteration, position.step)
                if saving or validating:
                    clock.restart(position.step)
        finally:
            source.close()
            if target:
                target.close()
        return None

    def _notice(self, text: str | None) -> None:
        if self.rank == 0 and text:
            self.callback.on_warning(text)

    def _pretrained_weights(self) -> dict[str, Tensor]:
        """The segmenter's weights at the end of the source-only phase, or where there is none those it began with."""
        if SOURCE_ONLY in (name for name, _ in self.schedule):
            end = checkpoint.load(self.folder.phases / SOURCE_ONLY)
            weights: dict[str, Tensor] = end["method"]["networks"]["segmenter"]
            return weights
        segmenter = build_segmenter(self.config, len(self.data.classes)).to(self.dtype)
        load_pretrained_weights(segmenter, self.config)
        return segmenter.state_dict()

    def _read(
        self, name: str, iterations: int, metrics: Mapping[str, Tensor], clock: ThroughputMeter
    ) -> dict[str, Any]:
        """Wait for the device once and read the metrics of the last step."""
        position = self.position
        values = collectives.reduce_metrics(metrics)
        record: dict[str, Any] = {
            "global_step": position.step,
            "phase": name,
            "iteration": position.iteration,
            "iterations": iterations,
            **{f"train/{key}": value for key, value in values.items()},
        }
        seconds, waited = clock.read(position.step)
        domains = 2 if reads_target(name) else 1
        record["speed/images_per_s"] = domains * self.config.data.batch_size / seconds
        record["speed/data_wait_fraction"] = waited
        return record

    def _validate(self, name: str, method: Method) -> dict[str, Any]:
        """Validate on both domains and keep the weights if they are the best of the phase."""
        results: dict[str, Validation] = {}
        for domain, slices in self.data.validation.items():
            results[domain] = validate(
                method.predict, slices, self.data.classes, self.config.data.batch_size, self.device
            )
        record: dict[str, Any] = {}
        for domain, result in results.items():
            prefix = "val" if domain == TARGET_DOMAIN else f"val/{domain}"
            record |= {f"{prefix}/dice/{structure}": value for structure, value in result.dice.items()}
            if result.dice:
                record[f"{prefix}/dice/mean"] = result.mean_dice
                record[f"{prefix}/loss_cross_entropy"] = result.cross_entropy
            record[f"{prefix}/entropy"] = result.entropy
        record |= {
            f"val/label_free/{name}": value
            for name, value in target_criteria(results, self.config.data.labelled).items()
        }
        self._look_at_features(name, method)
        if self.rank == 0 and TARGET_DOMAIN in self.data.validation:
            self._show_panel(method, self.data.validation[TARGET_DOMAIN])
        score = selection_score(results, self.config.run.select, self.config.data.labelled)
        if score is not None:
            record["val/selection"] = score
            if self.position.best is None or score > self.position.best:
                self.position.best = score
                self._save(method, name, self.folder.best)
        return record

    def _look_at_features(self, name: str, method: Method) -> None:
        if is_adaptation(name):
            place = {"global_step": self.position.step, "phase": name, "iteration": self.position.iteration}
            slices = self.data.validation.get(TARGET_DOMAIN)
            self.features.look(method, slices, self.config.data.batch_size, place)

    def _show_panel(self, method: Method, slices: Slices) -> None:
        """Predict evenly spaced slices of the first volume, the ends left out."""
        _, arrays = next(slices.volumes())
        volume = collate(arrays)
        chosen = torch.from_numpy(evenly_spaced(np.arange(len(volume["image"])), PANEL_SLICES))
        images = volume["image"][chosen]
        predictions = method.predict(images.to(self.device)).argmax(1).cpu()
        labels = volume["label"][chosen] if "label" in volume else None
        self.callback.on_images(self.position.step, images[:, 0], predictions, labels)

    def _save(self, method: Method, phase: str, directory: Path) -> None:
        """Write a checkpoint, after making sure that all workers would write the same."""
        collectives.assert_same_weights(method.networks)
        if self.rank == 0:
            state = {
                "method": method.state_dict(),
                "random": _random_state(self.device),
                "position": dataclasses.asdict(self.position),
                "phase": phase,
                "network": network_arguments(self.config, len(self.data.classes), phase),
                "classes": list(self.data.classes),
                "selected_by": self.config.run.select if directory == self.folder.best else None,
            }
            checkpoint.save(directory, state)
            if directory.parent == self.folder.checkpoints:
                checkpoint.prune(self.folder.checkpoints, self.config.run.keep_checkpoints)
        collectives.barrier()

    def _load_newest(self) -> dict[str, Any] | None:
        """State of the newest intact checkpoint, chosen by worker 0 for all; None for a new run."""
        found: Path | None = None
        if self.rank == 0:
            found, notices = newest_checkpoint(self.folder)
            for notice in notices:
                self._notice(notice)
        name = collectives.broadcast_object(found.name if found else None)
        state: dict[str, Any] | None = None
        if name is not None:
            state = checkpoint.load(self.folder.store.localize(self.folder.checkpoints / name))
            self.position = self._position(state, name)
            place = f"iteration {self.position.iteration} of the phase {state['phase']}"
            self._notice(f"going on from the checkpoint {name}: {place}")
        if self.rank == 0:
            self.folder.rewind_metrics(self.position.step)
            self.features.rewind(self.position.step)
        return state

    def _position(self, state: Mapping[str, Any], name: str) -> TrainerState:
        """Where a checkpoint stands in the schedule, of which other phases may have been added or dropped since."""
        phases = [phase for phase, _ in self.schedule]
        if state["phase"] not in phases:
            raise ConfigError(
                f"the checkpoint {name} is of the phase {state['phase']}, and the settings have only "
                f"{', '.join(phases)}; give that phase its iterations back, or start anew with another run.name"
            )
        return TrainerState(**{**state["position"], "phase": phases.index(state["phase"])})


def _random_state(device: torch.device) -> dict[str, Any]:
    state: dict[str, Any] = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
