"""What is particular to MPSCL: its losses, prototypes, running statistics and precisions."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor

from mpscl_ray.config import PrecisionConfig
from mpscl_ray.methods.losses import MASK_EPS, cosine_to_prototypes, margin_contrastive_loss
from mpscl_ray.methods.mpscl import prototype_angles
from mpscl_ray.methods.prototypes import downsample_labels, self_paced_pseudo_labels
from tests.tiny_methods import (
    CLASSES,
    assert_equal_states,
    batch,
    make_advent,
    make_mpscl,
    segmenter,
    weights_checksum,
)


@pytest.mark.parametrize("form", ["released", "paper"])
@pytest.mark.parametrize("discriminator", ["fc", "patchgan"])
def test_a_class_that_is_nowhere_and_a_batch_of_one_class_are_finite(form: str, discriminator: str) -> None:
    method = make_mpscl(margin_form=form, discriminator=discriminator)
    method.start_phase(10)
    for step in range(4):
        part = batch(step)
        label = part.source_label.clamp(max=1) if step < 3 else torch.zeros_like(part.source_label)
        metrics = method.step(dataclasses.replace(part, source_label=label), step)
        assert all(math.isfinite(float(value)) for value in metrics.values())
    assert torch.equal(method.prototypes[2], torch.zeros(method.prototypes.shape[1]))
    assert float(metrics["non_finite"]) == 0


@pytest.mark.parametrize("form", ["released", "paper"])
def test_no_selected_pixel_is_no_loss(form: str) -> None:
    method = make_mpscl(margin_form=form, delta_th=2.0)
    method.start_phase(10)
    metrics = method.step(batch(0), 0)
    assert float(metrics["pseudo_label_fraction"]) == 0
    assert float(metrics["loss_contrastive_target"]) == 0
    assert float(metrics["non_finite"]) == 0


@pytest.mark.parametrize("form", ["released", "paper"])
def test_target_loss_is_a_mean_over_selected_pixels(form: str) -> None:
    method = make_mpscl(margin_form=form)
    method.start_phase(10)
    network, c = copy.deepcopy(method.segmenter), method.config
    metrics = method.step(batch(0), 0)
    with torch.no_grad():
        cosine = cosine_to_prototypes(network(batch(0).target_image).features, method.prototypes)
    nearest, mask = self_paced_pseudo_labels(cosine, c.delta_th)
    scale = (c.temperature_target, c.base_temperature)
    sums = margin_contrastive_loss(cosine, nearest, c.margin_target, *scale, c.margin_form, weights=mask)
    numerator, denominator = float(sums.numerator), float(sums.denominator)
    assert 0 < denominator < 4 * 9 * 9
    expected = numerator / (denominator + (MASK_EPS if form == "released" else 0))
    assert float(metrics["loss_contrastive_target"]) == pytest.approx(expected, rel=1e-6)
    assert float(metrics["pseudo_label_fraction"]) == pytest.approx(denominator / (4 * 9 * 9))


def test_the_warm_up_is_mpscl_without_contrast() -> None:
    """AdvEnt updates the networks as the adaptation with beta = gamma = 0 does, bit for bit."""
    warm_up, baseline = make_advent(), make_mpscl(beta=0, gamma=0)
    for method in (warm_up, baseline):
        method.start_phase(10)
    for step in range(3):
        ours, theirs = warm_up.step(batch(step), step), baseline.step(batch(step), step)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert_equal_states(warm_up.state_dict()["networks"], baseline.state_dict()["networks"])
    # Nor are prototypes computed, for which a pass over the source would be needed.
    baseline.prepare(None)  # type: ignore[arg-type]
    assert not baseline.prototypes.any()


def test_prototypes_start_as_the_mean_feature_over_all_slices() -> None:
    method = make_mpscl()
    method.start_phase(10)
    method.step(batch(0), 0)
    before = weights_checksum(method.networks)
    parts = [batch(step, size) for step, size in ((1, 4), (2, 1), (3, 3))]
    method.initialise_prototypes((part.source_image, part.source_label) for part in parts)
    assert weights_checksum(method.networks) == before

    network = method.segmenter.eval()
    with torch.no_grad():
        features = network(torch.cat([part.source_image for part in parts])).features
    network.train()
    labels = downsample_labels(torch.cat([part.source_label for part in parts]), (9, 9))
    for number in range(CLASSES):
        expected = features.permute(0, 2, 3, 1)[labels == number].mean(dim=0)
        torch.testing.assert_close(method.prototypes[number], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("domains", ["both", "target"])
def test_which_domains_update_the_running_statistics(domains: str) -> None:
    method = make_mpscl(bn_running_stats=domains)
    method.start_phase(10)
    expected = copy.deepcopy(method.segmenter)
    part = batch(0)
    assert part.target_image is not None
    method.step(part, 0)
    with torch.no_grad():
        if domains == "both":
            expected(part.source_image)
        expected(part.target_image)
    for (key, ours), reference in zip(method.segmenter.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(ours, reference, msg=key)


def test_without_auxiliary_head() -> None:
    method = make_mpscl(network=segmenter(0, multi_level=False))
    assert method.networks.keys() == {"segmenter", "discriminator_main"}
    method.start_phase(10)
    metrics = method.step(batch(0), 0)
    assert not any("aux" in key for key in metrics)


def test_total_loss_weighs_its_terms() -> None:
    """The gradient is linear in each weight of Eq. (11)."""

    def gradient(**weights: float) -> Tensor:
        zero = {"gamma": 1e-30, "beta": 0.0, "lambda_main": 0.0, "lambda_aux": 0.0, "segmentation_aux_weight": 0.0}
        method = make_mpscl(**{**zero, **weights})
        method.start_phase(10)
        method.step(batch(0), 0)
        found = method.segmenter.conv1.weight.grad
        assert found is not None
        return found.double()

    base = gradient()
    for name in ("gamma", "beta", "lambda_main", "lambda_aux", "segmentation_aux_weight"):
        one, three = gradient(**{name: 1.0}) - base, gradient(**{name: 3.0}) - base
        assert one.norm() > 1e-5 * base.norm(), name
        torch.testing.assert_close(three, 3 * one, rtol=0, atol=1e-4 * float(base.norm()), msg=name)


def test_halved_discriminator_loss() -> None:
    losses = []
    for halve in (True, False):
        method = make_mpscl(halve_discriminator_loss=halve)
        method.start_phase(10)
        losses.append(float(method.step(batch(0), 0)["loss_discriminator_main"]))
    assert losses[1] == pytest.approx(2 * losses[0])


@pytest.mark.parametrize(
    ("precision", "tolerance", "angle"),
    [
        (PrecisionConfig(channels_last=True), 1e-4, 0.01),
        (PrecisionConfig(dtype="bf16"), 0.02, 0.6),
        (PrecisionConfig(dtype="bf16", channels_last=True), 0.02, 0.6),
    ],
)
def test_other_precisions_are_near_float32(precision: PrecisionConfig, tolerance: float, angle: float) -> None:
    """Losses, and length and direction of the first step, in radians; the steps after it go ways of their own."""
    plain, other = make_mpscl(), make_mpscl(precision=precision)
    start = torch.cat([parameter.detach().flatten() for parameter in plain.segmenter.parameters()])
    moves = []
    metrics = []
    for method in (plain, other):
        method.start_phase(10)
        metrics.append(method.step(batch(0), 0))
        moves.append(torch.cat([parameter.detach().flatten() for parameter in method.segmenter.parameters()]) - start)
        assert float(method.step(batch(1), 1)["non_finite"]) == 0
    for key, expected in metrics[0].items():
        if key.startswith("loss"):
            assert float(metrics[1][key]) == pytest.approx(float(expected), rel=tolerance), key
    assert float(torch.cosine_similarity(*moves, dim=0)) > math.cos(angle)
    assert float(moves[1].norm()) == pytest.approx(float(moves[0].norm()), rel=10 * tolerance)
    assert all(parameter.dtype == torch.float32 for parameter in other.segmenter.parameters())


def test_prototype_angles() -> None:
    prototypes = torch.tensor([[1.0, 0.0], [2.0, 2.0], [0.0, 0.0], [0.0, 3.0]])
    smallest, mean = prototype_angles(prototypes)
    assert float(smallest) == pytest.approx(math.pi / 4, abs=1e-6)
    assert float(mean) == pytest.approx((math.pi / 4 + math.pi / 4 + math.pi / 2) / 3, abs=1e-6)
    assert [float(angle) for angle in prototype_angles(torch.zeros(3, 2))] == [0, 0]
