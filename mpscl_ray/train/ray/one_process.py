"""A training of one worker without Ray Train, which would start a controller and a few helpers for each training.

In a search or a comparison there are many, and the process that Ray Tune runs one in may as well train itself.
On a Ray that one command has started for one worker, nobody looks at Ray Train's account.
"""

from __future__ import annotations

import dataclasses
import itertools
from contextlib import closing
from typing import Any

import ray
import ray.train
import torch

from mpscl_ray.config import Config
from mpscl_ray.distributed.places import WorkerRequest
from mpscl_ray.distributed.ray_session import is_private, state_tracking_enabled
from mpscl_ray.errors import MpsclError
from mpscl_ray.runs.control_files import STOP_FILE
from mpscl_ray.runs.run_directory import RunDirectory, open_run
from mpscl_ray.train import loop
from mpscl_ray.train.ray.failures import record_restart
from mpscl_ray.train.ray.prometheus import Monitoring
from mpscl_ray.train.ray.resources import worker_request
from mpscl_ray.train.ray.worker import WorkerCallback, log_to
from mpscl_ray.train.streams import TrainingData


def trains_in_one_process(config: Config) -> bool:
    """Whether a training has one worker, however large the cluster is."""
    return config.scaling.limits == (1, 1)


def needs_no_ray_train(config: Config) -> bool:
    """Whether a training has one worker, on a Ray of its command without a dashboard that would show it."""
    return trains_in_one_process(config) and is_private() and not state_tracking_enabled()


def own_resources(config: Config, use_gpu: bool) -> WorkerRequest:
    """What the process beside a training has to reserve: a worker's place where it trains itself, else nothing."""
    return worker_request(config, use_gpu) if trains_in_one_process(config) else WorkerRequest({}, {})


def fit_in_one_worker(
    config: Config, folder: RunDirectory, data: TrainingData, use_gpu: bool, display_name: str
) -> dict[str, Any]:
    """Train in a process that Ray starts, and in another one where it is lost or fails.

    Takes and returns what :data:`~mpscl_ray.train.ray.launch.Fit` does.

    Raises:
        MpsclError: an error that no restart can fix.
        ray.train.WorkerGroupError: the worker failed more often than run.max_failures allows.
    """
    worker = ray.remote(_train).options(**worker_request(config, use_gpu).task_options(), max_retries=0)
    given = (config, folder.uri, folder.store.fencing_token, ray.put(data), use_gpu, display_name)
    for failures in itertools.count():
        try:
            result: dict[str, Any] = ray.get(worker.remote(*given))
            return result
        except ray.exceptions.RayTaskError as error:
            failure: Exception = error.cause
            if isinstance(failure, MpsclError):
                raise failure from None
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
            failure = error
        if failures >= config.run.max_failures:
            raise ray.train.WorkerGroupError("the worker failed too often", {0: failure})
        record_restart(folder, display_name, {0: failure})
    raise AssertionError("the loop does not end")


def fit_in_this_process(
    config: Config, folder: RunDirectory, data: TrainingData, use_gpu: bool, display_name: str
) -> dict[str, Any]:
    """Train in this process; takes and returns what :data:`~mpscl_ray.train.ray.launch.Fit` does.

    Raises:
        MpsclError: as :func:`mpscl_ray.train.loop.train` raises it.
    """
    return _train(config, folder.uri, folder.store.fencing_token, data, use_gpu, display_name)


def _train(
    config: Config, folder: str, token: str, data: TrainingData, use_gpu: bool, display_name: str
) -> dict[str, Any]:
    run = open_run(folder, "worker-0", 60 * config.run.storage_retry_minutes)
    run.store.init_worker_dir()
    log = log_to(run.logs / "worker-0.log")
    torch.set_num_threads(max(1, int(config.scaling.cpus_per_worker)))
    device = torch.device("cuda" if use_gpu else "cpu")

    def stop_requested() -> bool:
        return (run.path / STOP_FILE).exists() or run.store.sync_error is not None

    callback = WorkerCallback(run, config, data.classes, Monitoring(display_name, 0, device), None, writes=True)
    try:
        with run.store.worker_lock(token, rank=0), closing(callback):
            result = loop.train(config, data, run, device, callback, stop_requested)
    except Exception:
        log.exception("this worker fails")
        raise
    log.info("worker ends: %s", result)
    return dataclasses.asdict(result)
