"""Places for workers on a Ray cluster: what a worker asks of a node, and how many fit on the nodes there are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpscl_ray.errors import ConfigError, InsufficientResources

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

_GIGABYTE = 1e9
_ACCELERATOR = "accelerator_type:"
"""Begins the name of the resource that Ray gives a node for its kind of GPU."""

_RETRIES = 3
"""How often a task is tried again whose process or node was lost."""

_PATIENCE_S = 120.0
"""Patience of a command that has no setting for it."""

# Ray is imported by the functions that ask it: what works without a cluster needs no Ray.


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
        from ray.util.placement_group import placement_group

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

    def describe(self, number: int = 1) -> str:
        """What so many workers ask for, such as ``8 CPUs and 2 GPUs on nodes with the labels a=b``."""
        text = " and ".join(amount_text(name, amount * number) for name, amount in self.resources.items())
        if self.node_labels:
            text += " on nodes with the labels " + ", ".join(
                f"{key}={label}" for key, label in self.node_labels.items()
            )
        return text


@dataclass(frozen=True)
class TaskPlace:
    """Where each task that predicts a volume runs: in the place of a worker, on any node that has one."""

    worker: WorkerRequest
    device: str
    """cpu or cuda, of the node that the task runs on."""
    patience_s: float
    """How long there may be no node for it, for example while one is started or replaced."""

    @property
    def threads(self) -> int:
        """Number of threads of torch."""
        return max(1, int(self.worker.resources.get("CPU", 1)))

    def task_options(self) -> dict[str, Any]:
        """Arguments of ``options`` for the task. One that is lost with its node is tried on another."""
        return {**self.worker.task_options(), "scheduling_strategy": "SPREAD", "max_retries": _RETRIES}

    def watch(self) -> Callable[[], None]:
        """A function to call every few seconds, which raises InsufficientResources when patience ends."""
        since: float | None = None

        def look() -> None:
            nonlocal since
            if worker_slots(self.worker):
                since = None
                return
            since = since or time.monotonic()
            if time.monotonic() - since >= self.patience_s:
                raise InsufficientResources(
                    f"each volume needs {self.worker.describe()}, and no node of the cluster has that; start one that "
                    "has and give the same command again"
                )

        return look


def inference_place(device: str | None) -> TaskPlace:
    """Where volumes are predicted on a cluster that may be another one than that of the training.

    Args:
        device: cpu or cuda; None takes GPUs if the cluster has any.

    Raises:
        ConfigError: it is a certain GPU, and nodes number their own.
    """
    import ray

    if device not in (None, "cpu", "cuda"):
        raise ConfigError(f"--device {device} names a device of this machine; with --ray give cpu or cuda")
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    if device == "cuda" or (device is None and total.get("GPU", 0) >= 1):
        return TaskPlace(WorkerRequest({"CPU": 1.0, "GPU": 1.0}, {}), "cuda", _PATIENCE_S)
    return TaskPlace(WorkerRequest({"CPU": 1.0}, {}), "cpu", _PATIENCE_S)


def worker_slots(worker: WorkerRequest) -> int:
    """Workers that fit on all nodes together if these are idle; a worker cannot be split between nodes."""
    return sum(worker.fits_on(node) for node in nodes())


def free_worker_slots(worker: WorkerRequest) -> int:
    """Approximate number of workers that fit now."""
    import ray

    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    amounts = worker.resources.items()
    return min(worker_slots(worker), *(int(free.get(name, 0) / amount) for name, amount in amounts))


def nodes() -> list[dict[str, Any]]:
    """The nodes that are alive."""
    import ray

    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in found if node["Alive"]]


def of_accelerator(kind: str) -> dict[str, float]:
    """The resource by which Ray chooses nodes with a kind of GPU."""
    return {f"{_ACCELERATOR}{kind}": 0.001}  # as Ray asks for it itself


def of_memory(gigabytes: float) -> dict[str, float]:
    """The resource of so much memory."""
    return {"memory": gigabytes * _GIGABYTE}


def amount_text(name: str, amount: float) -> str:
    """``4 CPUs``, ``32 GB of memory``, ``a node with A100``."""
    if name == "memory":
        return f"{amount / _GIGABYTE:.3g} GB of memory"
    kind = name.removeprefix(_ACCELERATOR)
    if kind != name:
        return f"{'a' if amount else 'no'} node with {kind}"
    return f"{amount:g} {name}s"


def free_text(name: str, amount: float) -> str:
    """``3 free``, ``16 GB free``."""
    return f"{amount / _GIGABYTE:.3g} GB free" if name == "memory" else f"{amount:g} free"


def _matches(label: str | None, wanted: str) -> bool:
    """Whether a node's label, None without one, is what a selector asks for: a, !a, in(a, b) or !in(a, b)."""
    negated, text = wanted.startswith("!"), wanted.removeprefix("!").strip()
    values = text[3:-1].split(",") if text.startswith("in(") and text.endswith(")") else [text]
    return (label in [value.strip() for value in values]) != negated
