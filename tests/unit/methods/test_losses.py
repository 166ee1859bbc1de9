"""Losses against slow references written from their equations, and the properties they must have."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from mpscl_ray.methods import losses, prototypes
from tests.loss_inputs import C, pixels, random_labels, random_logits, softmax_reference, value

# Weighted cross-entropy


def cross_entropy_reference(logits: Tensor, labels: Tensor) -> float:
    where = pixels(labels)
    counts = [sum(1 for p in where if int(labels[p]) == c) for c in range(C)]
    weights = [1.0 - n / len(where) for n in counts]
    numerator = denominator = 0.0
    for b, y, x in where:
        label = int(labels[b, y, x])
        probability = softmax_reference(logits[b, :, y, x].tolist())[label]
        numerator += weights[label] * -math.log(probability)
        denominator += weights[label]
    return numerator / denominator


def test_class_counts() -> None:
    counts = losses.class_counts(torch.tensor([[[0, 0, 2], [2, 2, 0]]]), 4)
    assert counts.tolist() == [3, 0, 3, 0]
    assert counts.dtype == torch.float64


def test_weighted_cross_entropy_is_its_equation(generator: torch.Generator) -> None:
    logits, labels = random_logits(generator), random_labels(generator, classes=C - 1)
    loss = value(losses.weighted_cross_entropy(logits, labels, losses.class_counts(labels, C)))
    assert loss.dtype == torch.float64
    assert float(loss) == pytest.approx(cross_entropy_reference(logits, labels), rel=1e-12)


def test_weighted_cross_entropy_of_one_class_is_the_plain_mean(generator: torch.Generator) -> None:
    logits = random_logits(generator).requires_grad_()
    labels = torch.zeros(3, 5, 6, dtype=torch.int64)
    loss = value(losses.weighted_cross_entropy(logits, labels, losses.class_counts(labels, C)))
    loss.backward()
    expected = torch.nn.functional.cross_entropy(logits.detach(), labels)
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-12)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("shards", [2, 4])
def test_weighted_cross_entropy_of_shards_with_global_counts(generator: torch.Generator, shards: int) -> None:
    whole = random_logits(generator, batch=4).requires_grad_()
    labels = random_labels(generator, batch=4)
    labels[0] = 0  # the first of four shards holds background alone, class 3 is only in the last
    labels[:3][labels[:3] == 3] = 1
    counts = losses.class_counts(labels, C)
    assert counts.min() > 0
    value(losses.weighted_cross_entropy(whole, labels, counts)).backward()

    parts = whole.detach().clone().requires_grad_()
    pairs = list(zip(parts.chunk(shards), labels.chunk(shards), strict=True))
    total = sum(losses.class_counts(part_labels, C) for _, part_labels in pairs)
    assert isinstance(total, Tensor)
    sums = [losses.weighted_cross_entropy(part, part_labels, total) for part, part_labels in pairs]
    numerator = torch.stack([s.numerator for s in sums]).sum()
    denominator = torch.stack([s.denominator for s in sums]).sum()
    (numerator / denominator).backward()
    expected = losses.weighted_cross_entropy(whole.detach(), labels, counts)
    torch.testing.assert_close(numerator, expected.numerator, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(denominator, expected.denominator, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-10, atol=1e-15)


# Dice


def dice_reference(logits: Tensor, labels: Tensor) -> float:
    terms = []
    batch, height, width = labels.shape
    for b in range(batch):
        for c in range(C):
            product = squares = 0.0
            for y in range(height):
                for x in range(width):
                    p = softmax_reference(logits[b, :, y, x].tolist())[c]
                    g = 1.0 if int(labels[b, y, x]) == c else 0.0
                    product += p * g
                    squares += p * p + g * g
            terms.append(2.0 * product / (squares + 1e-5))
    return 1.0 - sum(terms) / len(terms)


def test_soft_dice_loss_is_its_equation(generator: torch.Generator) -> None:
    logits, labels = random_logits(generator), random_labels(generator, classes=C - 1)
    assert float(losses.soft_dice_loss(logits, labels)) == pytest.approx(dice_reference(logits, labels), rel=1e-12)


def test_soft_dice_loss_gradient(generator: torch.Generator) -> None:
    logits, labels = random_logits(generator, batch=2, size=2).requires_grad_(), random_labels(generator, 2, 2)
    assert torch.autograd.gradcheck(lambda z: losses.soft_dice_loss(z, labels), (logits,))


def test_soft_dice_loss_is_the_mean_over_equal_shards(generator: torch.Generator) -> None:
    logits, labels = random_logits(generator, batch=4), random_labels(generator, batch=4)
    labels[0] = 0
    for shards in (2, 4):
        parts = [losses.soft_dice_loss(z, y) for z, y in zip(logits.chunk(shards), labels.chunk(shards), strict=True)]
        torch.testing.assert_close(torch.stack(parts).mean(), losses.soft_dice_loss(logits, labels))


def test_soft_dice_loss_vanishes_on_a_perfect_answer() -> None:
    labels = torch.arange(C).repeat(2, 3, 1)
    logits = 100.0 * torch.nn.functional.one_hot(labels, C).movedim(3, 1).float()
    assert float(losses.soft_dice_loss(logits, labels)) == pytest.approx(0.0, abs=1e-5)


# Self-information and domains


@pytest.mark.parametrize("normalised", [True, False])
def test_self_information_is_its_equation(generator: torch.Generator, normalised: bool) -> None:
    logits = random_logits(generator, batch=1, size=3)
    information = losses.self_information(logits, normalised=normalised)
    for _, y, x in pixels(logits[:, 0]):
        for c, p in enumerate(softmax_reference(logits[0, :, y, x].tolist())):
            expected = -p * math.log2(p + 1e-7) / math.log2(C) if normalised else -p * math.log(p + 1e-7)
            assert float(information[0, c, y, x]) == pytest.approx(expected, rel=1e-12)


def test_self_information_is_finite_where_a_class_is_certain() -> None:
    logits = torch.tensor([200.0, -200.0, 0.0, 0.0]).reshape(1, C, 1, 1).requires_grad_()
    information = losses.self_information(logits)
    information.sum().backward()
    assert information.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("domain", [losses.SOURCE_LABEL, losses.TARGET_LABEL])
def test_domain_loss_is_its_equation(generator: torch.Generator, domain: int) -> None:
    logits = 3.0 * torch.randn(2, 1, 3, 3, generator=generator, dtype=torch.float64)
    terms = []
    for z in logits.flatten().tolist():
        probability = 1.0 / (1.0 + math.exp(-z))
        terms.append(-math.log(probability) if domain == 1 else -math.log(1.0 - probability))
    assert float(losses.domain_loss(logits, domain)) == pytest.approx(sum(terms) / len(terms), rel=1e-12)


def test_domain_loss_does_not_overflow() -> None:
    logits = torch.tensor([-1e4, 1e4])
    assert float(losses.domain_loss(logits, losses.SOURCE_LABEL)) == pytest.approx(5e3)
    assert float(losses.domain_loss(logits, losses.TARGET_LABEL)) == pytest.approx(5e3)


# Cosines


def test_cosine_is_its_equation(generator: torch.Generator) -> None:
    features = torch.randn(2, 6, 2, 3, generator=generator, dtype=torch.float64)
    centres = torch.randn(C, 6, generator=generator, dtype=torch.float64)
    cosine = losses.cosine_to_prototypes(features, centres)
    assert cosine.shape == (2, C, 2, 3)
    for b, y, x in pixels(features[:, 0]):
        f = features[b, :, y, x].tolist()
        for c in range(C):
            p = centres[c].tolist()
            dot = sum(i * j for i, j in zip(f, p, strict=True))
            expected = dot / math.sqrt(sum(i * i for i in f)) / math.sqrt(sum(j * j for j in p))
            assert float(cosine[b, c, y, x]) == pytest.approx(expected, rel=1e-12)


def test_cosine_gradient(generator: torch.Generator) -> None:
    features = torch.randn(1, 3, 2, 2, generator=generator, dtype=torch.float64).requires_grad_()
    centres = torch.randn(C, 3, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(losses.cosine_to_prototypes, (features, centres))


def test_cosine_with_zero_feature_and_zero_prototype_is_zero_with_finite_gradient() -> None:
    features = torch.ones(1, 6, 1, 2)
    features[..., 1] = 0.0
    features.requires_grad_()
    centres = torch.ones(C, 6)
    centres[2] = 0.0
    centres.requires_grad_()
    cosine = losses.cosine_to_prototypes(features, centres)
    torch.testing.assert_close(cosine[0, :, 0, 0], torch.tensor([1.0, 1.0, 0.0, 1.0]))
    assert cosine[0, :, 0, 1].tolist() == [0.0] * C
    cosine.sum().backward()
    for gradient in (features.grad, centres.grad):
        assert gradient is not None
        assert gradient.isfinite().all()
        assert gradient.abs().max() < 10.0


def test_cosine_is_not_rounded_by_autocast(generator: torch.Generator) -> None:
    features, centres = torch.rand(2, 64, 4, 4, generator=generator), torch.rand(C, 64, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = losses.cosine_to_prototypes(features, centres)
    assert torch.equal(mixed, losses.cosine_to_prototypes(features, centres))


# Precision, schedule, synchronisation


def everything(features: Tensor, centres: Tensor, logits: Tensor, labels: Tensor, mask: Tensor) -> dict[str, Tensor]:
    cosine = losses.cosine_to_prototypes(features, centres)
    small = prototypes.downsample_labels(labels, (features.shape[2], features.shape[3]))
    sums, counts = prototypes.prototype_sums(features, small, C)
    chosen, selected = prototypes.self_paced_pseudo_labels(cosine, 0.1)
    cross_entropy = losses.weighted_cross_entropy(logits, labels, losses.class_counts(labels, C))
    return {
        "cosine": cosine,
        "released": value(losses.margin_contrastive_loss(cosine, small, 0.4, 1.0, weights=mask)),
        "paper": value(losses.margin_contrastive_loss(cosine, chosen, 0.4, 1.0, form="paper", weights=selected)),
        "cross_entropy": value(cross_entropy),
        "dice": losses.soft_dice_loss(logits, labels),
        "self_information": losses.self_information(logits),
        "domain": losses.domain_loss(logits, losses.TARGET_LABEL),
        "prototypes": prototypes.update_prototypes(centres, sums, counts, 0.2),
    }


def inputs(dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.rand(2, 8, 5, 5, device=device).to(dtype).requires_grad_(),
        torch.rand(C, 8, device=device).to(torch.float64 if dtype == torch.float64 else torch.float32),
        torch.rand(2, C, 20, 20, device=device).to(dtype).requires_grad_(),
        torch.randint(0, C, (2, 20, 20), device=device),
        torch.rand(2, 5, 5, device=device) > 0.5,
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_results_have_at_least_single_precision(given: torch.dtype, expected: torch.dtype) -> None:
    for name, result in everything(*inputs(given)).items():
        assert result.dtype == expected, name


def test_nothing_depends_on_values_for_its_shape_or_path() -> None:
    """On fake tensors, which have no values, every read-back or data-dependent shape is an error."""
    everything(*inputs(torch.float32))  # Constants that are kept are made of values.
    with FakeTensorMode(allow_non_fake_inputs=True):
        results = everything(*inputs(torch.float32))
        torch.stack([result.sum() for result in results.values()]).sum().backward()
        with pytest.raises(DataDependentOutputException):
            results["dice"].item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_the_gpu() -> None:
    arguments = inputs(torch.float32, "cuda")
    everything(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = everything(*arguments)
        torch.stack([result.sum() for result in results.values()]).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
