"""Gradient accumulation: a step in micro-batches is the step of the whole batch, but for batch statistics."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mpscl_ray.distributed.batch_norm import batch_norms
from mpscl_ray.distributed.folded_batch_norm import fold_batch_norm
from mpscl_ray.methods import METHODS, base, optim
from mpscl_ray.methods.losses import class_counts
from tests.tiny_methods import CLASSES, OPTIM, assert_equal_states, batch, leaves, make, segmenter

SETTINGS: dict[str, dict[str, Any]] = {"mpscl": {"delta_th": 0.05}, "sifa": {"dropout": 0.25}}
"""Of MPSCL so that some pixels are selected, of SIFA so that encoder and decoder drop activations."""
EXACT: dict[str, float] = {"rtol": 1e-12, "atol": 1e-12}


def make_double(name: str, accumulate: int, **network: Any) -> Any:
    """A method in double precision, its phase started."""
    settings = SETTINGS.get(name, {})
    if name == "sifa":
        settings = {**settings, "dtype": torch.float64}
    own = getattr(METHODS[name], "segmenter_arguments", {})
    made = make(
        name,
        network=segmenter(0, **own, **network).double(),
        optim=dataclasses.replace(OPTIM, accumulate=accumulate),
        **settings,
    )
    made.start_phase(10)
    return made


def fix_batch_norms(network: nn.Module) -> None:
    for layer in batch_norms(network):
        layer.eval()


def gradients(networks: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": parameter.grad.clone()
        for name, network in networks.items()
        for key, parameter in network.named_parameters()
        if parameter.grad is not None
    }


def assert_close(ours: dict[str, Any], reference: dict[str, Any]) -> None:
    assert ours.keys() == reference.keys()
    for name, value in reference.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(ours[name], value, **EXACT, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert ours[name] == value, name


@pytest.mark.parametrize(("name", "accumulate"), [*((name, 2) for name in METHODS), ("mpscl", 4)])
def test_equals_the_whole_batch_where_batch_norms_are_fixed(name: str, accumulate: int) -> None:
    whole, parts = (make_double(name, number) for number in (1, accumulate))
    for method in (whole, parts):
        for network in method.networks.values():
            fix_batch_norms(network)
        if name == "cag":
            method.anchors.normal_(generator=torch.Generator().manual_seed(1))
            method.anchor_counts.fill_(1)
            method.threshold.zero_()
    for step in range(2):
        metrics = [
            method.step(batch(step, size=accumulate if name == "sifa" else 4), step) for method in (whole, parts)
        ]
        assert_close(metrics[1], metrics[0])
        assert_close(gradients(parts.networks), gradients(whole.networks))
        assert_close(leaves(parts.state_dict()), leaves(whole.state_dict()))
    assert name == "adabn" or len(gradients(parts.networks)) > 20
    assert float(metrics[0]["non_finite"]) == 0


@pytest.mark.parametrize("name", ["segmentation", "mpscl"])
@pytest.mark.parametrize("folded", [False, True])
def test_running_statistics_are_those_of_the_micro_batches_in_order(
    name: str, folded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if folded:
        monkeypatch.setattr(optim, "convert_batch_norm", lambda module, device, fold: fold_batch_norm(module))
    method = make_double(name, 2)
    expected = segmenter(0).double()
    data = batch(0)
    method.step(data, 0)
    with torch.no_grad():
        for index in range(2):
            for image in data.images if name == "mpscl" else (data.source_image,):
                expected(image[index::2].double())
    for (key, ours), reference in zip(method.segmenter.named_buffers(), expected.buffers(), strict=True):
        if not (folded and key.endswith("num_batches_tracked")):
            torch.testing.assert_close(ours, reference, **EXACT, msg=key)


def test_equals_a_loop_that_accumulates_gradients() -> None:
    """Of plain segmentation, whose denominators follow from the labels."""
    method = make_double("segmentation", 2)
    network = copy.deepcopy(method.segmenter)
    data = batch(0)
    method.step(data, 0)
    counts = class_counts(data.source_label, CLASSES)
    weights = 1 - counts / counts.sum()
    for index in range(2):
        image, label = data.source_image[index::2].double(), data.source_label[index::2]
        total = torch.zeros((), dtype=torch.float64)
        for head, factor in (("main", 1.0), ("aux", method.config.segmentation_aux_weight)):
            logits = base.upsampled(label.shape[-2:], network(image))[0][head]
            entropy = nn.functional.cross_entropy(logits, label, weight=weights, reduction="sum")
            dice = base.soft_dice_loss(logits, label) / 2
            total = total + factor * (entropy / (weights * counts).sum() + dice)
        total.backward()
    assert_close(gradients({"segmenter": method.segmenter}), gradients({"segmenter": network}))


@pytest.mark.parametrize("name", ["mpscl", "sifa"])
def test_resumes_bit_for_bit(name: str) -> None:
    straight, resumed = make_double(name, 2), make_double(name, 2)
    straight.step(batch(0, size=2), 0)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    for method in (straight, resumed):
        method.step(batch(1, size=2), 1)
    assert_equal_states(resumed.state_dict(), straight.state_dict())


def peak(accumulate: int) -> int:
    """Most bytes that a step of MPSCL allocates beyond what was there before."""
    method = make_double("mpscl", accumulate, layers=(1, 1, 6, 1))
    data = batch(0, size=8)
    method.step(data, 0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        method.step(data, 1)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def test_the_activations_of_one_micro_batch_are_in_memory() -> None:
    whole, half, quarter = (peak(number) for number in (1, 2, 4))
    print(f"peak of a step: {whole / 1e6:.1f} MB, {half / whole:.2f} of it with 2, {quarter / whole:.2f} with 4")
    assert half < 0.6 * whole
    assert quarter < 0.4 * whole
