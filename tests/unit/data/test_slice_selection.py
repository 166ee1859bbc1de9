"""Which slices a picture shows."""

from __future__ import annotations

import numpy as np
import pytest

from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.data.slice_selection import evenly_spaced, labelled_slices


def test_slices_that_show_a_structure_are_chosen_evenly() -> None:
    labels = np.zeros((40, 2, 2), np.uint8)
    labels[10:31, 0, 0] = 1
    assert evenly_spaced(labelled_slices(labels), 3).tolist() == [15, 20, 25]
    labels[5:8] = NOT_ANNOTATED
    assert labelled_slices(labels)[0] == 10
    assert labelled_slices(np.zeros((3, 2, 2), np.uint8)).tolist() == [0, 1, 2]


def test_few_candidates_are_all_chosen_and_none_twice() -> None:
    for count in range(1, 5):
        assert evenly_spaced(np.arange(7, 7 + count), 6).tolist() == list(range(7, 7 + count))


@pytest.mark.parametrize(
    ("depth", "number", "expected"), [(1, 3, [0]), (2, 3, [0, 1]), (5, 3, [1, 2, 3]), (44, 3, [11, 22, 32])]
)
def test_the_ends_are_left_out(depth: int, number: int, expected: list[int]) -> None:
    assert evenly_spaced(np.arange(depth), number).tolist() == expected
