"""IntraDA: the sorting of the target against plain loops, and the start of the second stage."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mpscl_ray.errors import DataError
from mpscl_ray.methods import IntraDA
from mpscl_ray.methods.base import TrainingSlices
from mpscl_ray.methods.intrada import sort_units, uncertainty
from mpscl_ray.networks import initialise
from tests.tiny_methods import CLASSES, SIZE, assert_equal_states, batch, make, segmenter


@pytest.mark.parametrize(("number", "easy"), [(3, 2), (10, 6), (100, 67), (528, 353), (7, 4), (1, 0)])
def test_the_easy_part_is_floor_of_its_fraction(number: int, easy: int) -> None:
    units = [range(row, row + 1) for row in range(number)]
    scores = torch.arange(number, dtype=torch.float64).flip(0)
    rows = sort_units(scores, units, 0.67)
    assert [len(part) for part in rows] == [easy, number - easy]
    assert rows[0].tolist() == list(range(number - easy, number)), "the lowest scores are easy"


def test_a_fraction_is_taken_as_it_is_written() -> None:
    units = [range(row, row + 1) for row in range(100)]
    assert 0.29 * 100 < 29
    assert len(sort_units(torch.zeros(100), units, 0.29)[0]) == 29


def test_equal_scores_keep_their_order_and_volumes_stay_whole() -> None:
    scores = torch.tensor([0.5, 0.1, 0.5, 0.1, 0.1, 0.5], dtype=torch.float64)
    easy, hard = sort_units(scores, [range(row, row + 1) for row in range(6)], 0.67)
    assert (easy.tolist(), hard.tolist()) == ([0, 1, 3, 4], [2, 5])
    easy, hard = sort_units(scores, [range(2), range(2, 3), range(3, 6)], 0.67)
    # Means 0.3, 0.5 and 0.7 / 3.
    assert (easy.tolist(), hard.tolist()) == ([0, 1, 3, 4, 5], [2])
    easy, hard = sort_units(torch.zeros(6), [range(2), range(2, 3), range(3, 6)], 0.4)
    assert (easy.tolist(), hard.tolist()) == ([0, 1], [2, 3, 4, 5])


def test_uncertainty_is_the_mean_self_information() -> None:
    logits = 2 * torch.randn(3, CLASSES, 4, 4, generator=torch.Generator().manual_seed(0))
    logits[2, 0] = 20
    p = logits.softmax(dim=1)
    for foreground in (False, True):
        ours = uncertainty(p, foreground)
        for image in range(3):
            values = []
            for row, column in np.ndindex(4, 4):
                pixel = p[image, :, row, column].double().tolist()
                if not foreground or int(np.argmax(pixel)) > 0:
                    values.append(sum(-x * math.log2(x + 1e-30) for x in pixel) / math.log2(CLASSES) / CLASSES)
            expected = float(np.mean(values)) if values else 1 / CLASSES
            assert float(ours[image]) == pytest.approx(expected, rel=1e-4)


def some_slices(start: dict[str, Tensor], number: int = 6) -> TrainingSlices:
    target = batch(5, number).target_image
    assert target is not None

    def unlabelled() -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, number, 4):
            yield torch.arange(first, min(first + 4, number)), target[first : first + 4]

    half = number // 2
    volumes = (range(half), range(half, number)) if half else (range(number),)
    return TrainingSlices(list, list, list, unlabelled, volumes, (SIZE, SIZE), lambda: start)


def trained() -> IntraDA:
    method: IntraDA = make("intrada")
    method.start_phase(20)
    for step in range(10):
        method.step(batch(step), step)
    return method


def test_the_second_stage_begins_with_new_networks_and_the_predictions_of_the_first() -> None:
    method = trained()
    slices = some_slices(segmenter(9).state_dict())
    images = torch.cat([image for _, image in slices.unlabelled()])
    probabilities = torch.cat([method.predict(image[None]) for image in images])
    method.start_phase(20)
    method.prepare(slices)
    split = method.split
    assert split is not None
    assert split.pseudo_labels.dtype == torch.uint8
    assert torch.equal(split.pseudo_labels, probabilities.argmax(dim=1)[split.easy].to(torch.uint8))
    assert len(torch.unique(split.pseudo_labels)) == CLASSES
    scores = uncertainty(probabilities, False)
    torch.testing.assert_close(method.scores, scores.double(), rtol=1e-4, atol=1e-8)
    assert float(scores[split.easy].max()) <= float(scores[split.hard].min())
    assert sorted([*split.easy.tolist(), *split.hard.tolist()]) == list(range(6))
    assert len(split.easy) == 4

    assert_equal_states(method.networks["segmenter"].state_dict(), segmenter(9).state_dict())
    fresh: Any = make("intrada", 0)
    for head in ("main", "aux"):
        name = f"discriminator_{head}"
        assert_equal_states(method.networks[name].state_dict(), fresh.networks[name].state_dict())
    initialise(fresh.networks["discriminator_main"], 5)
    with pytest.raises(AssertionError):
        assert_equal_states(
            method.networks["discriminator_main"].state_dict(), fresh.networks["discriminator_main"].state_dict()
        )


def test_the_sorting_is_part_of_the_state() -> None:
    method = trained()
    method.prepare(some_slices(segmenter(9).state_dict()))
    other: IntraDA = make("intrada", 3)
    other.load_state_dict(method.state_dict())
    assert_equal_states(other.state_dict(), method.state_dict())
    assert other.split is not None
    assert method.split is not None
    for field in dataclasses.fields(other.split):
        assert torch.equal(getattr(other.split, field.name), getattr(method.split, field.name))


def test_too_little_to_sort_is_an_error() -> None:
    method: IntraDA = make("intrada", unit="volume", easy_fraction=0.4)
    method.start_phase(10)
    with pytest.raises(DataError, match="2 volumes to train on, too few to sort"):
        method.prepare(some_slices(segmenter(0).state_dict()))
