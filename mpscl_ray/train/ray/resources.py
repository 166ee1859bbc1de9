"""Resources of this machine or the cluster for the workers of a run, and a suggestion where they do not suffice."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from mpscl_ray.config import Config
from mpscl_ray.errors import ClusterError, InsufficientResources

_GIGABYTE = 1e9
_ACCELERATOR = "accelerator_type:"
"""Begins the name of the resource that Ray gives a node for its kind of GPU."""

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
    needed = worker.resources.items()
    asked = " and ".join(_amount(name, amount * scaling.least_workers) for name, amount in needed)
    has = " and ".join(f"{_amount(name, total.get(name, 0))} ({_free(name, free.get(name, 0))})" for name, _ in needed)
    if worker.node_labels:
        asked += " on nodes with the labels " + ", ".join(f"{key}={text}" for key, text in worker.node_labels.items())
    if scaling.placement_strategy != "PACK":
        asked += f" placed by {scaling.placement_strategy}"
    nodes = len(_nodes())
    spread = f" on {nodes} nodes" if nodes > 1 else ""
    fits = free_worker_slots(worker)
    others = ["scaling.device=cpu"] if use_gpu and total.get("GPU", 0) < scaling.least_workers else []
    others.append("scaling.resource_timeout_s=SECONDS to wait for more")
    offer = _suggest(config, fits, others)
    return f"{scaling.least_workers} workers need {asked}, and the cluster has {has}{spread}; {offer}"


@dataclass(frozen=True)
class WorkerRequest:
    """What a worker asks of a node."""

    resources: dict[str, float]
    """Amounts by Ray's names: CPU, GPU, memory (bytes), accelerator_type:KIND."""
    node_labels: dict[str, str]
    """Ray's label selector."""

    def fits_on(self, node: Mapping[str, Any]) -> int:
        """How many workers an idle node, as ``ray.nodes`` describes it, has room for."""
        labels = node.get("Labels", {})
        if not all(_matches(labels.get(key), wanted) for key, wanted in self.node_labels.items()):
            return 0
        has: dict[str, float] = node["Resources"]
        return min(math.floor(has.get(name, 0) / amount) for name, amount in self.resources.items())

    def reserve(self, number: int, strategy: str = "PACK") -> PlacementGroup:
        """Ask Ray for the places of so many workers."""
        labels = [self.node_labels] * number if self.node_labels else None
        group: PlacementGroup = placement_group([self.resources] * number, strategy, bundle_label_selector=labels)
        return group

    def task_options(self) -> dict[str, Any]:
        """Arguments of ``options`` for a Ray task in the place of a worker."""
        amounts = dict(self.resources)
        own = {"num_cpus": amounts.pop("CPU", 0), "num_gpus": amounts.pop("GPU", 0)}
        if "memory" in amounts:
            own["memory"] = amounts.pop("memory")
        return {**own, "resources": amounts, "label_selector": self.node_labels or None}


def worker_slots(worker: WorkerRequest) -> int:
    """Workers that fit on all nodes together if these are idle; a worker cannot be split between nodes."""
    return sum(worker.fits_on(node) for node in _nodes())


def free_worker_slots(worker: WorkerRequest) -> int:
    """Approximate number of workers that fit now."""
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    amounts = worker.resources.items()
    return min(worker_slots(worker), *(int(free.get(name, 0) / amount) for name, amount in amounts))


def worker_request(config: Config, use_gpu: bool) -> WorkerRequest:
    """What one worker of a run asks for."""
    scaling = config.scaling
    amounts = {"CPU": scaling.cpus_per_worker} | ({"GPU": 1.0} if use_gpu else {})
    if scaling.memory_gb is not None:
        amounts["memory"] = scaling.memory_gb * _GIGABYTE
    if scaling.accelerator_type is not None:
        amounts[f"{_ACCELERATOR}{scaling.accelerator_type}"] = 0.001  # as Ray asks for it itself
    return WorkerRequest(amounts, dict(scaling.node_labels))


def _matches(label: str | None, wanted: str) -> bool:
    """Whether a node's label, None without one, is what a selector asks for: a, !a, in(a, b) or !in(a, b)."""
    negated, text = wanted.startswith("!"), wanted.removeprefix("!").strip()
    values = text[3:-1].split(",") if text.startswith("in(") and text.endswith(")") else [text]
    return (label in [value.strip() for value in values]) != negated


def _amount(name: str, amount: float) -> str:
    """``4 CPUs``, ``32 GB of memory``, ``a GPU of type A100``."""
    if name == "memory":
        return f"{amount / _GIGABYTE:.3g} GB of memory"
    kind = name.removeprefix(_ACCELERATOR)
    if kind != name:
        return f"{'a' if amount else 'no'} node with {kind}"
    return f"{amount:g} {name}s"


def _free(name: str, amount: float) -> str:
    return f"{amount / _GIGABYTE:.3g} GB free" if name == "memory" else f"{amount:g} free"


def _nodes() -> list[dict[str, Any]]:
    """The nodes that are alive."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"]]


def _suggest(config: Config, fits: int, others: list[str]) -> str:
    """What to use instead: as many workers as fit and divide the batch."""
    workers = next((number for number in range(fits, 0, -1) if config.suits(number)), 0)
    offers = [f"scaling.num_workers={workers}", *others] if workers else others
    return f"use {' or '.join(offers)}" if offers else "use a larger machine"
