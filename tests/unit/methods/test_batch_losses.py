"""The losses of the batch against their formulas, written with NumPy, and in the methods that have them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mpscl_ray.config import METHOD_CONFIGS, OptimConfig, PrecisionConfig, load_config, method_of_phase
from mpscl_ray.errors import ConfigError
from mpscl_ray.methods import METHODS
from mpscl_ray.methods.base import batch_segmentation_loss
from mpscl_ray.methods.batch_losses import batch_dice_loss, floored_cross_entropy
from mpscl_ray.methods.losses import class_counts, weighted_cross_entropy
from tests.tiny_methods import CLASSES, CPU, MAKE, assert_equal_states, batch, segmenter


def picture() -> tuple[Tensor, Tensor]:
    """Logits (3, C, 6, 8) and labels, in which class 0 is frequent and one slice has nothing else."""
    generator = torch.Generator().manual_seed(2)
    logits = 2 * torch.randn(3, CLASSES, 6, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (3, 6, 8), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.7] = 0
    labels[0] = 0
    return logits.requires_grad_(), labels


def reference(logits: Tensor, labels: Tensor, floor: float) -> tuple[float, float]:
    """Cross-entropy and Dice, pixel by pixel."""
    x = np.moveaxis(logits.detach().numpy(), 1, -1).reshape(-1, CLASSES)
    y = labels.numpy().ravel()
    p = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    weights = np.array([max(1 - np.mean(y == c), floor) for c in range(CLASSES)])
    entropy = sum(-weights[c] * np.log(row[c]) for row, c in zip(p, y, strict=True)) / sum(weights[c] for c in y)
    dice = [2 * p[y == c, c].sum() / ((p[:, c] ** 2).sum() + (y == c).sum() + 1e-7) for c in range(CLASSES)]
    return float(entropy), float(1 - np.mean(dice))


@pytest.mark.parametrize("floor", [0.0, 0.4, 1.0])
def test_values_are_those_of_the_formulas(floor: float) -> None:
    logits, labels = picture()
    counts = class_counts(labels, CLASSES)
    entropy, dice = reference(logits, labels, floor)
    loss = batch_segmentation_loss({"main": logits, "aux": logits.flip(1)}, labels, counts, 0.1, floor)
    other = sum(reference(logits.flip(1), labels, floor))
    found = {name: value.item() for name, value in (loss.parts | {"total": loss.total}).items()}
    assert found["loss_cross_entropy_main"] == pytest.approx(entropy, rel=1e-12)
    assert found["loss_dice_main"] == pytest.approx(dice, rel=1e-12)
    assert found["total"] == pytest.approx(entropy + dice + 0.1 * other, rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda x: batch_segmentation_loss({"main": x}, labels, counts, 0.1, floor).total, (logits,)
    )


def test_the_floors_ends_are_the_plain_mean_and_the_weights_as_released() -> None:
    logits, labels = picture()
    counts = class_counts(labels, CLASSES)
    plain = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(floored_cross_entropy(logits, labels, counts, 1.0), plain, rtol=1e-12, atol=0)
    released = torch.div(*weighted_cross_entropy(logits, labels, counts))
    torch.testing.assert_close(floored_cross_entropy(logits, labels, counts, 0.0), released, rtol=1e-12, atol=0)
    alone = labels[:1], class_counts(labels[:1], CLASSES)
    torch.testing.assert_close(
        floored_cross_entropy(logits[:1], *alone, 0.0), torch.nn.functional.cross_entropy(logits[:1], alone[0])
    )


def test_a_false_positive_in_a_slice_without_the_class_has_a_gradient_by_dice_of_the_batch() -> None:
    logits, labels = picture()
    (gradient,) = torch.autograd.grad(batch_dice_loss(logits, labels), logits)
    assert (gradient[0, 0] < 0).all(), "the first slice is background alone: more of it is better"
    labels[labels == 1] = 2
    (gradient,) = torch.autograd.grad(batch_dice_loss(logits, labels), logits)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"sifa", "adabn"}))
def test_every_method_with_a_deeplab_takes_the_loss_of_the_batch(name: str) -> None:
    steps: list[dict[str, Any]] = []
    batch_dice = {"segmentation_loss": "plain"}
    for settings in ({}, batch_dice, batch_dice | {"class_weight_floor": 0.2}):
        method = MAKE[name](**settings)
        method.start_phase(10)
        steps.append(method.step(batch(0), 0))
        assert float(steps[-1]["non_finite"]) == 0
    released, plain, floored = ({key: float(value) for key, value in step.items()} for step in steps)
    assert released.keys() == plain.keys()
    for head in ("main", "aux"):
        assert released[f"loss_dice_{head}"] != plain[f"loss_dice_{head}"] == floored[f"loss_dice_{head}"]
        assert len({step[f"loss_cross_entropy_{head}"] for step in (released, plain, floored)}) == 3


def test_adamw_trains_and_resumes_bit_for_bit() -> None:
    def make(seed: int) -> Any:
        config = METHOD_CONFIGS["segmentation"](segmentation_loss="plain")
        optim = OptimConfig(kind="adamw", lr=2e-3)
        return METHODS["segmentation"](segmenter(seed), config, optim, CLASSES, CPU, PrecisionConfig(), seed)

    straight = make(0)
    straight.start_phase(20)
    losses = [float(straight.step(batch(step), step)["loss_segmentation"]) for step in range(20)]
    assert losses[-1] < 0.7 * losses[0]
    first, second = make(0), make(5)
    first.start_phase(20)
    for step in range(10):
        first.step(batch(step), step)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in range(10, 20):
        second.step(batch(step), step)
    assert_equal_states(second.state_dict(), straight.state_dict())


@pytest.mark.parametrize(
    ("method", "given", "first"),
    [
        ("mpscl", "plain", "plain"),
        ("adabn", "plain", "plain"),
        ("clan", "plain", "plain"),
        ("clan", "focal", "released"),
        ("cag", "ce", "released"),
    ],
)
def test_the_source_only_phase_has_the_methods_loss_where_it_knows_it(method: str, given: str, first: str) -> None:
    config = load_config(f"small/{method}", [f"method.segmentation_loss={given}", "method.class_weight_floor=0.3"])
    settings = method_of_phase(config, "source_only")
    assert (settings.segmentation_loss, settings.class_weight_floor) == (first, 0.3)
    assert method_of_phase(config, "adaptation").segmentation_loss == given


def test_sub_steps_of_sgd_are_refused_with_adamw() -> None:
    with pytest.raises(ConfigError, match=r"optim\.legacy_param_repeats are sub-steps of SGD.*; set optim\.legacy"):
        load_config("mr2ct/mpscl_released", ["optim.kind=adamw"])
    config = load_config("mr2ct/mpscl_released", ["optim.kind=adamw", "optim.legacy_param_repeats=null"])
    assert config.optim.kind == "adamw"


def test_weight_decay_by_default_is_that_of_the_optimiser() -> None:
    decays = [OptimConfig(kind=kind).segmenter_weight_decay for kind in ("sgd", "adamw")]  # type: ignore[arg-type]
    assert decays == [5e-4, 1e-4]
    assert OptimConfig(kind="adamw", weight_decay=0.0).segmenter_weight_decay == 0.0
