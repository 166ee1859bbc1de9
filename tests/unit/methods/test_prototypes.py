"""Prototypes and pseudo-labels against Eqs. (4) to (7) written as loops; absent classes, shards."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.methods.prototypes import (
    clearly_nearest,
    downsample_labels,
    initial_prototypes,
    prototype_sums,
    self_paced_pseudo_labels,
    update_prototypes,
)

C = 4


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


@pytest.fixture
def features(generator: torch.Generator) -> Tensor:
    return torch.randn(4, 6, 3, 5, generator=generator, dtype=torch.float64)


@pytest.fixture
def labels(generator: torch.Generator) -> Tensor:
    """Class 2 is in the last image alone, class 3 nowhere."""
    labels = torch.randint(0, 2, (4, 3, 5), generator=generator)
    labels[3, 0] = 2
    return labels


def mean_of_class(features: Tensor, labels: Tensor, c: int) -> list[float] | None:
    batch, channels, height, width = features.shape
    where = [(b, y, x) for b in range(batch) for y in range(height) for x in range(width) if int(labels[b, y, x]) == c]
    if not where:
        return None
    return [sum(float(features[b, k, y, x]) for b, y, x in where) / len(where) for k in range(channels)]


@pytest.mark.parametrize(("large", "small"), [((66, 66), (9, 9)), ((256, 256), (33, 33)), ((10, 7), (4, 3))])
def test_downsampled_labels_are_the_nearest(
    generator: torch.Generator, large: tuple[int, int], small: tuple[int, int]
) -> None:
    labels = torch.randint(0, 1000, (2, *large), generator=generator)
    out = downsample_labels(labels, small)
    assert out.shape == (2, *small)
    for y in range(small[0]):
        for x in range(small[1]):
            expected = labels[:, y * large[0] // small[0], x * large[1] // small[1]]
            assert torch.equal(out[:, y, x], expected)


def test_initial_prototypes_are_the_class_means(features: Tensor, labels: Tensor) -> None:
    centres = initial_prototypes(*prototype_sums(features, labels, C))
    for c in range(3):
        assert centres[c].tolist() == pytest.approx(mean_of_class(features, labels, c), rel=1e-12)
    assert centres[3].tolist() == [0.0] * 6


def test_update_moves_present_classes_and_leaves_absent_ones(features: Tensor, labels: Tensor) -> None:
    before = torch.arange(24, dtype=torch.float64).reshape(C, 6)
    after = update_prototypes(before, *prototype_sums(features, labels, C), 0.2)
    for c in range(C):
        mean = mean_of_class(features, labels, c)
        old = before[c].tolist()
        expected = old if mean is None else [0.2 * o + 0.8 * m for o, m in zip(old, mean, strict=True)]
        assert after[c].tolist() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(before, torch.arange(24, dtype=torch.float64).reshape(C, 6))


@pytest.mark.parametrize("shards", [2, 4])
def test_sums_add_up_over_shards(features: Tensor, labels: Tensor, shards: int) -> None:
    parts = [prototype_sums(f, y, C) for f, y in zip(features.chunk(shards), labels.chunk(shards), strict=True)]
    assert parts[0][1][2] == 0  # absent on the first shard, present in the whole
    sums, counts = prototype_sums(features, labels, C)
    torch.testing.assert_close(torch.stack([s for s, _ in parts]).sum(dim=0), sums, rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.stack([n for _, n in parts]).sum(dim=0), counts)


def test_sums_are_exact_enough_for_a_whole_data_set() -> None:
    """A mean near 1 over many float32 pixels: single-precision sums would drift."""
    features = torch.full((1, 2, 512, 512), 1.0001)
    sums, counts = prototype_sums(features, torch.zeros(1, 512, 512, dtype=torch.int64), 1)
    for _ in range(50):
        more, n = prototype_sums(features, torch.zeros(1, 512, 512, dtype=torch.int64), 1)
        sums, counts = sums + more, counts + n
    torch.testing.assert_close(initial_prototypes(sums, counts), features[:, :, 0, 0].double(), rtol=1e-12, atol=0.0)


def test_no_gradient_and_the_dtype_of_the_prototypes(features: Tensor, labels: Tensor) -> None:
    before = torch.zeros(C, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums, counts = prototype_sums(features.float().requires_grad_(), labels, C)
    after = update_prototypes(before, sums, counts, 0.2)
    assert sums.dtype == counts.dtype == torch.float64
    assert after.dtype == torch.float32
    assert not after.requires_grad
    exact, _ = prototype_sums(features, labels, C)
    torch.testing.assert_close(sums, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("delta_th", [0.0, 0.25, 2.0])
def test_pseudo_labels_are_their_equation(classes: int, delta_th: float) -> None:
    cosine = 2.0 * torch.rand(2, classes, 6, 7, generator=torch.Generator().manual_seed(3)) - 1.0
    labels, mask = self_paced_pseudo_labels(cosine, delta_th)
    assert labels.dtype == torch.int64
    assert mask.dtype == torch.bool
    for b in range(2):
        for y in range(6):
            for x in range(7):
                cosines = cosine[b, :, y, x].tolist()
                first, second = sorted(cosines, reverse=True)[:2]
                assert int(labels[b, y, x]) == cosines.index(first)
                assert bool(mask[b, y, x]) == (first - second > delta_th)


def test_a_tie_is_never_selected() -> None:
    cosine = torch.tensor([0.7, 0.7, 0.1]).reshape(1, 3, 1, 1)
    labels, mask = self_paced_pseudo_labels(cosine, 0.0)
    assert int(labels) in (0, 1)
    assert not bool(mask)


def test_threshold_itself_is_not_selected() -> None:
    cosine = torch.tensor([0.75, 0.5, 0.25]).reshape(1, 3, 1, 1)
    assert not bool(self_paced_pseudo_labels(cosine, 0.25)[1])
    assert bool(self_paced_pseudo_labels(cosine, 0.2499)[1])


def test_no_gradient() -> None:
    cosine = torch.rand(1, 3, 2, 2, requires_grad=True)
    labels, mask = self_paced_pseudo_labels(cosine, 0.25)
    assert not labels.requires_grad
    assert not mask.requires_grad


def test_a_label_is_vetoed_unless_its_prototype_is_clearly_the_nearest(generator: torch.Generator) -> None:
    cosine = torch.rand(2, C, 3, 5, generator=generator)
    labels = torch.randint(0, C, (2, 3, 5), generator=generator)
    labels[0] = cosine[0].argmax(dim=0)
    labels[1, 2] = NOT_ANNOTATED
    ours = clearly_nearest(cosine, labels, 0.1)
    for image, y, x in itertools.product(range(2), range(3), range(5)):
        pixel, label = cosine[image, :, y, x].tolist(), int(labels[image, y, x])
        others = [value for c, value in enumerate(pixel) if c != label]
        expected = label != NOT_ANNOTATED and pixel[label] - max(others) > 0.1
        assert bool(ours[image, y, x]) == expected
    assert set(ours[0].unique().tolist()) == {False, True}
    nearest, mask = self_paced_pseudo_labels(cosine, 0.1)
    assert torch.equal(clearly_nearest(cosine, nearest, 0.1), mask)
