"""AdvEnt, MinEnt, AdaOutput and AdaBN against losses written from their formulas, in plain loops."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mpscl_ray.methods import Batch
from tests.tiny_methods import CLASSES, batch, make_adabn, make_adaoutput, make_advent

Array = NDArray[np.float64]


def bce(logits: Array, answer: int) -> float:
    """Mean binary cross-entropy of logits against one answer."""
    probabilities = 1 / (1 + np.exp(-logits))
    return float(-np.log(probabilities if answer == 1 else 1 - probabilities).mean())


def outputs(segmenter: nn.Module, part: Batch) -> dict[str, dict[str, Tensor]]:
    """Logits at image size by domain and head, batch statistics of each domain by itself."""
    found = {}
    for domain, images in (("source", part.source_image), ("target", part.target_image)):
        output = segmenter(images)
        size = part.source_image.shape[-2:]
        found[domain] = {
            head: F.interpolate(x, size=size, mode="bilinear", align_corners=True)
            for head, x in (("main", output.main), ("aux", output.aux))
        }
    return found


def information(p: Array) -> Array:
    """-p log2(p + 1e-7) / log2 C, written out."""
    return np.array([-x * math.log2(x + 1e-7) / math.log2(CLASSES) for x in p.ravel()]).reshape(p.shape)


def first_step(method: Any) -> tuple[dict[str, float], dict[str, nn.Module], Batch]:
    """Metrics of a first step, and the networks before it."""
    before = copy.deepcopy(method.networks)
    method.start_phase(10)
    part = batch(0)
    return {name: float(value) for name, value in method.step(part, 0).items()}, before, part


def judged(discriminator: nn.Module, maps: Array) -> Array:
    with torch.no_grad():
        return discriminator(torch.from_numpy(maps).float()).double().numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["advent", "bce", "least_squares"])
def test_adversarial_losses_are_those_of_the_formulas(kind: str) -> None:
    method = make_advent() if kind == "advent" else make_adaoutput(adversarial_loss=kind)
    metrics, before, part = first_step(method)

    def loss(x: Array, answer: int) -> float:
        return float(((x - answer) ** 2).mean()) if kind == "least_squares" else bce(x, answer)

    for head in ("main", "aux"):
        maps = {}
        for domain, logits in outputs(copy.deepcopy(before["segmenter"]), part).items():
            p = logits[head].detach().double().softmax(dim=1).numpy()
            maps[domain] = information(p) if kind == "advent" else p
        discriminator = before[f"discriminator_{head}"]
        on = {domain: judged(discriminator, x) for domain, x in maps.items()}
        assert metrics[f"loss_adversarial_{head}"] == pytest.approx(loss(on["target"], 0), rel=1e-4)
        halves = loss(on["source"], 0) / 2 + loss(on["target"], 1) / 2
        assert metrics[f"loss_discriminator_{head}"] == pytest.approx(halves, rel=1e-4)


def test_minimised_entropy_is_that_of_the_formula() -> None:
    method = make_advent(variant="minent")
    assert method.networks.keys() == {"segmenter"}
    metrics, before, part = first_step(method)
    for head, logits in outputs(before["segmenter"], part)["target"].items():
        p = logits.detach().double().softmax(dim=1).numpy()
        total = sum(-x * math.log2(x + 1e-30) for x in p.ravel())
        pixels = p.shape[0] * p.shape[2] * p.shape[3]
        assert metrics[f"loss_entropy_{head}"] == pytest.approx(total / (pixels * math.log2(CLASSES)), rel=1e-4)
    assert not any("discriminator" in name for name in metrics)


@pytest.mark.parametrize("kind", ["advent", "minent", "adaoutput"])
def test_the_segmenter_goes_down_its_adversarial_loss(kind: str) -> None:
    """Its gradient by the weight of the term is that of the term written out here, sign included."""

    def make(weight: float) -> Any:
        weights = {"lambda_main": weight, "lambda_aux": 0.0}
        if kind == "adaoutput":
            return make_adaoutput(**weights)
        return make_advent(variant="minent" if kind == "minent" else "adversarial", **weights)

    gradients = []
    for weight in (0.0, 10.0):
        method = make(weight)
        _, before, part = first_step(method)
        gradients.append(method.networks["segmenter"].conv1.weight.grad)
    p = outputs(before["segmenter"], part)["target"]["main"].softmax(dim=1)
    if kind == "minent":
        loss = -(p * p.log()).sum(dim=1).mean() / math.log(CLASSES)
    else:
        maps = p if kind == "adaoutput" else -p * (p + 1e-7).log() / math.log(CLASSES)
        loss = F.binary_cross_entropy_with_logits(
            before["discriminator_main"](maps), torch.zeros(4, 1, 1, 1), reduction="mean"
        )
    (expected,) = torch.autograd.grad(10 * loss, [before["segmenter"].conv1.weight])
    scale = float(expected.abs().max())
    assert scale > 0
    torch.testing.assert_close(gradients[1] - gradients[0], expected, rtol=0, atol=2e-3 * scale)


def test_adabn_averages_the_batch_statistics_of_the_target() -> None:
    method = make_adabn()
    method.segmenter.bn1.running_mean.fill_(7.0)
    before = copy.deepcopy(method.segmenter)
    method.start_phase(3)
    means, variances = [], []
    for step in range(3):
        part = batch(step)
        assert part.target_image is not None
        method.step(part, step)
        x = before.conv1(part.target_image).detach().double().numpy()
        means.append(x.mean(axis=(0, 2, 3)))
        variances.append(x.transpose(1, 0, 2, 3).reshape(x.shape[1], -1).var(axis=1, ddof=1))
    np.testing.assert_allclose(method.segmenter.bn1.running_mean, np.mean(means, axis=0), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(method.segmenter.bn1.running_var, np.mean(variances, axis=0), rtol=1e-4)
    for (name, ours), theirs in zip(method.segmenter.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
