"""From a config to a finished training on Ray: open the data, run the workers, watch them.

The same launch serves the train command and a search trial. Ray must be connected (``ray_session.connect``).
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train import FailureConfig, RunConfig, ScalingConfig

from mpscl_ray import __version__
from mpscl_ray.config import Config, DiscriminatorConfig, reads_target, to_dict
from mpscl_ray.data import SOURCE_DOMAIN, TARGET_DOMAIN
from mpscl_ray.data.compatibility import check_pair
from mpscl_ray.data.dataset import Manifest, load_manifest
from mpscl_ray.data.loader import Slices
from mpscl_ray.data.ray_source import open_slices
from mpscl_ray.errors import (
    ClusterError,
    ConfigError,
    DataError,
    InsufficientResources,
    MpsclError,
    StorageError,
    TrainingError,
)
from mpscl_ray.methods.adversarial import DISCRIMINATORS
from mpscl_ray.runs.control_files import FAILURE_FILE, STOP_FILE
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.runs.storage import S3Path, parse_location
from mpscl_ray.train.loop import TrainResult
from mpscl_ray.train.phases import network_arguments
from mpscl_ray.train.ray.failures import WorkerFailureCallback, causes, last_line
from mpscl_ray.train.ray.resources import cluster_shortage, worker_resources
from mpscl_ray.train.ray.worker import run_worker
from mpscl_ray.train.streams import TrainingData

RAY_FOLDER = "ray"
"""Folder in the run folder where Ray Train keeps its own files while it runs."""

_LOOK_S = 0.25
_START_TIMEOUT_S = 30
_RAY_TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # After a node was lost Ray takes it for alive a little longer, and waits so long for workers on it.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(_START_TIMEOUT_S),
}
"""Environment variables that Ray Train reads when a training starts. By its own defaults it looks for lost workers, and
takes reports, every two seconds."""

_FINAL: dict[int, type[MpsclError]] = {
    kind.exit_code: kind for kind in (ConfigError, DataError, ClusterError, StorageError, TrainingError)
}


@dataclass(frozen=True)
class Domains:
    """The manifests of the two datasets of a run; ``source`` is the target's too where only that one is trained on."""

    source: Manifest
    target: Manifest
    source_folder: Path | S3Path
    target_folder: Path | S3Path

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, background first."""
        return self.source.classes

    def fingerprints(self) -> dict[str, str]:
        """By the address of each dataset."""
        return {
            str(self.source_folder): self.source.fingerprint,
            str(self.target_folder): self.target.fingerprint,
        }


def load_domains(config: Config) -> tuple[Domains, list[str]]:
    """Read both manifests and check that they go together.

    Returns:
        The domains, and a sentence for each thing that deserves a warning.

    Raises:
        ConfigError: data.source or data.target is not set, the slices are too small for the discriminators, or
            run.select needs labels that the target does not have.
        DataError: a dataset is missing, damaged, or does not fit the other one.
    """
    for key, value in (("data.source", config.data.source), ("data.target", config.data.target)):
        if not value:
            raise ConfigError(
                f"{key} is not set: give the folder of a prepared dataset ({key}=FOLDER); "
                "python -m mpscl_ray.prepare --help tells how to make one"
            )
    source_folder, target_folder = (
        located.absolute() if isinstance(located, Path) else located
        for located in map(parse_location, (config.data.source, config.data.target))
    )
    domains = Domains(load_manifest(source_folder), load_manifest(target_folder), source_folder, target_folder)
    warnings = check_pair(domains.source, domains.target)
    _check_size(config, domains.source.size)
    held_out = domains.target.split("val")
    if config.run.select == "oracle" and not (held_out and all(case.labelled for case in held_out)):
        raise ConfigError(
            f"run.select=oracle needs labels of all validation cases of the target {target_folder}, and "
            f"{sum(case.labelled for case in held_out)} of its {len(held_out)} have any; use run.select=label_free"
        )
    own = (domains.target if config.data.labelled == TARGET_DOMAIN else domains.source).split("val")
    if config.run.select == "label_free" and not (own and all(case.labelled for case in own)):
        warnings.append(
            f"the {config.data.labelled} dataset has no labelled validation cases, by which the best checkpoint would "
            "be chosen: there will be the last one and the end of each phase"
        )
    return domains, warnings


def _check_size(config: Config, size: tuple[int, int]) -> None:
    if not isinstance(config.method, DiscriminatorConfig) or not _reads_target(config):
        return
    smallest = DISCRIMINATORS[config.method.discriminator].minimum_size
    if min(size) < smallest:
        raise ConfigError(
            f"method.discriminator={config.method.discriminator} needs slices of at least {smallest} x {smallest} "
            f"pixels, these datasets have {size[0]} x {size[1]}; prepare both with a larger --size"
        )


def _reads_target(config: Config) -> bool:
    """Whether a phase trains on the target's slices too."""
    return any(reads_target(name) for name, _ in config.schedule)


def model_description(config: Config, domains: Domains) -> dict[str, Any]:
    """What evaluation and prediction need beside the weights, for model.json."""

    def domain(manifest: Manifest, folder: Path | S3Path) -> dict[str, Any]:
        return {
            "modality": manifest.modality,
            "scaling": {"low": manifest.scaling.low, "high": manifest.scaling.high},
            "recipe": manifest.recipe,
            "labels": manifest.labels,
            "dataset": str(folder),
            "fingerprint": manifest.fingerprint,
        }

    return {
        "version": __version__,
        "classes": list(domains.classes),
        "size": list(domains.source.size),
        "network": network_arguments(config, len(domains.classes)),
        "source": domain(domains.source, domains.source_folder),
        "target": domain(domains.target, domains.target_folder),
        "phases": [name for name, _ in config.schedule],
        "labelled": config.data.labelled,
    }


def open_data(config: Config, domains: Domains, open_slices: Callable[..., Slices] = open_slices) -> TrainingData:
    """Open the slices that a run reads; those that fit are read into shared memory now, checksums verified.

    Args:
        config: of the run.
        domains: its datasets.
        open_slices: opens a split, as :func:`mpscl_ray.data.ray_source.open_slices` does.
    """

    def opened(folder: Path | S3Path, split: str, labels: bool) -> Slices:
        return open_slices(folder, split, labels=labels, in_memory=config.data.in_memory)

    supervised = config.data.labelled == TARGET_DOMAIN
    validation: dict[str, Slices] = {}
    for domain, manifest, folder in (
        (SOURCE_DOMAIN, domains.source, domains.source_folder),
        (TARGET_DOMAIN, domains.target, domains.target_folder),
    ):
        cases = manifest.split("val")
        if cases:
            validation[domain] = opened(folder, "val", all(case.labelled for case in cases))
    return TrainingData(
        classes=domains.classes,
        labelled=opened(domains.target_folder if supervised else domains.source_folder, "train", True),
        unlabelled=opened(domains.target_folder, "train", False) if _reads_target(config) else None,
        validation=validation,
    )


def fit_on_ray(
    config: Config, folder: RunDirectory, data: TrainingData, use_gpu: bool, display_name: str
) -> dict[str, Any]:
    """Train with Ray Train, and return the outcome that worker 0 returned.

    Raises:
        ray.train.TrainingFailedError: workers failed more often than run.restarts allows, or found no room.
    """
    storage = folder.path.absolute() / RAY_FOLDER
    shutil.rmtree(storage, ignore_errors=True)
    for name, value in _RAY_TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    patience = math.ceil(config.scaling.wait_s / _START_TIMEOUT_S)
    trainer = ray.train.torch.TorchTrainer(
        # The settings alone are Ray's train_loop_config: the dashboard shows that to everybody.
        functools.partial(  # type: ignore[arg-type]
            run_worker, folder=folder.uri, token=folder.store.fencing_token, data=data, display_name=display_name
        ),
        train_loop_config=to_dict(config),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # the types are those of the former Ray Train
            num_workers=config.scaling.workers,  # type: ignore[arg-type]
            use_gpu=use_gpu,
            resources_per_worker=worker_resources(config, use_gpu),
            elastic_resize_monitor_interval_s=config.scaling.resize_check_s,
        ),
        run_config=RunConfig(
            # New each time: a run resumes from its own checkpoints, and Ray's would get in the way.
            name=f"{display_name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            storage_path=str(storage),
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=config.run.restarts,
                # Without a limit Ray Train waits for ever for workers that have no place any more.
                controller_failure_limit=max(config.run.restarts, patience),
            ),
            callbacks=[WorkerFailureCallback(RunDirectory(folder.path.absolute()), display_name)],  # type: ignore[list-item]
        ),
    )
    try:
        outcome: dict[str, Any] = trainer.fit().return_value  # type: ignore[attr-defined]
        return outcome
    finally:
        shutil.rmtree(storage, ignore_errors=True)


Fit = Callable[[Config, RunDirectory, TrainingData, bool, str], dict[str, Any]]
"""Trains in a run folder and returns the fields of a :class:`TrainResult`, or ``state="failed"`` with ``exit_code`` and
``reason``. It stops after a checkpoint when STOP_FILE appears in the folder. :func:`fit_on_ray` is the one there is."""


class Launch:
    """One training in the background: started by :meth:`start`, ended when :attr:`running` is False.

    ``fit`` runs in a thread, so that the main thread stays free for signals and for showing how far the run is.

    Args:
        config: settings.
        folder: of the run.
        data: what is trained on.
        use_gpu: whether each worker gets a GPU.
        display_name: name in the metrics and in Ray's account of trainings; None is the run's.
        fit: what trains; None is Ray Train.
    """

    def __init__(
        self,
        config: Config,
        folder: RunDirectory,
        data: TrainingData,
        use_gpu: bool,
        *,
        display_name: str | None = None,
        fit: Fit | None = None,
    ) -> None:
        self.config, self.folder, self.use_gpu = config, folder, use_gpu
        self.stop_requested = False
        """Whether :meth:`request_stop` was called; where there was no worker to hear it, nothing else tells."""
        self._outcome: dict[str, Any] = {}
        self._error: BaseException | None = None
        for name in (STOP_FILE, FAILURE_FILE):
            (folder.path / name).unlink(missing_ok=True)
        self._fit = functools.partial(fit or fit_on_ray, config, folder, data, use_gpu, display_name or folder.name)
        self._thread = threading.Thread(target=self._run, name="fit", daemon=True)

    def start(self) -> None:
        """Start the workers; returns at once."""
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether training goes on."""
        return self._thread.is_alive()

    def request_stop(self) -> None:
        """Ask the workers to write a checkpoint and end."""
        self.stop_requested = True
        (self.folder.path / STOP_FILE).touch()

    def wait(self, poll: Callable[[], None]) -> TrainResult:
        """Call ``poll`` several times a second until training ends, and return how it did.

        Raises:
            MpsclError: what a worker could not go on with, as it raised it.
            TrainingError: workers were lost more often than run.restarts allows.
            InsufficientResources: the cluster has no room for the workers any more.
        """
        while self.running:
            poll()
            self._thread.join(_LOOK_S)
        self.folder.store.flush()
        poll()
        (self.folder.path / STOP_FILE).unlink(missing_ok=True)
        failure = self.folder.path / FAILURE_FILE
        if failure.exists():
            content = json.loads(failure.read_text(encoding="utf-8"))
            failure.unlink()
            raise _final(content)
        if self._error is not None:
            raise self._explained(self._error)
        if self._outcome["state"] == "failed":
            raise _final(self._outcome)
        return TrainResult(**self._outcome)

    def _run(self) -> None:
        try:
            self._outcome = self._fit()
        except BaseException as error:  # noqa: BLE001 - raised again by wait(), in the main thread
            self._error = error

    def _explained(self, error: BaseException) -> BaseException:
        """What ended the training, as a sentence."""
        logs = f"see {self.folder.display_path}/logs for each worker's log; "
        logs += "the same command goes on from the last checkpoint"
        if isinstance(error, ray.train.WorkerGroupError):
            final = [failure for failure in error.worker_failures.values() if isinstance(failure, StorageError)]
            if final:
                return final[0]
            return TrainingError(
                f"workers failed {self.config.run.restarts + 1} times, which is once more than run.restarts allows "
                f"({causes(error.worker_failures)}); {logs}"
            )
        if isinstance(error, ray.train.ControllerError):
            return InsufficientResources(
                f"the workers found no place any more: {cluster_shortage(self.config, self.use_gpu)}"
            )
        if isinstance(error, (ray.train.TrainingFailedError, ray.exceptions.RayError)):
            return ClusterError(f"Ray ended the training ({last_line(error)}); {logs}")
        return error


def _final(told: Mapping[str, Any]) -> MpsclError:
    """What a worker could not go on with, as it told it."""
    return _FINAL.get(told["exit_code"], TrainingError)(told["reason"])
