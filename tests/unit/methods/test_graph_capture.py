"""A training step launches few operators, and always the same ones on the same memory, as a CUDA graph needs it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from mpscl_ray.distributed.batch_norm import batch_norms
from tests.operators import SYNCHRONISING, Operators, as_on_gpu, made, operators_of_a_step
from tests.tiny_methods import leaves

CAPTURED = [
    ("mpscl", []),
    ("mpscl", ["method.margin_form=paper", "method.discriminator=patchgan", "network.train_bn_affine=true"]),
    ("advent", []),
    ("minent", []),
    ("adaoutput", []),
    ("adaoutput", ["method.adversarial_loss=least_squares", "method.bn_running_stats=target"]),
]
SHALLOW = ["network.layers=[1,1,1,1]"]


def state(method: Any) -> dict[str, Tensor]:
    """Everything that a step reads and leaves for the next."""
    tensors = {name: value for name, value in leaves(method.state_dict()).items() if isinstance(value, Tensor)}
    guard = method.optimisers.guard
    tensors.pop("phase.skipped")  # Computed when it is asked for, from the next two.
    tensors |= {"flag": guard.flag, "excess": guard._excess, "losses": guard._losses}
    for name, optimiser in method.optimisers._optimisers.items():
        for number, group in enumerate(optimiser._optimiser.param_groups):
            tensors[f"{name}.lr.{number}"] = group["lr"]
    for name, network in method.networks.items():
        for number, layer in enumerate(batch_norms(network)):
            for kind, tensor in enumerate(getattr(layer, "_batch_stats", [])):
                tensors[f"{name}.batch_stats.{number}.{kind}"] = tensor
    return tensors


@pytest.fixture
def on_gpu() -> Iterator[None]:
    with as_on_gpu():
        yield


@pytest.mark.parametrize(("preset", "settings"), CAPTURED)
@pytest.mark.usefixtures("on_gpu")
def test_steps_are_the_same_operators_on_the_same_memory(preset: str, settings: list[str]) -> None:
    method, batch = made(f"mr2ct/{preset}", [*SHALLOW, *settings])
    method.step(batch, 0)
    before = {name: tensor.data_ptr() for name, tensor in state(method).items()}
    values = {name: tensor.clone() for name, tensor in state(method).items()}
    calls = []
    for iteration in (1, 60):
        method.optimisers.set_learning_rates(iteration)
        with Operators() as operators:
            method.update(batch)
        calls.append(operators.calls)
    assert calls[0] == calls[1]
    assert {name: tensor.data_ptr() for name, tensor in state(method).items()} == before
    still = {name for name, tensor in state(method).items() if tensor.equal(values[name])}
    assert not {name for name in still if "lr" in name or "running" in name or "prototypes" in name}
    assert not {name for name, _ in calls[0]} & SYNCHRONISING


def test_operators_of_a_step() -> None:
    counts = operators_of_a_step("mr2ct/mpscl", []).counts
    # One before each of 104 norms, 8 of the heads; 5 of each discriminator, frozen and in training.
    assert counts["convolution"] == counts["convolution_backward"] == 104 + 8 + 20
    assert counts["native_batch_norm"] == 104
    assert counts["_foreach_lerp_"] == 2, "running statistics, once for each domain"
    assert sum(counts.values()) <= 1152
