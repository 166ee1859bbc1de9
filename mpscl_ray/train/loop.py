"""The training of one worker: phases, validation, checkpoints.

It knows nothing of Ray: a single process, torchrun and Ray all run it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpscl_ray.config import Config, is_adaptation, reads_target
from mpscl_ray.data import TARGET_DOMAIN
from mpscl_ray.data.loader import collate
from mpscl_ray.data.slice_selection import evenly_spaced
from mpscl_ray.data.slices import Slices
from mpscl_ray.distributed import collectives
from mpscl_ray.errors import TrainingError
from mpscl_ray.methods.base import Batch, Method, TrainingSlices
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train.checkpointing import Checkpointer, TrainerState
from mpscl_ray.train.feature_log import FeatureRecord
from mpscl_ray.train.notices import Notices, lost_shares
from mpscl_ray.train.out_of_memory import describe_out_of_memory, is_out_of_memory
from mpscl_ray.train.outcome import TrainResult
from mpscl_ray.train.phases import (
    build_method,
    build_segmenter,
    load_pretrained_weights,
    source_only_weights,
    transfer_weights,
)
from mpscl_ray.train.profiling import profiled_steps
from mpscl_ray.train.streams import TrainingData, batch_of, open_streams, training_slices
from mpscl_ray.train.timing import POLL_INTERVAL_S, Poller, ThroughputMeter
from mpscl_ray.train.validation import Validation, selection_score, validate, validation_metrics

IMAGE_SLICES = 4
"""Slices that are shown as image, prediction and label."""


class Callback:
    """Called on every worker at the same points; a method that is not overridden does nothing."""

    def on_start(self, step: int) -> None:
        """Training starts at this step: 0, or that of the checkpoint it resumes from."""

    def on_batch(self, batch: Batch) -> None:
        """The next step trains on this batch."""

    def on_warning(self, text: str) -> None:
        """Worker 0 only: a sentence for the user."""

    def on_metrics(self, record: Mapping[str, Any], validated: bool) -> None:
        """Metrics were read; ``validated`` if the record has those of a validation."""

    def on_checkpoint(self, step: int) -> None:
        """The checkpoint of this step was completed, from which the run can resume."""

    def on_images(self, step: int, images: Tensor, predictions: Tensor, labels: Tensor | None) -> None:
        """Worker 0 only: some slices (N, H, W) of a validation volume of the target, predictions and labels."""


def train(
    config: Config,
    data: TrainingData,
    run: RunDirectory,
    device: torch.device,
    callback: Callback | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    save_requested: Callable[[], bool] = lambda: False,
    *,
    poll_interval_s: float = POLL_INTERVAL_S,
    dtype: torch.dtype = torch.float32,
) -> TrainResult:
    """Train from the newest intact checkpoint, or from the start, to the end of the last phase.

    Args:
        config: the settings; the batch is divided among the workers of the process group.
        run: folder on a file system that all workers share; worker 0 writes, all read.
        stop_requested: polled on worker 0; True ends training after a checkpoint.
        save_requested: polled on all workers at the same steps, with the same answer; True writes a checkpoint.
        poll_interval_s: approximate seconds between two polls; 0 polls after each step.
        dtype: of the weights, and so of what is computed from the images, which stay in single precision.

    Raises:
        ConfigError: the newest checkpoint is of a phase that the settings do not have.
        DataError: a dataset or all checkpoints are damaged.
        StorageError: a checkpoint cannot be written.
        TrainingError: the weights of the workers differ, or the memory of a worker does not suffice.
    """
    requests = stop_requested, save_requested
    trainer = _Trainer(config, data, run, device, callback or Callback(), *requests, poll_interval_s, dtype)
    try:
        return trainer.run()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        state, rank = trainer.state, trainer.rank
        phase = config.schedule[state.phase][0]
        raise TrainingError(describe_out_of_memory(config, error, rank, phase, state.step)) from error
    finally:
        trainer.checkpointer.close()


@dataclass
class _Trainer:
    """State of one call of :func:`train`."""

    config: Config
    data: TrainingData
    folder: RunDirectory
    device: torch.device
    callback: Callback
    stop_requested: Callable[[], bool]
    save_requested: Callable[[], bool]
    poll_interval_s: float
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.checkpointer = Checkpointer(self.config, self.data.classes, self.folder, self.device)
        self.features = FeatureRecord(self.folder.path, images=self.config.run.images)
        self.rank, self.world_size = collectives.rank(), collectives.world_size()
        self.num_classes = len(self.data.classes)
        self.state = TrainerState()
        self.notices = Notices()
        # Whether to stop, and the step of a checkpoint that is complete now.
        self.poller = Poller(lambda: [self.stop_requested(), self.checkpointer.poll()], self.poll_interval_s)
        self.lowered: set[str] = set()
        """Phases that continue with lower learning rates after steps that were not finite."""

    def run(self) -> TrainResult:
        while True:
            result = self._train_phases()
            if result.state != "non_finite" or not self._lower_rates(result):
                return result

    def _lower_rates(self, result: TrainResult) -> bool:
        """Whether to go back to the newest checkpoint with lower learning rates: once in a phase."""
        factor = self.config.optim.retry_lr_factor
        if factor is None or result.retried:
            return False
        self.lowered.add(result.phase)
        self.poller.poll_soon()
        self._warn(
            f"{result.describe_non_finite()}: training goes back to the newest checkpoint and continues this phase "
            f"with learning rates times optim.retry_lr_factor={factor:g}"
        )
        return True

    def _train_phases(self) -> TrainResult:
        torch.manual_seed(self.config.run.seed)
        self.state = TrainerState()
        resumed = self._load_newest()
        self.callback.on_start(self.state.step)
        weights: dict[str, dict[str, Tensor]] = {}
        schedule = self.config.schedule
        for number in range(self.state.phase, len(schedule)):
            name, iterations = schedule[number]
            if resumed is None:
                self.state = TrainerState(number, 0, self.state.step)
            if name in self.lowered:
                self.state.lr_factor = self.config.optim.retry_lr_factor or 1.0
            # Each phase has a new segmenter: DistributedDataParallel leaves hooks on the parameters it wrapped.
            segmenter = build_segmenter(self.config, self.num_classes, name).to(self.dtype)
            if resumed is None and not weights:
                self._warn(load_pretrained_weights(segmenter, self.config))
            rates = self.state.lr_factor
            method = build_method(self.config, name, segmenter, self.num_classes, self.device, rates)
            transfer_weights(method.networks, weights)
            if resumed is not None:
                self.checkpointer.restore(resumed, method, iterations)
                resumed = None
            else:
                method.start_phase(iterations)
                if is_adaptation(name):
                    self._prepare_adaptation(name, method)
                if method.guard is not None:
                    self._log(self._position(name, iterations) | self._score(name, method), validated=True)
            ended = self._run_phase(name, iterations, method)
            if ended is None:
                self.checkpointer.save(self.folder.phases / name, method, name, self.state)
            self._completed(self.checkpointer.finish())
            if ended is not None:
                return ended
            weights = {network: module.state_dict() for network, module in method.networks.items()}
        return TrainResult("finished", schedule[-1][0], self.state.iteration, self.state.step)

    def _load_newest(self) -> dict[str, Any] | None:
        """The newest checkpoint, with the records rewound to it; None for a new run."""
        content: dict[str, Any] | None = None
        newest = self.checkpointer.load_newest(self._warn)
        if newest is not None:
            content, self.state = newest
        if self.rank == 0:
            # Of the next phase, which is begun again, there may be a validation at the same step.
            self.folder.rewind_metrics(self.state.step, content["phase"] if content else "")
            self.features.rewind(self.state.step)
        return content

    def _training_slices(self) -> TrainingSlices:
        weights = functools.partial(source_only_weights, self.config, self.num_classes, self.folder, self.dtype)
        return training_slices(self.config, self.data, self.device, weights, self.rank, self.world_size)

    def _prepare_adaptation(self, name: str, method: Method) -> None:
        method.prepare(self._training_slices())
        if self.rank == 0:
            self.features.rewind(self.state.step - 1)  # an interrupted start may have recorded already
        self._record_features(name, method)

    def _run_phase(self, name: str, iterations: int, method: Method) -> TrainResult | None:
        """The iterations of a phase that are left; a result only if the run ends within them."""
        run, state = self.config.run, self.state
        source, target = open_streams(
            self.config, self.data, method, name, state.step, self.device, self.rank, self.world_size
        )
        meter = ThroughputMeter(state.step, source, target)
        steps = run.profile if self.rank == 0 else 0
        profiler = profiled_steps(self.folder.path, name, steps, self.device)
        with source, target or nullcontext(), profiler as step_done:
            while state.iteration < iterations and not state.ended:
                labelled = source.next()
                batch = batch_of(labelled, target.next() if target else {})
                self.callback.on_batch(batch)
                metrics = method.step(batch, state.iteration)
                step_done()
                state.iteration += 1
                state.step += 1
                at_end = state.iteration == iterations
                validating = state.iteration % run.validate_every == 0 or at_end
                saving = state.iteration % run.checkpoint_every == 0 or at_end
                stopping, asked_to_save = self._poll()
                saving |= asked_to_save
                if not (state.iteration % run.log_every == 0 or validating or saving or stopping):
                    continue
                record = self._read_metrics(name, iterations, metrics | method.diagnostics(), meter)
                # The step before may have ruined the weights: no phase ends so, and no checkpoint is written.
                skipped = record["train/non_finite"] > 0
                if record["train/skipped_steps"] > method.may_skip or (skipped and at_end):
                    losses = collectives.reduce_metrics(method.non_finite_losses())
                    retried = state.lr_factor < 1
                    return TrainResult("non_finite", name, state.iteration, state.step, losses, retried)
                for sentence in self.notices.of_metrics(record):
                    self._warn(sentence)
                if at_end and is_adaptation(name):
                    method.end_phase(self._training_slices())
                if validating:
                    record |= self._validate(name, method)
                self._log(record, validating)
                if state.harmed(method.guard):
                    self._return_to_best(name, iterations, method)
                    saving = True
                if validating:
                    self.poller.poll_soon()  # a validation often decides whether a run is stopped
                if (saving and not skipped) or stopping:
                    directory = self.folder.checkpoints / checkpoint.checkpoint_name(state.step)
                    self.checkpointer.save(directory, method, name, state)
                if stopping:
                    return TrainResult("interrupted", name, state.iteration, state.step)
                if saving or validating:
                    meter.restart(state.step)
        return None

    def _poll(self) -> tuple[bool, bool]:
        """Whether to stop after this step, and whether to write a checkpoint because something asks for one."""
        answer = self.poller.poll(self.state.step)
        if answer is None:
            return False, False
        stopping, completed = answer
        self._completed(completed)
        return bool(stopping), self.save_requested()

    def _completed(self, step: int | None) -> None:
        if step is not None:
            self.callback.on_checkpoint(step)

    def _warn(self, text: str | None) -> None:
        if self.rank == 0 and text:
            self.callback.on_warning(text)

    def _position(self, name: str, iterations: int) -> dict[str, Any]:
        state = self.state
        return {"global_step": state.step, "phase": name, "iteration": state.iteration, "iterations": iterations}

    def _log(self, record: dict[str, Any], validated: bool) -> None:
        if self.rank == 0:
            self.folder.append_metrics(record)
        self.callback.on_metrics(record, validated)

    def _read_metrics(
        self, name: str, iterations: int, metrics: Mapping[str, Tensor], meter: ThroughputMeter
    ) -> dict[str, Any]:
        """Wait for the device once and read the metrics of the last step."""
        values = collectives.reduce_metrics(metrics)
        record = self._position(name, iterations) | {f"train/{key}": value for key, value in values.items()}
        seconds, waited = meter.read(self.state.step)
        domains = 2 if reads_target(name) else 1
        record["perf/step_s"] = seconds
        record["perf/images_per_s"] = domains * self.config.data.global_batch_size / seconds
        record["perf/data_stall_fraction"] = waited
        return record

    def _return_to_best(self, name: str, iterations: int, method: Method) -> None:
        """End a phase that does harm with its best state, corrected as at any end if that makes it better still."""
        state = self.state
        text = (
            f"the adaptation ends at iteration {state.iteration} of {iterations}: the class-ratio agreement fell from "
            f"{state.first_agreement:.3f} to {state.agreement:.3f}, more than method.guard allows; "
        )
        state.ended = True
        if state.best is None:
            self._warn(text + "no state could be scored, so that it ends with this one")
            return
        best = self._load_best(method, iterations)
        self._warn(text + f"it ends with its best state, that of iteration {best['position']['iteration']}")
        before = state.best
        if method.end_phase(self._training_slices()):
            self._log(self._position(name, iterations) | self._score(name, method), validated=False)
            if state.best == before:
                self._load_best(method, iterations)

    def _load_best(self, method: Method, iterations: int) -> dict[str, Any]:
        """Go back to the best state of the phase; returns its checkpoint."""
        self._completed(self.checkpointer.finish())
        if self.rank == 0:
            self.folder.store.flush()  # in a bucket the other workers download it
        collectives.barrier()
        best = checkpoint.load(self.folder.store.localize(self.folder.best))
        self.checkpointer.restore(best, method, iterations)
        return best

    def _validate(self, name: str, method: Method) -> dict[str, Any]:
        """Validate on both domains, keep the weights if they are the best of the phase, and record features."""
        record = self._score(name, method)
        self._record_features(name, method)
        if self.rank == 0 and self.config.run.images and TARGET_DOMAIN in self.data.validation:
            self._show_images(method, self.data.validation[TARGET_DOMAIN])
        return record

    def _score(self, name: str, method: Method) -> dict[str, float]:
        """Validate on both domains, and keep the weights if they are the best of the phase."""
        data = self.config.data
        results = {
            domain: validate(method.predict, slices, self.data.classes, data.global_batch_size, self.device)
            for domain, slices in self.data.validation.items()
        }
        record = validation_metrics(results, data.labelled_domain)
        self._warn_of_lost_structures(name, results)
        if method.guard is not None:
            self.state.note_agreement(record.get("val/unsupervised/class_ratio_agreement"))
        score = selection_score(results, self.config.run.select, data.labelled_domain)
        if score is not None:
            record["val/selection_score"] = score
            # A state that ends its phase is not the one to use, however it scores.
            better = self.state.best is None or score > self.state.best
            if better and not self.state.harmed(method.guard):
                self.state.best = score
                self.checkpointer.save(self.folder.best, method, name, self.state)
        return record

    def _warn_of_lost_structures(self, name: str, results: Mapping[str, Validation]) -> None:
        target, own = results.get(TARGET_DOMAIN), results.get(self.config.data.labelled_domain)
        if reads_target(name) and target is not None and own is not None and own.labelled is not None:
            shares = lost_shares(target.predicted, own.labelled, self.data.classes[1:])
            for sentence in self.notices.of_shares(name, self.state.iteration, shares):
                self._warn(sentence)

    def _record_features(self, name: str, method: Method) -> None:
        if is_adaptation(name):
            position = {"global_step": self.state.step, "phase": name, "iteration": self.state.iteration}
            slices = self.data.validation.get(TARGET_DOMAIN)
            self.features.record(method, slices, self.config.data.global_batch_size, position)

    def _show_images(self, method: Method, slices: Slices) -> None:
        """Predict evenly spaced slices of the first volume, the ends left out."""
        _, arrays = next(slices.volumes())
        volume = collate(arrays)
        chosen = torch.from_numpy(evenly_spaced(np.arange(len(volume["image"])), IMAGE_SLICES))
        images = volume["image"][chosen]
        predictions = method.predict(images.to(self.device)).argmax(1).cpu()
        labels = volume["label"][chosen] if "label" in volume else None
        self.callback.on_images(self.state.step, images[:, 0], predictions, labels)
