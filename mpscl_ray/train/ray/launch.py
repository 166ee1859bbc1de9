"""One training on Ray: start the workers, wait for them, explain how they ended.

The train command, searches and comparisons share it. Ray must be connected (``ray_session.connect``).
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from mpscl_ray.config import Config, to_dict
from mpscl_ray.data.ray_source import StepOrderConfig
from mpscl_ray.distributed.ray_session import is_private
from mpscl_ray.errors import (
    ClusterError,
    ConfigError,
    DataError,
    InsufficientResources,
    MpsclError,
    StorageError,
    TrainingError,
)
from mpscl_ray.runs import safe_json
from mpscl_ray.runs.control_files import FAILURE_FILE, STOP_FILE
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.runs.wording import counted
from mpscl_ray.train.outcome import TrainResult
from mpscl_ray.train.ray.account import experiment, remove_account
from mpscl_ray.train.ray.datasets import named_slices
from mpscl_ray.train.ray.failures import WorkerFailureCallback, causes, last_line
from mpscl_ray.train.ray.resources import cluster_shortage, worker_request
from mpscl_ray.train.ray.worker import run_worker
from mpscl_ray.train.streams import TrainingData

_POLL_INTERVAL_S = 0.25
_START_TIMEOUT_S = 30
_RAY_TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Ray notices a lost node late, and waits this long for workers to start on it.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(_START_TIMEOUT_S),
    # Some providers announce a preemption only 30 seconds before.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
}
"""Environment variables that Ray Train reads when a training starts. By default it checks the workers, and takes
reports, every two seconds."""

_FINAL: dict[int, type[MpsclError]] = {
    kind.exit_code: kind for kind in (ConfigError, DataError, ClusterError, StorageError, TrainingError)
}


class _Trainer(ray.train.torch.TorchTrainer):
    """On a Ray that ends with this process, no process has to release what it reserves."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        return [one for one in callbacks if not (is_private() and isinstance(one, PlacementGroupCleanerCallback))]


def fit_on_ray(
    config: Config, folder: RunDirectory, data: TrainingData, use_gpu: bool, display_name: str
) -> dict[str, Any]:
    """Train with Ray Train, and return what worker 0 returned.

    Raises:
        ray.train.TrainingFailedError: workers failed more often than run.max_failures allows, or found no resources.
    """
    remove_account(folder)  # of a start that was killed
    for name, value in _RAY_TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    scaling = config.scaling
    worker = worker_request(config, use_gpu)
    named = named_slices(config, data)
    patience = math.ceil(scaling.resource_timeout_s / _START_TIMEOUT_S)
    trainer = _Trainer(
        # Only the settings are Ray's train_loop_config, which the dashboard shows to everybody.
        functools.partial(  # type: ignore[arg-type]
            run_worker,
            folder=folder.uri,
            token=folder.store.fencing_token,
            datasets=tuple(named),
            display_name=display_name,
        ),
        train_loop_config=to_dict(config),
        torch_config=ray.train.torch.TorchConfig(timeout_s=math.ceil(scaling.collective_timeout_s)),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # the types are those of the former Ray Train
            num_workers=scaling.num_workers,  # type: ignore[arg-type]
            use_gpu=use_gpu,
            resources_per_worker=worker.resources,
            label_selector=worker.node_labels or None,
            placement_strategy=scaling.placement_strategy,
            elastic_resize_monitor_interval_s=scaling.resize_check_s,
        ),
        run_config=RunConfig(
            **experiment(folder, display_name),
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=config.run.max_failures,
                # Without a limit Ray Train waits for ever for resources that do not exist any more.
                controller_failure_limit=max(config.run.max_failures, patience),
            ),
            callbacks=[WorkerFailureCallback(RunDirectory(folder.path.absolute()), display_name)],  # type: ignore[list-item]
        ),
        datasets={name: slices.dataset for name, slices in named.items()},
        dataset_config=StepOrderConfig({name: slices.files for name, slices in named.items()}),
    )
    try:
        result: dict[str, Any] = trainer.fit().return_value  # type: ignore[attr-defined]
        return result
    finally:
        with suppress(StorageError):  # the next start removes them
            remove_account(folder)


Fit = Callable[[Config, RunDirectory, TrainingData, bool, str], dict[str, Any]]
"""Trains in a run folder and returns the fields of a :class:`TrainResult`, or ``state="failed"`` with ``exit_code`` and
``reason``. It stops after a checkpoint when STOP_FILE appears in the folder. :func:`fit_on_ray` is the default."""


class Launch:
    """One training in the background: started by :meth:`start`, ended when :attr:`running` is False.

    ``fit`` (None: Ray Train) runs in a thread, so that the main thread is free for signals and progress.
    ``display_name`` is the name in the metrics and on Ray's dashboard; None is the run's.
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
        """Whether :meth:`request_stop` was called."""
        self._result: dict[str, Any] = {}
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
        """Whether training has not ended."""
        return self._thread.is_alive()

    def request_stop(self) -> None:
        """Ask the workers to write a checkpoint and stop."""
        self.stop_requested = True
        (self.folder.path / STOP_FILE).touch()

    def wait(self, poll: Callable[[], None]) -> TrainResult:
        """Call ``poll`` several times a second until training ends, and return its result.

        Raises:
            MpsclError: the error of a worker that no restart can fix.
            TrainingError: workers failed more often than run.max_failures allows.
            InsufficientResources: the cluster has no room for the workers any more.
        """
        while self.running:
            poll()
            self._thread.join(_POLL_INTERVAL_S)
        self.folder.store.flush()
        poll()
        (self.folder.path / STOP_FILE).unlink(missing_ok=True)
        failure = self.folder.path / FAILURE_FILE
        if failure.exists():
            content = safe_json.read_object(failure)
            failure.unlink()
            raise _final(content)
        if self._error is not None:
            raise self._explain(self._error)
        if self._result["state"] == "failed":
            raise _final(self._result)
        return TrainResult(**self._result)

    def _run(self) -> None:
        try:
            self._result = self._fit()
        except BaseException as error:  # noqa: BLE001 - raised again by wait(), in the main thread
            self._error = error

    def _explain(self, error: BaseException) -> BaseException:
        """The error that ended the training, as a sentence."""
        logs = f"see {self.folder.display_path}/logs for each worker's log; "
        logs += "the same command resumes from the last checkpoint"
        if isinstance(error, ray.train.WorkerGroupError):
            final = [failure for failure in error.worker_failures.values() if isinstance(failure, StorageError)]
            if final:
                return final[0]
            times = counted(self.config.run.max_failures + 1, "time")
            return TrainingError(
                f"workers failed {times}, which is once more than run.max_failures allows "
                f"({causes(error.worker_failures)}); {logs}"
            )
        if isinstance(error, ray.train.ControllerError):
            return InsufficientResources(
                f"the workers found no resources any more: {cluster_shortage(self.config, self.use_gpu)}"
            )
        if isinstance(error, (ray.train.TrainingFailedError, ray.exceptions.RayError)):
            return ClusterError(f"Ray ended the training ({last_line(error)}); {logs}")
        return error


def _final(failure: Mapping[str, Any]) -> MpsclError:
    """The error that a worker reported as exit code and reason."""
    return _FINAL.get(failure["exit_code"], TrainingError)(failure["reason"])
