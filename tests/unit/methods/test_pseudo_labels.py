"""Pseudo-labels of the mean teacher, and the divergence of two views, against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.methods.pseudo_labels import align, class_sums, confident_labels, jensen_shannon, share_quotient
from tests.tiny_methods import CLASSES


def probabilities(generator: torch.Generator, number: int = 2) -> Tensor:
    return (2 * torch.randn(number, CLASSES, 5, 4, generator=generator)).softmax(dim=1)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_alignment_multiplies_by_the_quotient_of_the_shares(generator: torch.Generator, exponent: float) -> None:
    p, r, q = probabilities(generator), torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.2, 0.3])
    ours = align(p, r, q, exponent)
    for image, row, column in np.ndindex(2, 5, 4):
        weighted = [float(p[image, k, row, column]) * float(r[k] / q[k]) ** exponent for k in range(CLASSES)]
        expected = [value / sum(weighted) for value in weighted]
        assert ours[image, :, row, column].tolist() == pytest.approx(expected, rel=1e-5)


def test_a_class_without_annotated_pixels_keeps_its_probability(generator: torch.Generator) -> None:
    """The others are aligned beside it; a pixel that is certainly of that class stays, where 0 / 0 would be NaN."""
    p, r, q = probabilities(generator), torch.tensor([0.8, 0.2, 0.0]), torch.tensor([0.4, 0.2, 0.4])
    p[0, :, 0, 0] = torch.tensor([0.0, 0.0, 1.0])
    factors = torch.tensor([2.0, 1.0, 1.0])
    assert torch.equal(share_quotient(r, q), factors)
    expected = p * factors[:, None, None]
    torch.testing.assert_close(align(p, r, q, 1.0), expected / expected.sum(dim=1, keepdim=True))
    assert align(p, r, q, 1.0)[0, :, 0, 0].tolist() == [0, 0, 1]
    torch.testing.assert_close(align(p, torch.zeros(CLASSES), q, 1.0), p, msg="no annotated pixel at all")


def test_a_pixel_is_labelled_where_its_confidence_reaches_that_of_its_class(generator: torch.Generator) -> None:
    p, thresholds = probabilities(generator), [0.9, 0.5, 0.7]
    labels = confident_labels(p, torch.tensor(thresholds, dtype=torch.float64))
    posterior, confidence, number = class_sums(p)
    loops = np.zeros((3, CLASSES))
    for image, row, column in np.ndindex(2, 5, 4):
        pixel = p[image, :, row, column].tolist()
        best = int(np.argmax(pixel))
        assert labels[image, row, column] == (best if pixel[best] >= thresholds[best] else NOT_ANNOTATED)
        loops += [pixel, [pixel[best] * (k == best) for k in range(CLASSES)], np.arange(CLASSES) == best]
    assert set(labels.unique().tolist()) == {0, 1, 2, NOT_ANNOTATED}
    for ours, expected in zip((posterior, confidence, number), loops, strict=True):
        assert ours.tolist() == pytest.approx(expected)


def test_jensen_shannon_is_the_mean_divergence_from_the_mean(generator: torch.Generator) -> None:
    one, other = 3 * torch.randn(2, 2, CLASSES, 5, 4, generator=generator)
    p, q = one.softmax(dim=1).double(), other.softmax(dim=1).double()
    ours = jensen_shannon(one, other)
    assert ours.shape == (2, 5, 4)
    for image, row, column in np.ndindex(2, 5, 4):
        pair = [x[image, :, row, column].tolist() for x in (p, q)]
        middle = [sum(values) / 2 for values in zip(*pair, strict=True)]
        expected = sum(a * math.log(a / m) / 2 for x in pair for a, m in zip(x, middle, strict=True))
        assert float(ours[image, row, column]) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    certain = torch.tensor([200.0, 0.0, 0.0]).reshape(1, 3, 1, 1).requires_grad_()
    apart = jensen_shannon(certain, certain.flip(1))
    assert float(apart.detach()) == pytest.approx(math.log(2))
    apart.sum().backward()  # type: ignore[no-untyped-call]
    assert certain.grad is not None
    assert certain.grad.isfinite().all()
