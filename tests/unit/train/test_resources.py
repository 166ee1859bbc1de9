"""What a worker asks of a node, and which nodes have it."""

from __future__ import annotations

from typing import Any

import pytest

from mpscl_ray.config import load_config
from mpscl_ray.distributed.places import WorkerRequest
from mpscl_ray.errors import ConfigError
from mpscl_ray.train.ray.resources import worker_request


def node(labels: dict[str, str] | None = None, **resources: float) -> dict[str, Any]:
    return {"Resources": resources, "Labels": labels or {}}


def test_a_worker_asks_for_what_the_settings_say() -> None:
    words = ["scaling.cpus_per_worker=4", "scaling.memory_gb=16", "scaling.accelerator_type=A100"]
    config = load_config("small/mpscl", [*words, "scaling.node_labels={market-type: spot}"])
    assert worker_request(config, use_gpu=True) == WorkerRequest(
        {"CPU": 4, "GPU": 1, "memory": 16e9, "accelerator_type:A100": 0.001}, {"market-type": "spot"}
    )
    assert worker_request(load_config("small/mpscl"), use_gpu=False) == WorkerRequest({"CPU": 1}, {})


def test_a_node_has_room_for_as_many_workers_as_its_scarcest_resource() -> None:
    worker = WorkerRequest({"CPU": 2, "memory": 8e9}, {})
    assert worker.fits_on(node(CPU=8, memory=20e9)) == 2
    assert worker.fits_on(node(CPU=8)) == 0


@pytest.mark.parametrize(
    ("wanted", "label", "fits"),
    [
        ("spot", "spot", True),
        ("spot", "on-demand", False),
        ("spot", None, False),
        ("!spot", "on-demand", True),
        ("!spot", None, True),
        ("!spot", "spot", False),
        ("in(a, b)", "b", True),
        ("in(a, b)", "c", False),
        ("!in(a, b)", "c", True),
        ("!in(a,b)", "b", False),
    ],
)
def test_a_node_without_the_labels_has_no_room(wanted: str, label: str | None, fits: bool) -> None:
    labels = {} if label is None else {"market-type": label}
    assert WorkerRequest({"CPU": 1}, {"market-type": wanted}).fits_on(node(labels, CPU=3)) == (3 if fits else 0)


def test_a_kind_of_gpu_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"accelerator_type=A100 is a kind of GPU, and scaling.device=cpu uses none"):
        load_config("small/mpscl", ["scaling.accelerator_type=A100", "scaling.device=cpu"])
