"""AdvEnt, MinEnt, IntraDA's training and AdaOutput against the released code of ADVENT, IntraDA and AdaptSegNet.

Losses, gradients and four iterations of the released loops agree to 1e-9 in float64 where a test does not say why not.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpscl_ray.methods.losses import (
    SOURCE_LABEL,
    TARGET_LABEL,
    domain_loss,
    self_information,
)
from mpscl_ray.methods.optim import poly_lr
from mpscl_ray.networks.deeplab import DeepLabV2
from tests.golden.released_comparison import (
    AS_RELEASED,
    Numbers,
    assert_equal,
    assert_gradient,
    assert_same_training,
    batches,
    method_of,
    part,
    released,
)
from tests.golden.released_inputs import CLASSES, SIZE, classes, fill, values

OWN_WEIGHTS: dict[str, Any] = {"lambda_main": 0.001, "lambda_aux": 0.0002}
"""The released weights; those of MPSCL's fork are the default here."""


@pytest.fixture(scope="module")
def adaptsegnet() -> Numbers:
    return released("adaptsegnet")


@pytest.fixture(scope="module")
def of_advent() -> Numbers:
    return released("advent")


def released_map(self: Any, logits: Tensor) -> Tensor:
    """The map of ADVENT, which has 1e-30 in the logarithm where MPSCL's fork of it has 1e-7."""
    return self_information(logits, eps=1e-30)


OF_ADVENT = {**AS_RELEASED, "discriminated_map": released_map}


def test_losses_of_advent(of_advent: Numbers) -> None:
    numbers = part(of_advent, "losses_")
    logits = values(1, 2, CLASSES, 8, 8).mul(3).requires_grad_()
    loss = F.cross_entropy(logits, classes(2, 2, 8, 8))
    assert_equal(loss, numbers["loss_cross_entropy"])
    assert_gradient(loss, logits, numbers["loss_cross_entropy_grad"])
    # The constant 1e-7 is the one thing that differs: it moves a map by 1e-7 at most, a gradient by 1e-6.
    for eps, relative in ((1e-30, 1e-9), (1e-7, 2e-6)):
        information = self_information(logits, eps=eps)
        assert_equal(information, numbers["map"], relative)
        assert_gradient((information * values(4, *information.shape)).sum(), logits, numbers["map_grad"], relative)
        entropy = information.sum(dim=1).mean()
        assert_equal(entropy, numbers["loss_entropy"], relative)
        assert_gradient(entropy, logits, numbers["loss_entropy_grad"], relative)
    for label in (SOURCE_LABEL, TARGET_LABEL):
        verdict = values(3, 2, 1, 3, 3).requires_grad_()
        assert_equal(domain_loss(verdict, label), numbers[f"loss_bce_{label}"])
        assert_gradient(domain_loss(verdict, label), verdict, numbers[f"loss_bce_{label}_grad"])
    assert_equal([poly_lr(2.5e-4, i, 250_000) for i in (0, 1, 119_999)], numbers["lr"])


@pytest.mark.parametrize(("name", "run"), [("advent", "advent_"), ("intrada", "train_")])
def test_four_iterations_of_advent(name: str, run: str) -> None:
    """IntraDA trains with its own copy of this loop, where the source is the easy part of the target."""
    assert_same_training(method_of(name, OF_ADVENT, **OWN_WEIGHTS), batches(2), part(released(name), run))


def test_four_iterations_of_minent(of_advent: Numbers) -> None:
    method = method_of("advent", OF_ADVENT, variant="minent", **OWN_WEIGHTS)
    assert_same_training(method, batches(2), part(of_advent, "minent_"))


def test_four_iterations_of_advent_with_the_constant_used_here(of_advent: Numbers) -> None:
    assert_same_training(method_of("advent", **OWN_WEIGHTS), batches(2), part(of_advent, "advent_"), 1e-5)


def test_what_the_segmentation_loss_of_this_package_changes(of_advent: Numbers) -> None:
    """Weighted cross-entropy and Dice are on purpose: they change the segmenter's gradients and nothing else."""
    method = method_of("advent", {}, **OWN_WEIGHTS)
    metrics = method.step(next(batches(2)), 0)
    numbers = part(of_advent, "advent_")
    for name in ("loss_adversarial_main", "loss_adversarial_aux", "loss_discriminator_main", "loss_discriminator_aux"):
        assert_equal(metrics[name], numbers[name][0], 1e-5)
    assert abs(float(metrics["loss_cross_entropy_main"]) - float(numbers["loss_cross_entropy_main"][0])) > 1e-3


class FirstTwoRates(nn.Module):
    """Heads as AdaptSegNet's network has them: its loop over four convolutions returns after the second."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.conv2d_list = head.conv2d_list

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.conv2d_list[0](x) + self.conv2d_list[1](x)
        return total


@pytest.mark.parametrize("name", ["adaptsegnet", "clan"])
def test_networks(name: str) -> None:
    """One bottleneck a stage. CLAN has both heads on the fourth stage; AdaptSegNet's heads are FirstTwoRates."""
    numbers = part(released(name), "network_")
    network = DeepLabV2(CLASSES, layers=(1, 1, 1, 1), twin_heads=name == "clan").double()
    fill(network, 7)
    if name == "adaptsegnet":
        network.layer5, network.layer6 = (FirstTwoRates(head) for head in (network.layer5, network.layer6))  # type: ignore[assignment]
    image = values(8, 1, 3, SIZE, SIZE)
    with torch.no_grad():
        for mode in ("train", "eval"):
            output = network.train(mode == "train")(image)
            assert_equal(output.main, numbers[f"{mode}_main"])
            assert_equal(output.aux, numbers[f"{mode}_aux"])


def test_the_cross_entropy_of_these_runs_is_that_of_adaptsegnet(adaptsegnet: Numbers) -> None:
    numbers = part(adaptsegnet, "losses_")
    logits = values(1, 2, CLASSES, 8, 8).mul(3).requires_grad_()
    loss = F.cross_entropy(logits, classes(2, 2, 8, 8))
    assert_equal(loss, numbers["loss_cross_entropy"])
    assert_gradient(loss, logits, numbers["loss_cross_entropy_grad"])


@pytest.mark.parametrize(("gan", "loss"), [("vanilla", "bce"), ("ls", "least_squares")])
def test_four_iterations_of_adaptsegnet(adaptsegnet: Numbers, gan: str, loss: str) -> None:
    method = method_of("adaoutput", adversarial_loss=loss, **OWN_WEIGHTS)
    assert_same_training(method, batches(2), part(adaptsegnet, f"{gan}_"))
