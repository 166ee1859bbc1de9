"""Losses, prototypes and pseudo-labels against numbers of the released code: values and gradients to 1e-5."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mpscl_ray.methods import losses, optim, prototypes
from tests.golden.stored_numbers import load

NUM_CLASSES = 5


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load("losses")


def assert_values(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-6)


def assert_gradients(actual: Tensor | None, expected: Tensor) -> None:
    assert actual is not None
    assert expected.abs().max() > 0
    difference = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert difference < 1e-5, f"relative difference {difference:.2e}"
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_downsampled_labels(golden: dict[str, Tensor]) -> None:
    assert torch.equal(prototypes.downsample_labels(golden["labels_source"], (9, 9)), golden["labels_downsampled"])


def test_prototype_update(golden: dict[str, Tensor]) -> None:
    sums, counts = prototypes.prototype_sums(golden["features_source"], golden["labels_downsampled"], NUM_CLASSES)
    updated = prototypes.update_prototypes(golden["prototypes"], sums, counts, float(golden["alpha"]))
    assert updated.dtype == torch.float32
    assert_values(updated, golden["prototypes_updated"])


def test_pseudo_labels(golden: dict[str, Tensor]) -> None:
    cosine = losses.cosine_to_prototypes(golden["features_target"], golden["prototypes_updated"])
    labels, mask = prototypes.self_paced_pseudo_labels(cosine, float(golden["delta_th"]))
    assert torch.equal(labels, golden["pseudo_labels"])
    assert torch.equal(mask.float(), golden["pseudo_mask"])
    assert 0 < mask.sum() < mask.numel()


@pytest.mark.parametrize("case", range(6))
def test_margin_contrastive_loss_of_the_source(golden: dict[str, Tensor], case: int) -> None:
    features = golden["features_source"].clone().requires_grad_()
    sums = losses.margin_contrastive_loss(
        losses.cosine_to_prototypes(features, golden["prototypes_updated"]),
        golden["labels_downsampled"],
        margin=float(golden[f"mpcl{case}_margin"]),
        temperature=float(golden[f"mpcl{case}_temperature"]),
        base_temperature=float(golden[f"mpcl{case}_base_temperature"]),
    )
    loss = sums.numerator / sums.denominator
    loss.backward()
    assert_values(loss.detach(), golden[f"mpcl{case}_source_loss"])
    assert_gradients(features.grad, golden[f"mpcl{case}_source_grad"])


@pytest.mark.parametrize("case", range(6))
def test_margin_contrastive_loss_of_the_target(golden: dict[str, Tensor], case: int) -> None:
    features = golden["features_target"].clone().requires_grad_()
    sums = losses.margin_contrastive_loss(
        losses.cosine_to_prototypes(features, golden["prototypes_updated"]),
        golden["pseudo_labels"],
        margin=float(golden[f"mpcl{case}_margin"]),
        temperature=float(golden[f"mpcl{case}_temperature"]),
        base_temperature=float(golden[f"mpcl{case}_base_temperature"]),
        weights=golden["pseudo_mask"],
    )
    loss = sums.numerator / (sums.denominator + losses.MASK_EPS)
    loss.backward()
    assert_values(loss.detach(), golden[f"mpcl{case}_target_loss"])
    assert_gradients(features.grad, golden[f"mpcl{case}_target_grad"])


def test_weighted_cross_entropy(golden: dict[str, Tensor]) -> None:
    logits = golden["logits"].clone().requires_grad_()
    labels = golden["labels_source"]
    sums = losses.weighted_cross_entropy(logits, labels, losses.class_counts(labels, NUM_CLASSES))
    loss = sums.numerator / sums.denominator
    loss.backward()
    assert_values(loss.detach(), golden["weighted_ce"])
    assert_gradients(logits.grad, golden["weighted_ce_grad"])


def test_soft_dice_loss(golden: dict[str, Tensor]) -> None:
    logits = golden["logits"].clone().requires_grad_()
    loss = losses.soft_dice_loss(logits, golden["labels_source"])
    loss.backward()
    assert_values(loss.detach(), golden["dice_loss"])
    assert_gradients(logits.grad, golden["dice_loss_grad"])


def test_self_information(golden: dict[str, Tensor]) -> None:
    assert_values(losses.self_information(golden["logits"]), golden["self_information"])


def test_domain_loss(golden: dict[str, Tensor]) -> None:
    assert_values(losses.domain_loss(golden["domain_logits"], losses.SOURCE_LABEL), golden["bce_to_0"])
    assert_values(losses.domain_loss(golden["domain_logits"], losses.TARGET_LABEL), golden["bce_to_1"])


def test_poly_lr(golden: dict[str, Tensor]) -> None:
    rates = [optim.poly_lr(2.5e-4, int(i), 50_000) for i in golden["poly_lr_iters"]]
    torch.testing.assert_close(torch.tensor(rates, dtype=torch.float64), golden["poly_lr"], rtol=1e-9, atol=0.0)
