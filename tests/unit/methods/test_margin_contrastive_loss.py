"""Eq. 8: the margin preserving contrastive loss, on values computed by hand or pixel by pixel."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpscl_ray.methods import losses, prototypes
from tests.loss_inputs import C, pixels, random_labels, value


def paper_reference(cosines: list[float], label: int, margin: float, temperature: float) -> float:
    """Eq. (8) for one pixel."""
    positive = math.exp(math.cos(math.acos(cosines[label]) + margin) / temperature)
    negatives = sum(math.exp(c / temperature) for j, c in enumerate(cosines) if j != label)
    return -math.log(positive / (positive + negatives))


def released_reference(
    cosines: list[float], label: int, margin: float, temperature: float, base_temperature: float
) -> float:
    """The released form for one pixel: two different maxima, and a constant inside the logarithm."""

    def phi(cosine: float) -> float:
        if cosine <= math.cos(math.pi - margin):
            return cosine - margin * math.sin(math.pi - margin)
        sine = math.sqrt(min(max(1.0 - cosine * cosine, 1e-4), 1.0))
        return cosine * math.cos(margin) - sine * math.sin(margin)

    largest_cosine = max(cosines)
    largest_phi = max(phi(c) for c in cosines)
    q = (phi(cosines[label]) - largest_phi) / temperature
    total = math.exp(q)
    for j, cosine in enumerate(cosines):
        if j != label:
            total += math.exp((cosine - largest_cosine) / temperature)
    return -(temperature / base_temperature) * (q - math.log(total + 1e-4))


def random_cosines(generator: torch.Generator, batch: int = 2) -> Tensor:
    cosine = 2.0 * torch.rand(batch, C, 4, 5, generator=generator, dtype=torch.float64) - 1.0
    cosine[0, :, 0, 0] = torch.tensor([1.0, -1.0, 0.0, 0.99999])  # the ends, and the clamp of the sine
    cosine[0, :, 0, 1] = torch.tensor([-0.999, -0.9999, -0.99, -1.0])  # past pi for all
    return cosine


@pytest.mark.parametrize("margin", [0.0, 0.2, 0.4, 1.2])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.07])
def test_margin_contrastive_loss_is_its_equation(generator: torch.Generator, margin: float, temperature: float) -> None:
    cosine, labels = random_cosines(generator), random_labels(generator, batch=2, size=4)
    weights = torch.rand(2, 4, 5, generator=generator, dtype=torch.float64)
    released = paper = weighted = 0.0
    for b, y, x in pixels(labels):
        cosines, label = cosine[b, :, y, x].tolist(), int(labels[b, y, x])
        term = released_reference(cosines, label, margin, temperature, 0.5)
        released += term
        weighted += float(weights[b, y, x]) * term
        paper += paper_reference(cosines, label, margin, temperature)

    sums = losses.margin_contrastive_loss(cosine, labels, margin, temperature, 0.5)
    assert float(sums.numerator) == pytest.approx(released, rel=1e-10)
    assert float(sums.denominator) == labels.numel()
    sums = losses.margin_contrastive_loss(cosine, labels, margin, temperature, 0.5, weights=weights)
    assert float(sums.numerator) == pytest.approx(weighted, rel=1e-10)
    assert float(sums.denominator) == pytest.approx(float(weights.sum()), rel=1e-12)
    sums = losses.margin_contrastive_loss(cosine, labels, margin, temperature, form="paper")
    # The floor under the sine, for the gradient's sake, moves the value by up to 1e-4 at cosines of exactly +-1.
    tolerance = 0.0 if margin == 0.0 else 4e-4 / temperature
    assert float(sums.numerator) == pytest.approx(paper, rel=1e-10, abs=tolerance)


def test_unknown_form_is_refused(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="'released' or 'paper'"):
        losses.margin_contrastive_loss(
            random_cosines(generator),
            random_labels(generator, 2, 4),
            0.2,
            1.0,
            form="eq8",  # type: ignore[arg-type]
        )


@settings(max_examples=50, deadline=None)
@given(
    cosines=st.lists(st.floats(0.01, 0.99), min_size=C, max_size=C, unique=True),
    margin=st.floats(0.05, 1.5),
    temperature=st.sampled_from([0.1, 1.0, 2.0]),
)
@example(cosines=[0.5, 0.75, 0.9899999999999999, 0.99], margin=1.0, temperature=0.1)  # equal in single precision
def test_margin_on_a_correct_pixel(cosines: list[float], margin: float, temperature: float) -> None:
    """Released: the value ignores the margin, the gradient has the factor cos m + sin m cot(theta). Paper: neither."""
    start = torch.tensor(cosines, dtype=torch.float64).reshape(1, C, 1, 1)
    label = start.argmax().reshape(1, 1, 1)

    def loss_and_gradient(m: float, form: losses.MarginForm) -> tuple[float, Tensor]:
        cosine = start.clone().requires_grad_()
        loss = losses.margin_contrastive_loss(cosine, label, m, temperature, form=form).numerator
        loss.backward()
        assert cosine.grad is not None
        return float(loss.detach()), cosine.grad.flatten()

    plain, plain_gradient = loss_and_gradient(0.0, "released")
    with_margin, gradient = loss_and_gradient(margin, "released")
    assert with_margin == plain
    theta = math.acos(max(cosines))
    factor = math.cos(margin) + math.sin(margin) / math.tan(theta)
    expected = plain_gradient.clone()
    expected[label.flatten()] *= factor
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-15)

    paper_plain, paper_gradient = loss_and_gradient(0.0, "paper")
    paper, _ = loss_and_gradient(margin, "paper")
    assert paper > paper_plain
    assert paper_gradient[label.flatten()].item() < 0


def test_margin_on_a_wrong_pixel_raises_the_released_value_too() -> None:
    cosine = torch.tensor([0.9, 0.3, 0.2, 0.1], dtype=torch.float64).reshape(1, C, 1, 1)
    label = torch.ones(1, 1, 1, dtype=torch.int64)
    plain = losses.margin_contrastive_loss(cosine, label, 0.0, 1.0).numerator
    assert float(losses.margin_contrastive_loss(cosine, label, 0.4, 1.0).numerator) != pytest.approx(float(plain))


def test_paper_form_gradient(generator: torch.Generator) -> None:
    cosine = (1.8 * torch.rand(1, C, 2, 2, generator=generator, dtype=torch.float64) - 0.9).requires_grad_()
    labels = torch.randint(0, C, (1, 2, 2), generator=generator)
    assert torch.autograd.gradcheck(
        lambda c: losses.margin_contrastive_loss(c, labels, 0.4, 0.7, form="paper").numerator, (cosine,)
    )


@pytest.mark.parametrize("form", ["released", "paper"])
def test_gradient_at_the_prototype_itself_is_finite(form: losses.MarginForm) -> None:
    centres = torch.eye(C, 6)
    features = centres[1].clone().reshape(1, 6, 1, 1).requires_grad_()
    cosine = losses.cosine_to_prototypes(features, centres)
    assert float(cosine[0, 1].detach()) == 1.0
    label = torch.ones(1, 1, 1, dtype=torch.int64)
    losses.margin_contrastive_loss(cosine, label, 0.4, 1.0, form=form).numerator.backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()
    assert features.grad.abs().max() < 10.0


@pytest.mark.parametrize("form", ["released", "paper"])
@pytest.mark.parametrize("shards", [2, 4])
def test_margin_contrastive_loss_of_shards(generator: torch.Generator, form: losses.MarginForm, shards: int) -> None:
    whole = random_cosines(generator, batch=4).requires_grad_()
    labels = random_labels(generator, batch=4, size=4)
    mask = torch.rand(4, 4, 5, generator=generator) > 0.5
    mask[0] = False  # nothing selected on the first of four shards
    sums = losses.margin_contrastive_loss(whole, labels, 0.4, 1.0, form=form, weights=mask)
    (sums.numerator / (sums.denominator + losses.MASK_EPS)).backward()

    parts = whole.detach().clone().requires_grad_()
    split = [
        losses.margin_contrastive_loss(c, y, 0.4, 1.0, form=form, weights=m)
        for c, y, m in zip(parts.chunk(shards), labels.chunk(shards), mask.chunk(shards), strict=True)
    ]
    numerator = torch.stack([s.numerator for s in split]).sum()
    denominator = torch.stack([s.denominator for s in split]).sum()
    (numerator / (denominator + losses.MASK_EPS)).backward()
    torch.testing.assert_close(numerator, sums.numerator, rtol=1e-12, atol=0.0)
    assert float(denominator) == int(mask.sum())
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-10, atol=1e-15)


def test_no_selected_pixel_gives_no_loss_and_no_gradient(generator: torch.Generator) -> None:
    cosine = random_cosines(generator).requires_grad_()
    mask = torch.zeros(2, 4, 5, dtype=torch.bool)
    sums = losses.margin_contrastive_loss(cosine, random_labels(generator, 2, 4), 0.4, 1.0, weights=mask)
    loss = sums.numerator / (sums.denominator + losses.MASK_EPS)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert cosine.grad is not None
    assert cosine.grad.abs().max() == 0.0


@pytest.mark.parametrize("form", ["released", "paper"])
def test_class_that_occurs_nowhere(generator: torch.Generator, form: losses.MarginForm) -> None:
    """Five classes configured and four present: a defined prototype, finite losses and gradients."""
    features = torch.rand(2, 8, 6, 6, generator=generator).requires_grad_()
    labels = torch.randint(0, C, (2, 6, 6), generator=generator)
    centres = prototypes.initial_prototypes(*prototypes.prototype_sums(features, labels, C + 1)).float()
    cosine = losses.cosine_to_prototypes(features, centres)
    chosen, mask = prototypes.self_paced_pseudo_labels(cosine, 0.0)
    assert not bool((chosen == C).any())
    source = value(losses.margin_contrastive_loss(cosine, labels, 0.4, 1.0, form=form))
    target = losses.margin_contrastive_loss(cosine, chosen, 0.2, 1.0, form=form, weights=mask).numerator
    (source + target).backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()
    assert features.grad.abs().sum() > 0
