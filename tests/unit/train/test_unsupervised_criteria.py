"""Criteria without labels, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mpscl_ray.train import unsupervised_criteria as criteria

HALVES = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)


def moments(predictions: torch.Tensor) -> torch.Tensor:
    return predictions.T @ predictions / len(predictions)


@pytest.mark.parametrize(
    ("mean", "entropy", "expected"),
    [
        ([0.5, 0.5], 0.0, 1.0),  # certain, and both classes alike
        ([0.5, 0.5], 1.0, 0.0),  # every pixel undecided
        ([1.0, 0.0], 0.0, 0.0),  # certain, but one class has all pixels
        ([0.25, 0.75], 0.5, (2 - 0.75 * math.log2(3)) - 0.5),
    ],
)
def test_information(mean: list[float], entropy: float, expected: float) -> None:
    assert criteria.information(torch.tensor(mean, dtype=torch.float64), entropy) == pytest.approx(expected)


def test_nuclear_norm_is_that_of_the_matrix_of_predictions() -> None:
    assert criteria.nuclear_norm(moments(HALVES)) == pytest.approx(1)
    one_class = torch.tensor([[1.0, 0.0]] * 3, dtype=torch.float64)
    assert criteria.nuclear_norm(moments(one_class)) == pytest.approx(2**-0.5)
    predictions = torch.rand(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(dim=1)
    expected = torch.linalg.matrix_norm(predictions, "nuc") / math.sqrt(50 * 4)
    assert criteria.nuclear_norm(moments(predictions)) == pytest.approx(float(expected))
    assert math.isnan(criteria.nuclear_norm(torch.full((3, 3), math.nan)))


def test_neighbourhood_density_counts_similar_predictions() -> None:
    alike = torch.tensor([[0.3, 0.7]] * 5, dtype=torch.float64)
    assert criteria.neighbourhood_density(alike) == pytest.approx(1)
    # Two pairs: each pixel has one like itself (cosine 1) and two of the other class (cosine 0).
    pairs = HALVES.repeat_interleave(2, dim=0)
    shares = [math.exp(20), 1.0, 1.0]
    entropy = -sum(x / sum(shares) * math.log(x / sum(shares)) for x in shares)
    assert criteria.neighbourhood_density(pairs) == pytest.approx(entropy / math.log(3))


def test_class_ratio_agreement_is_a_divergence() -> None:
    expected = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    assert criteria.class_ratio_agreement(expected, expected) == 0
    other = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    assert criteria.class_ratio_agreement(expected, other) == pytest.approx(-0.5 * math.log(2))
    assert criteria.class_ratio_agreement(expected, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)) < -300


def one_hot(labels: list[list[int]], number: int = 3) -> torch.Tensor:
    """One slice (1, C, H, W) of labels."""
    return torch.nn.functional.one_hot(torch.tensor([labels]), number).movedim(-1, 1).double()


def test_neighbour_pairs_of_a_slice() -> None:
    # Side by side 0-0, 0-1, 2-1; one above the other 0-2, 0-2, 1-1; (0, 1) and (1, 0) have half of each such pair.
    found = criteria.neighbour_pairs(one_hot([[0, 0, 1], [2, 2, 1]]))
    expected = [[1, 0.5, 1], [0.5, 1, 0.5], [1, 0.5, 1]]
    assert found.tolist() == expected
    slices = torch.cat([one_hot([[0, 1]]), one_hot([[2, 2]])])
    assert criteria.neighbour_pairs(slices).tolist() == [[0, 0.5, 0], [0.5, 0, 0], [0, 0, 1]], "not across slices"
    hidden = one_hot([[0, 1, 2]])
    hidden[..., 1] = 0
    assert criteria.neighbour_pairs(hidden).sum() == 0
    undecided = torch.tensor([[0.25, 0.75], [1.0, 0.0]], dtype=torch.float64).T.view(1, 2, 1, 2)
    assert criteria.neighbour_pairs(undecided).tolist() == [[0.25, 0.375], [0.375, 0]]


def test_adjacency_agreement_is_a_divergence() -> None:
    expected = torch.tensor([[4.0, 2.0], [2.0, 0.0]], dtype=torch.float64)
    assert criteria.adjacency_agreement(expected, 5 * expected) == 0
    other = torch.tensor([[4.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    assert criteria.adjacency_agreement(expected, other) == pytest.approx(-0.5 * math.log(2))


def test_adjacency_agreement_tells_collapse_and_nonsense_from_anatomy() -> None:
    heart = [[0, 0, 0, 0], [0, 1, 1, 0], [0, 2, 2, 0], [0, 0, 0, 0]]
    moved = [[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [2, 2, 0, 0]]
    scattered = [[1, 0, 0, 2], [0, 0, 0, 0], [0, 0, 0, 0], [2, 0, 0, 1]]
    empty = [[0] * 4] * 4
    expected = criteria.neighbour_pairs(one_hot(heart))
    scores = [
        criteria.adjacency_agreement(expected, criteria.neighbour_pairs(0.97 * one_hot(labels) + 0.01))
        for labels in (heart, moved, scattered, empty)
    ]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > -0.001
    assert scores[2] < 2 * scores[1], "though the classes have the right shares"
    assert scores[3] < -1
