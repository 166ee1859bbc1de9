"""Resources of this machine or the cluster for the workers of a run, and a suggestion where they do not suffice."""

from __future__ import annotations

import os

import ray
import torch
from ray.util.placement_group import remove_placement_group

from mpscl_ray.config import Config
from mpscl_ray.distributed.places import (
    TaskPlace,
    WorkerRequest,
    amount_text,
    free_text,
    free_worker_slots,
    nodes,
    of_accelerator,
    of_memory,
    worker_slots,
)
from mpscl_ray.distributed.ray_session import is_private
from mpscl_ray.errors import ClusterError, InsufficientResources

_SETTLE_S = 5.0
"""Seconds that a cluster may take to free the resources of the previous run."""


def check_machine(config: Config) -> None:
    """Check, before Ray starts on this machine, that it has what a run asks for.

    Raises:
        ClusterError: with the numbers, where it has fewer CPUs or GPUs.
    """
    if os.environ.get("RAY_ADDRESS") or ray.is_initialized():
        return
    scaling = config.scaling
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = torch.cuda.device_count()
    fits = int(cpus / scaling.cpus_per_worker)
    if scaling.least_workers > fits:
        raise ClusterError(
            f"{scaling.least_workers} workers with {scaling.cpus_per_worker:g} CPUs each need "
            f"{scaling.least_workers * scaling.cpus_per_worker:g} CPUs and this machine has {cpus}; "
            f"{_suggest(config, fits, [])}, or set RAY_ADDRESS to a larger cluster"
        )
    if scaling.device == "gpu" and scaling.least_workers > gpus:
        raise ClusterError(
            f"scaling.device=gpu gives each of {scaling.least_workers} workers a GPU and this machine has {gpus} "
            f"that torch can use; {_suggest(config, gpus, ['scaling.device=cpu'])}, or set RAY_ADDRESS to a cluster "
            "with GPUs"
        )


def check_cluster(config: Config) -> bool:
    """Check that the cluster has what a run asks for, so that no run waits for ever.

    Requests the workers' resources as training will, for ``scaling.resource_timeout_s`` seconds: a cluster that can
    grow then does.

    Returns:
        Whether each worker gets a GPU.

    Raises:
        InsufficientResources: with the numbers, where the cluster is too small or too busy and stays so.
    """
    scaling = config.scaling
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus = total.get("GPU", 0) > 0 or scaling.accelerator_type is not None
    use_gpu = scaling.device == "gpu" or (scaling.device == "auto" and gpus)
    worker = worker_request(config, use_gpu)
    enough = scaling.least_workers <= worker_slots(worker)
    if enough or scaling.resource_timeout_s:
        group = worker.reserve(scaling.least_workers, scaling.placement_strategy)
        try:
            if group.wait(max(scaling.resource_timeout_s, _SETTLE_S) if enough else scaling.resource_timeout_s):
                return use_gpu
        finally:
            remove_placement_group(group)
    raise InsufficientResources(cluster_shortage(config, use_gpu))


def cluster_shortage(config: Config, use_gpu: bool) -> str:
    """A sentence on what a run asks for and what the cluster has."""
    scaling = config.scaling
    worker = worker_request(config, use_gpu)
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    asked, needed = worker.describe(scaling.least_workers), worker.resources
    has = " and ".join(
        f"{amount_text(name, total.get(name, 0))} ({free_text(name, free.get(name, 0))})" for name in needed
    )
    if scaling.placement_strategy != "PACK":
        asked += f" placed by {scaling.placement_strategy}"
    number = len(nodes())
    spread = f" on {number} nodes" if number > 1 else ""
    fits = free_worker_slots(worker)
    others = ["scaling.device=cpu"] if use_gpu and total.get("GPU", 0) < scaling.least_workers else []
    others.append("scaling.resource_timeout_s=SECONDS to wait for more")
    offer = _suggest(config, fits, others)
    return f"{scaling.least_workers} workers need {asked}, and the cluster has {has}{spread}; {offer}"


def worker_request(config: Config, use_gpu: bool) -> WorkerRequest:
    """What one worker of a run asks for."""
    scaling = config.scaling
    amounts = {"CPU": scaling.cpus_per_worker} | ({"GPU": 1.0} if use_gpu else {})
    if scaling.memory_gb is not None:
        amounts |= of_memory(scaling.memory_gb)
    if scaling.accelerator_type is not None:
        amounts |= of_accelerator(scaling.accelerator_type)
    return WorkerRequest(amounts, dict(scaling.node_labels))


def evaluation_place(config: Config, use_gpu: bool) -> TaskPlace | None:
    """Where each volume of the final evaluation of a run is scored: in the place of a worker, on any node.

    None where Ray runs on this machine alone and ends with the command: this process then decides as without Ray.
    """
    if is_private():
        return None
    device = "cuda" if use_gpu else "cpu"
    return TaskPlace(worker_request(config, use_gpu), device, config.scaling.resource_timeout_s)


def _suggest(config: Config, fits: int, others: list[str]) -> str:
    """What to use instead: as many workers as fit and divide the batch."""
    workers = next((number for number in range(fits, 0, -1) if config.suits(number)), 0)
    offers = [f"scaling.num_workers={workers}", *others] if workers else others
    return f"use {' or '.join(offers)}" if offers else "use a larger machine"
