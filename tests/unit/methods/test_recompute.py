"""Recomputed blocks: less memory, and not one bit of a step changes."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mpscl_ray.distributed.folded_batch_norm import fold_batch_norm
from mpscl_ray.methods import METHODS, optim
from tests.tiny_methods import OPTIM, assert_equal_states, batch, make, segmenter

DEEPLAB = [name for name in METHODS if name not in ("adabn", "sifa")]


def made(name: str, recompute: bool, accumulate: int = 1, layers: tuple[int, ...] = (1, 1, 2, 1)) -> Any:
    own = getattr(METHODS[name], "segmenter_arguments", {})
    method = make(
        name,
        network=segmenter(0, **own, layers=layers),
        optim=dataclasses.replace(OPTIM, recompute=recompute, accumulate=accumulate),
    )
    method.start_phase(10)
    return method


def assert_same_steps(name: str, accumulate: int = 1) -> None:
    """Losses, gradients, and the state with its running statistics and optimisers, of two steps."""
    plain, other = (made(name, recompute, accumulate) for recompute in (False, True))
    for step in range(2):
        expected, found = (method.step(batch(step), step) for method in (plain, other))
        assert_equal_states(found, expected)
        for network, module in plain.networks.items():
            for key, parameter in module.named_parameters():
                gradient = other.networks[network].get_parameter(key).grad
                assert (gradient is None) == (parameter.grad is None), key
                assert gradient is None or torch.equal(gradient, parameter.grad), key
        assert_equal_states(other.state_dict(), plain.state_dict())


@pytest.mark.parametrize("name", DEEPLAB)
def test_a_step_is_the_same_bit_for_bit(name: str) -> None:
    assert_same_steps(name)


def test_with_micro_batches() -> None:
    assert_same_steps("mpscl", accumulate=2)


def test_with_folded_batch_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "convert_batch_norm", lambda module, device, fold: fold_batch_norm(module))
    assert_same_steps("mpscl")


def peak(recompute: bool) -> int:
    """Most bytes that a step of plain segmentation allocates beyond what was there before."""
    method = made("segmentation", recompute, layers=(1, 1, 8, 1))
    data = batch(0, size=8)
    method.step(data, 0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        method.step(data, 1)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def test_the_activations_of_one_block_are_in_memory() -> None:
    whole, recomputed = peak(False), peak(True)
    print(f"peak of a step: {whole / 1e6:.1f} MB, {recomputed / whole:.2f} of it recomputed")
    assert recomputed < 0.6 * whole
