"""Sub-steps, decay, and the guard against non-finite steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from mpscl_ray.errors import DataError
from mpscl_ray.methods.optim import (
    SEGMENTER_OPTIMISERS,
    NetworkAdam,
    NonFiniteGuard,
    OptimConfig,
    SegmenterAdamW,
    SegmenterSGD,
    Snapshot,
    parameter_kind,
    poly_lr,
)
from mpscl_ray.networks import initialise
from mpscl_ray.networks.deeplab import DeepLabV2

FINE = torch.zeros(())
BAD = torch.ones(())


def network(*, affine: bool = False) -> DeepLabV2:
    module = DeepLabV2(3, (1, 2, 1, 1), base_channels=4, in_channels=1, train_bn_affine=affine).double()
    initialise(module, 0)
    return module


def fill_gradients(module: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gradients = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            gradients[name] = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.grad = gradients[name].clone()
    return gradients


def released_repeats(module: DeepLabV2) -> dict[str, int]:
    """How often the released code's two generators yield each parameter."""
    backbone = [module.conv1, module.bn1, module.layer1, module.layer2, module.layer3, module.layer4]
    names = {id(parameter): name for name, parameter in module.named_parameters() if parameter.requires_grad}
    repeats = dict.fromkeys(names.values(), 0)
    for stage in backbone:
        for part in stage.modules():
            for parameter in part.parameters():
                if id(parameter) in names:
                    repeats[names[id(parameter)]] += 1
    for head in (module.layer5, module.layer6):
        assert head is not None
        for parameter in head.parameters():
            repeats[names[id(parameter)]] += 1
    return repeats


def test_kinds_repeat_as_in_the_released_code() -> None:
    repeats = {"stem": 1, "block": 3, "downsample": 4, "head": 1}
    for name, expected in released_repeats(network()).items():
        assert repeats[parameter_kind(name)] == expected, name


@pytest.mark.parametrize("legacy", [True, False])
def test_sub_steps_equal_a_loop_over_a_list_with_repeats(legacy: bool) -> None:
    module = network()
    config = OptimConfig(
        lr=0.01,
        weight_decay=0.05,
        legacy_param_repeats={"stem": 1, "block": 3, "downsample": 4, "head": 1} if legacy else None,
    )
    optimiser = SegmenterSGD(module, config)
    repeats = (
        released_repeats(module) if legacy else {name: 1 for name, p in module.named_parameters() if p.requires_grad}
    )
    expected = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    velocity: dict[str, Tensor] = {}
    for iteration in range(3):
        optimiser.start_iteration(iteration, 10)
        gradients = fill_gradients(module, iteration)
        for name, parameter in expected.items():
            rate = 0.01 * (10 if name.startswith(("layer5", "layer6")) else 1) * (1 - iteration / 10) ** 0.9
            for _ in range(repeats[name]):
                gradients[name] += 0.05 * parameter
                velocity[name] = 0.9 * velocity[name] + gradients[name] if name in velocity else gradients[name].clone()
                parameter -= rate * velocity[name]
        optimiser.step(FINE)
    for name, parameter in module.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-12, atol=1e-14, msg=name)


def test_frozen_norms_are_not_decayed() -> None:
    module = network()
    optimiser = SegmenterSGD(module, OptimConfig(weight_decay=0.5))
    optimiser.start_iteration(0, 10)
    fill_gradients(module, 0)
    optimiser.step(FINE)
    assert torch.equal(module.bn1.weight, torch.ones_like(module.bn1.weight))
    assert not any(".bn" in name for name in optimiser.state_dict()["momentum_buffer"])


@pytest.mark.parametrize("weight_decay", [None, 0.05])
def test_adamw_is_torchs_with_the_decay_of_the_rate(weight_decay: float | None) -> None:
    module, reference = network(affine=True), network(affine=True)
    optimiser = SegmenterAdamW(module, OptimConfig(kind="adamw", lr=0.01, weight_decay=weight_decay))
    expected = torch.optim.AdamW(
        reference.parameters(), betas=(0.9, 0.999), weight_decay=weight_decay or 1e-4, fused=False
    )
    for iteration in range(4):
        optimiser.start_iteration(iteration, 10)
        for part in (module, reference):
            fill_gradients(part, iteration)
        optimiser.step(FINE)
        expected.param_groups[0]["lr"] = 0.01 * (1 - iteration / 10) ** 0.9
        expected.step()
    for (name, parameter), other in zip(module.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-12, atol=1e-14, msg=name)


def test_frozen_norms_are_not_decayed_by_adamw() -> None:
    module = network()
    optimiser = SegmenterAdamW(module, OptimConfig(kind="adamw", lr=0.1, weight_decay=0.5))
    optimiser.start_iteration(0, 10)
    fill_gradients(module, 0)
    optimiser.step(FINE)
    assert torch.equal(module.bn1.weight, torch.ones_like(module.bn1.weight))
    assert not any(".bn" in name for name in optimiser.state_dict()["exp_avg"])


@pytest.mark.parametrize(("saved", "own"), [("sgd", "adamw"), ("adamw", "sgd")])
def test_the_state_of_another_optimiser_is_refused(saved: str, own: str) -> None:
    one, other = (SEGMENTER_OPTIMISERS[kind](network(), OptimConfig()) for kind in (saved, own))
    with pytest.raises(DataError, match=r"has nothing for the optimiser's '\w+' of conv1\.weight.*; resume with the"):
        other.load_state_dict(one.state_dict())


@pytest.mark.parametrize("legacy", [None, {"block": 3}])
def test_a_flagged_step_updates_neither_weights_nor_state(legacy: dict[str, int] | None) -> None:
    module = network()
    config = OptimConfig(legacy_param_repeats=legacy)  # type: ignore[arg-type]
    for optimiser in (
        SegmenterSGD(module, config),
        SegmenterAdamW(module, config),
        NetworkAdam(module, config.lr_discriminator, config.betas, config.poly_power),
    ):
        for flag in (BAD, FINE, BAD):
            weights = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
            state = {k: {n: t.clone() for n, t in v.items()} for k, v in optimiser.state_dict().items()}
            optimiser.start_iteration(0, 10)
            fill_gradients(module, 0)
            optimiser.step(flag)
            moved = not torch.equal(module.conv1.weight, weights["conv1.weight"])
            assert moved == (flag is FINE)
            if flag is BAD:
                for name, parameter in module.named_parameters():
                    assert torch.equal(parameter, weights[name])
                for kind, tensors in optimiser.state_dict().items():
                    for name, tensor in tensors.items():
                        assert torch.equal(tensor, state[kind][name]), (kind, name)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_guard_is_sticky_and_keeps_the_first_bad_losses(bad: float, place: str) -> None:
    guard = NonFiniteGuard(torch.device("cpu"))
    good = {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}
    guard.update(good, [torch.ones(3)])
    assert float(guard.flag) == 0
    wrong = good | ({"b": torch.tensor(bad)} if place == "loss" else {})
    guard.update(wrong, [torch.ones(3), torch.tensor([0.0, bad if place == "gradient" else 0.0])])
    assert float(guard.flag) == 1
    guard.update({"a": torch.tensor(5.0), "b": torch.tensor(6.0)}, [torch.ones(3)])
    assert float(guard.flag) == 1
    losses = {name: float(value) for name, value in guard.losses().items()}
    assert losses["a"] == 1.0
    assert math.isfinite(losses["b"]) == (place == "gradient")
    assert math.isfinite(losses["gradient_norm"]) == (place == "loss")


def test_snapshot_restores_only_where_flagged() -> None:
    tensors = [torch.arange(6.0).reshape(2, 3), torch.tensor(3), torch.zeros(2, dtype=torch.float64)]
    before = [tensor.clone() for tensor in tensors]
    for flag, restored in ((FINE, False), (BAD, True)):
        snapshot = Snapshot(tensors)
        kept = [tensor.clone() for tensor in tensors]
        tensors[0].fill_(torch.nan if restored else 7.0)
        tensors[1].add_(1)
        snapshot.restore_where(flag)
        for tensor, value in zip(tensors, kept, strict=True):
            assert tensor.dtype == value.dtype
        assert torch.equal(tensors[1], kept[1]) == restored
        assert torch.equal(tensors[0], kept[0]) == restored
    assert torch.equal(tensors[2], before[2])
    Snapshot([]).restore_where(BAD)


def test_poly_lr() -> None:
    assert poly_lr(0.1, 0, 100) == 0.1
    assert poly_lr(0.1, 50, 100) == pytest.approx(0.1 * 0.5**0.9)
    assert poly_lr(0.1, 50, 100, power=2.0) == pytest.approx(0.025)
    assert poly_lr(0.1, 100, 100) == 0.0
    assert poly_lr(0.1, 101, 100) == 0.0
