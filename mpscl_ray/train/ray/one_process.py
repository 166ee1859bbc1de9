"""A training of one worker in the process that asks for it, which has reserved what a worker needs.

Ray Train would start a controller, a worker and a few helpers for each training. In a search or a comparison there are
many, and the process that Ray Tune or Ray runs one in may as well train itself.
"""

from __future__ import annotations

import dataclasses
from contextlib import closing
from typing import Any

import torch

from mpscl_ray.config import Config
from mpscl_ray.distributed.places import WorkerRequest
from mpscl_ray.runs.control_files import STOP_FILE
from mpscl_ray.runs.run_directory import RunDirectory, open_run
from mpscl_ray.train import loop
from mpscl_ray.train.ray.prometheus import Monitoring
from mpscl_ray.train.ray.resources import worker_request
from mpscl_ray.train.ray.worker import WorkerCallback, log_to
from mpscl_ray.train.streams import TrainingData


def trains_in_one_process(config: Config) -> bool:
    """Whether a training has one worker, however large the cluster is."""
    return config.scaling.limits == (1, 1)


def own_resources(config: Config, use_gpu: bool) -> WorkerRequest:
    """What the process beside a training has to reserve: a worker's place where it trains itself, else nothing."""
    return worker_request(config, use_gpu) if trains_in_one_process(config) else WorkerRequest({}, {})


def fit_in_this_process(
    config: Config, folder: RunDirectory, data: TrainingData, use_gpu: bool, display_name: str
) -> dict[str, Any]:
    """Train in this process; takes and returns what :data:`~mpscl_ray.train.ray.launch.Fit` does.

    Raises:
        MpsclError: as :func:`mpscl_ray.train.loop.train` raises it.
    """
    run = open_run(folder.uri, "worker-0", 60 * config.run.storage_retry_minutes)
    run.store.init_worker_dir()
    log = log_to(run.logs / "worker-0.log")
    torch.set_num_threads(max(1, int(config.scaling.cpus_per_worker)))
    device = torch.device("cuda" if use_gpu else "cpu")

    def stop_requested() -> bool:
        return (run.path / STOP_FILE).exists() or run.store.sync_error is not None

    callback = WorkerCallback(run, config, data.classes, Monitoring(display_name, 0, device), None, writes=True)
    try:
        with run.store.worker_lock(folder.store.fencing_token, rank=0), closing(callback):
            result = loop.train(config, data, run, device, callback, stop_requested)
    except Exception:
        log.exception("this worker fails")
        raise
    log.info("worker ends: %s", result)
    return dataclasses.asdict(result)
