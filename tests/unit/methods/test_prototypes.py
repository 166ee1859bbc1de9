"""Prototypes against Eqs. (4) and (5) written as loops, over absent classes and over shards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mpscl_ray.methods.prototypes import downsample_labels, initial_prototypes, prototype_sums, update_prototypes

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
