"""CLAN against its formulas in plain loops, with several images in a batch."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mpscl_ray.methods.clan import disagreement, head_weight_similarity
from mpscl_ray.methods.losses import focal_loss
from tests.tiny_methods import CLASSES, SIZE, batch, make, segmenter


def softmax(z: Any) -> Any:
    e = np.exp(z - z.max())
    return e / e.sum()


def test_the_weight_map_is_of_each_image_by_itself() -> None:
    """Reshaped to (1, 1, H, W), as released, it would be wrong for more than one image."""
    one, other = torch.randn(2, 3, CLASSES, 4, 5, generator=torch.Generator().manual_seed(1)).unbind()
    ours = disagreement(one, other)
    assert ours.shape == (3, 1, 4, 5)
    for image in range(3):
        for row in range(4):
            for column in range(5):
                p, q = (softmax(z[image, :, row, column].double().numpy()) for z in (one, other))
                expected = 1 - p @ q / (np.linalg.norm(p) * np.linalg.norm(q))
                assert float(ours[image, 0, row, column]) == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(ours[1:2], disagreement(one[1:2], other[1:2]))


def test_the_similarity_of_the_heads_is_over_weights_and_biases() -> None:
    network = segmenter(0, twin_heads=True)
    assert network.layer5 is not None
    vectors = []
    for head in (network.layer5, network.layer6):
        vectors.append(np.concatenate([p.detach().double().numpy().ravel() for p in head.parameters()]))
    a, b = vectors
    expected = a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) + 1
    assert head_weight_similarity(network).item() == pytest.approx(expected, rel=1e-5)
    network.layer5.load_state_dict(network.layer6.state_dict())
    assert head_weight_similarity(network).item() == pytest.approx(2)


def test_focal_loss() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(2, CLASSES, 3, 3, generator=generator)
    labels = torch.randint(CLASSES, (2, 3, 3), generator=generator)
    for gamma in (0.0, 2.0):
        values = []
        for image, row, column in np.ndindex(2, 3, 3):
            p = softmax(logits[image, :, row, column].double().numpy())[labels[image, row, column]]
            values.append((1 - p) ** gamma * -math.log(p))
        total, pixels = focal_loss(logits, labels, gamma)
        assert float(total / pixels) == pytest.approx(np.mean(values), rel=1e-5)


def assert_step_is_the_formulas(method: Any, iteration: int, weighted: bool) -> None:
    """One step of 100; losses and gradients against the formulas written out here."""
    c, damping = method.config, 1 - iteration / 100
    networks = copy.deepcopy(method.networks)
    part = batch(3)
    found = {name: float(value) for name, value in method.step(part, iteration).items()}
    logits = {}
    for domain, image in (("source", part.source_image), ("target", part.target_image)):
        output = networks["segmenter"](image)
        logits[domain] = [
            F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", align_corners=True) for x in (output.aux, output.main)
        ]
    p, q = (x.softmax(dim=1) for x in logits["target"])
    w = 1 - (p * q).sum(dim=1) / (p.norm(dim=1) * q.norm(dim=1))

    def judged(domain: str) -> Tensor:
        verdict = networks["discriminator_main"](sum(logits[domain]).softmax(dim=1))
        return F.interpolate(verdict, size=(SIZE, SIZE), mode="bilinear", align_corners=True)[:, 0]

    def on(domain: str, answer: float, weights: Tensor | None) -> Tensor:
        verdict = judged(domain)
        pixels = F.binary_cross_entropy_with_logits(verdict, torch.full_like(verdict, answer), reduction="none")
        return ((c.epsilon + c.lambda_local * weights) * pixels).mean() if weights is not None else pixels.mean()

    adversarial = on("target", 0.0, w if weighted else None)
    discriminator = on("source", 0.0, None) + on("target", 1.0, w.detach() if weighted else None)
    segmentation = torch.stack([torch.div(*focal_loss(x, part.source_label, 2.0)) for x in logits["source"]]).sum()
    total = segmentation + c.lambda_adversarial * damping * adversarial
    total = total + 2 * c.lambda_weight * damping * head_weight_similarity(networks["segmenter"])
    parameters = networks["segmenter"].conv1.weight, networks["segmenter"].layer5.conv2d_list[0].weight
    gradients = torch.autograd.grad(total, parameters)
    expected = {
        "loss_segmentation": segmentation.item(),
        "loss_adversarial_main": adversarial.item(),
        "loss_discriminator_main": discriminator.item(),
        "disagreement": w.mean().item(),
    }
    ours = method.networks["segmenter"]
    for gradient, parameter in zip(gradients, (ours.conv1.weight, ours.layer5.conv2d_list[0].weight), strict=True):
        scale = float(gradient.abs().max())
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-3 * scale)
    assert expected["disagreement"] > 1e-3
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize(("iteration", "weighted"), [(2, False), (5, False), (6, True), (60, True)])
def test_a_step_is_that_of_the_formulas(iteration: int, weighted: bool) -> None:
    """Preheat over 5 of 100 iterations; the gradient flows through the weight map; damping by the phase's length."""
    method = make("clan", segmentation_loss="focal", lambda_adversarial=0.5, lambda_weight=0.3)
    method.start_phase(100)
    assert_step_is_the_formulas(method, iteration, weighted)
    groups = method.optimisers._optimisers["segmenter"]._optimiser.param_groups
    (rate,) = {float(group["lr"]) / group["base_lr"] for group in groups}
    assert rate == pytest.approx(iteration / 5 if iteration < 5 else (1 - iteration / 100) ** 0.9)


def test_a_detached_weight_map_changes_the_gradient_alone() -> None:
    steps = []
    for detached in (False, True):
        method = make("clan", detach_weight_map=detached, lambda_adversarial=0.5, warmup_fraction=0.0)
        method.start_phase(10)
        metrics = method.step(batch(0), 0)
        steps.append((float(metrics["loss_adversarial_main"]), method.networks["segmenter"].conv1.weight.grad))
    assert steps[0][0] == steps[1][0]
    assert not torch.allclose(steps[0][1], steps[1][1], rtol=1e-3)


def test_the_prediction_is_the_sum_of_both_heads() -> None:
    method = make("clan")
    image = batch(0).source_image
    with torch.no_grad():
        output = method.networks["segmenter"].eval()(image)
    logits = F.interpolate(output.aux + output.main, size=(SIZE, SIZE), mode="bilinear", align_corners=True)
    torch.testing.assert_close(method.predict(image), logits.softmax(dim=1))
    torch.testing.assert_close(method.networks["segmenter"].logits(image), logits)
