"""CLAN against its released code: losses, gradients, schedule, and four iterations of its loop, to 1e-9 in float64."""

from __future__ import annotations

import numpy as np
import pytest

from mpscl_ray.methods.clan import disagreement
from mpscl_ray.methods.losses import SOURCE_LABEL, TARGET_LABEL
from tests.golden.released_comparison import (
    Numbers,
    assert_equal,
    assert_gradient,
    assert_same_training,
    batches,
    method_of,
    part,
    released,
)
from tests.golden.released_inputs import CLASSES, ITERATIONS, STEPS, values


@pytest.fixture(scope="module")
def numbers() -> Numbers:
    return released("clan")


def test_losses(numbers: Numbers) -> None:
    numbers = part(numbers, "losses_")
    one, other = (values(seed, 1, CLASSES, 8, 8).mul(2).requires_grad_() for seed in (1, 2))
    weights = disagreement(one, other)
    assert_equal(weights, numbers["map"])
    product = (weights * values(3, *weights.shape)).sum()
    assert_gradient(product, one, numbers["map_grad_one"])
    assert_gradient(product, other, numbers["map_grad_other"])
    adversarial = method_of("clan")._adversarial
    for label in (SOURCE_LABEL, TARGET_LABEL):
        verdict, weight = values(4, 1, 1, 8, 8).requires_grad_(), values(5, 1, 1, 8, 8).abs().requires_grad_()
        loss = adversarial(verdict, label, weight)
        assert_equal(loss, numbers[f"weighted_{label}"])
        assert_gradient(loss, verdict, numbers[f"weighted_{label}_grad"])
        assert_gradient(loss, weight, numbers[f"weighted_{label}_grad_map"])


def test_four_iterations(numbers: Numbers) -> None:
    """Two of the warm-up, one in which the rate decays and pixels still count alike, and one with the weight map.

    The segmentation loss is the released focal loss.
    """
    numbers = part(numbers, "main_")
    method = method_of("clan", segmentation_loss="focal", warmup_fraction=2 / STEPS)
    metrics = assert_same_training(method, batches(1), numbers)
    assert_equal(metrics["loss_segmentation"], numbers["seg"])
    assert_equal(metrics["loss_discriminator_main"], numbers["D_s"] + numbers["D_t"])
    # The released code prints terms with their weights and damping.
    damping = 1 - np.arange(ITERATIONS) / STEPS
    assert_equal(0.001 * damping * metrics["loss_adversarial_main"], numbers["adv"])
    assert_equal(2 * 0.01 * damping * metrics["loss_weight_similarity"], numbers["weight"])


def test_learning_rate(numbers: Numbers) -> None:
    """Of the released run of 100000 iterations: from 0 in the first 5 %, then the decay without a new beginning."""
    rates = []
    for iteration in numbers["losses_lr_at"].tolist():
        method = method_of("clan")
        method.start_phase(100_000)
        weight = method.segmenter.conv1.weight
        before = weight.detach().clone()
        method.step(next(batches(1)), iteration)
        # The first step of SGD is the rate times gradient and weight decay.
        step = weight.grad + 5e-4 * before
        rates.append(float(((before - weight.detach()) * step).sum() / step.square().sum()))
    # Settings of the runs here: ten times the released rate.
    assert_equal(np.array(rates) / 10, numbers["losses_lr"])
