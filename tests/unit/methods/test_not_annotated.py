"""Pixels that nobody annotated: every loss of labels is that of the annotated pixels alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.methods.batch_losses import batch_dice_loss, floored_cross_entropy
from mpscl_ray.methods.cag import class_features
from mpscl_ray.methods.losses import (
    class_counts,
    cosine_to_prototypes,
    focal_loss,
    margin_contrastive_loss,
    soft_dice_loss,
    weighted_cross_entropy,
)
from mpscl_ray.methods.prototypes import prototype_sums
from mpscl_ray.methods.sifa_losses import clipped_cross_entropy
from tests.tiny_methods import CLASSES, MAKE, batch, leaves

PROTOTYPES = torch.randn(CLASSES, CLASSES, generator=torch.Generator().manual_seed(1))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.div(*weighted_cross_entropy(logits, labels, class_counts(labels, CLASSES)))


def margin(form: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The logits serve as features."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.div(*margin_contrastive_loss(cosine_to_prototypes(logits, PROTOTYPES), labels, 0.3, 0.7, 1, form))

    return loss


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "weighted cross-entropy": cross_entropy,
    "Dice": soft_dice_loss,
    "focal": lambda logits, labels: torch.div(*focal_loss(logits, labels, 2.0)),
    "margin, released": margin("released"),
    "margin, paper": margin("paper"),
    "cross-entropy of SIFA": lambda x, labels: clipped_cross_entropy(x, labels, class_counts(labels, CLASSES)),
    "Dice of the batch": batch_dice_loss,
    "cross-entropy with a floor": lambda x, y: floored_cross_entropy(x, y, class_counts(y, CLASSES), 0.4),
    "prototypes": lambda logits, labels: prototype_sums(logits, labels, CLASSES)[0].sum(),
    "features of CAG": lambda logits, labels: class_features(logits, logits, labels)[0].square().sum(),
}


def picture(images: int = 1) -> tuple[Tensor, Tensor]:
    """Logits and labels of images, of which the same pixels are not annotated."""
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(images, CLASSES, 6, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (images, 6, 8), generator=generator)
    labels[:, torch.rand(6, 8, generator=generator) < 0.4] = NOT_ANNOTATED
    return logits.requires_grad_(), labels


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_that_of_the_annotated_pixels(name: str) -> None:
    logits, labels = picture(2)
    annotated = (labels != NOT_ANNOTATED)[0]
    assert 10 < annotated.sum() < 40
    loss = LOSSES[name](logits, labels)
    only = logits[:, :, annotated][..., None], labels[:, annotated][..., None]
    torch.testing.assert_close(loss, LOSSES[name](*only), rtol=1e-12, atol=0)
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss, logits)
        assert not gradient[:, :, ~annotated].any()
        assert gradient[:, :, annotated].any()


def test_plain_cross_entropy_is_torchs_with_its_ignore_index() -> None:
    logits, labels = picture(3)
    expected = F.cross_entropy(logits, labels, ignore_index=NOT_ANNOTATED)
    torch.testing.assert_close(torch.div(*focal_loss(logits, labels, 0.0)), expected)


def test_an_image_without_annotated_pixels_has_no_dice_loss() -> None:
    logits, labels = picture(2)
    alone = soft_dice_loss(logits[:1], labels[:1])
    labels[1] = NOT_ANNOTATED
    torch.testing.assert_close(soft_dice_loss(logits, labels), alone / 2)


OF_LABELS = ("cross_entropy", "dice", "focal", "segmentation", "contrastive_source", "distance_source")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in MAKE if name != "adabn"),
        ("segmentation", {"segmentation_loss": "plain"}),
        ("clan", {"segmentation_loss": "plain"}),
        ("clan", {"segmentation_loss": "focal"}),
        ("cag", {"segmentation_loss": "ce"}),
        ("mpscl", {"margin_form": "paper"}),
    ],
)
def test_a_batch_without_annotated_pixels_has_no_loss_of_labels(name: str, settings: dict[str, Any]) -> None:
    method = MAKE[name](**settings)
    method.start_phase(10)
    whole = batch(0)
    nothing = dataclasses.replace(whole, source_label=torch.full_like(whole.source_label, NOT_ANNOTATED))
    found = {key: float(value) for key, value in method.step(nothing, 0).items()}
    assert found["non_finite"] == 0
    of_labels = {key: value for key, value in found.items() if any(word in key for word in OF_LABELS)}
    assert of_labels
    assert all(value == pytest.approx(0, abs=1e-7) for value in of_labels.values()), of_labels
    assert all(value.isfinite().all() for value in leaves(method.state_dict()).values() if isinstance(value, Tensor))
    found = {key: float(value) for key, value in method.step(whole, 1).items()}
    assert found["non_finite"] == 0
    assert found["loss_segmentation"] > 0


def test_prototypes_of_a_source_without_annotated_pixels_stay() -> None:
    method = MAKE["mpscl"]()
    whole = batch(0)
    method.initialise_prototypes([(whole.source_image, whole.source_label)])  # type: ignore[attr-defined]
    method.start_phase(10)
    before = method.state_dict()["prototypes"].clone()
    nothing = dataclasses.replace(whole, source_label=torch.full_like(whole.source_label, NOT_ANNOTATED))
    method.step(nothing, 0)
    assert torch.equal(method.state_dict()["prototypes"], before)
