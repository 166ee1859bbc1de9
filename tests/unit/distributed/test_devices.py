"""No collective gets a tensor of another device than the method's, which a process group of GPUs alone refuses.

The device "meta" stands in for a GPU: the process group of the test has a backend for it and, like NCCL, none for CPUs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpscl_ray.distributed import collectives
from mpscl_ray.methods import METHODS, Batch, optim
from mpscl_ray.methods.base import TrainingSlices
from tests import tiny_methods
from tests.tiny_methods import SIZE, batch, leaves

META = torch.device("meta")
ONLY_META = "only_meta"


SLICES = TrainingSlices(
    labelled=lambda: [(batch(2).source_image, batch(2).source_label)],
    synchronised_source_batches=lambda: [batch(2).source_image],
    synchronised_target_batches=lambda: [batch(2).source_image],
    unlabelled=lambda: [(torch.arange(4), batch(2).source_image)],
    target_volumes=(range(4),),
    size=(SIZE, SIZE),
    source_only_weights=dict,
)
"""Slices on the host, where the loader gives them."""


def make_group(*_: Any) -> Any:
    """A group of two whose collectives change nothing."""
    return torch._C._distributed_c10d.FakeProcessGroup._create_internal(0, 2)


class AnyGenerator(torch.Generator):
    """A generator that may be asked for on any device."""

    def __new__(cls, *_: Any) -> AnyGenerator:
        return super().__new__(cls)


def broadcasting(module: nn.Module, **_: Any) -> nn.Module:
    """Stands in for DistributedDataParallel, which reads sizes back from the device: it sends the same tensors."""
    for tensor in module.state_dict().values():
        dist.broadcast(tensor, 0)
    return module


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if ONLY_META not in dist.Backend.backend_list:
        dist.Backend.register_backend(ONLY_META, make_group, devices=["meta"])
    dist.init_process_group(f"meta:{ONLY_META}", rank=0, world_size=2, store=dist.HashStore())
    monkeypatch.setattr(collectives, "DistributedDataParallel", broadcasting)
    # On GPUs batch normalisation is torch's own, whose layers see one process here.
    monkeypatch.setattr(optim, "convert_batch_norm", lambda module, device, fold: module)
    # None of these exists for this device; an update sends nothing.
    monkeypatch.setattr(optim.Optimiser, "step", lambda self, non_finite: None)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "Generator", AnyGenerator)
    monkeypatch.setattr(tiny_methods, "CPU", META)
    yield
    dist.destroy_process_group()


def on_meta(part: Batch) -> Batch:
    assert part.target_image is not None
    return Batch(part.source_image.to(META), part.source_label.to(META), part.target_image.to(META))


@pytest.mark.usefixtures("group")
def test_the_group_refuses_tensors_of_the_cpu() -> None:
    collectives.all_reduce_sum(torch.zeros(1, device=META))
    with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
        collectives.all_reduce_sum(torch.zeros(1))


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("name", METHODS)
def test_every_method_starts_and_steps(name: str) -> None:
    method = tiny_methods.MAKE[name]()
    method.start_phase(4)
    if name in ("mpscl", "cag"):  # IntraDA's preparation sorts on the host, where this device has no numbers to give.
        method.prepare(SLICES)
    for iteration in range(2):
        metrics = method.step(on_meta(batch(iteration)), iteration)
        assert all(value.device == META for value in metrics.values())
    for tensor in leaves(method.state_dict()).values():
        assert not isinstance(tensor, Tensor) or tensor.device == META
