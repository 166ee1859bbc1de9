"""Signs that an adaptation goes wrong: told when they last, once a phase, and not before."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mpscl_ray.train.notices import PATIENCE, Notices, lost_shares


def told(records: list[dict[str, Any]], phase: str = "adaptation") -> list[str]:
    notices = Notices()
    return [
        sentence
        for number, record in enumerate(records)
        for sentence in notices.of_metrics({"phase": phase, "iteration": 10 * number} | record)
    ]


SIGNS = [
    ({"train/discriminator_accuracy_main": 0.998}, 0.7, "the discriminator main tells the domain of 99.8 %"),
    ({"train/prototype_angle_min": math.radians(2)}, math.radians(30), "two prototypes are 2.0 degrees apart"),
    ({"train/pseudo_label_fraction": 0.0002}, 0.4, "0.02 % of the target's pixels have a pseudo-label"),
    ({"train/pseudo_label_fraction": 1.0}, 0.4, "100 % of the target's pixels have a pseudo-label"),
]


@pytest.mark.parametrize(("wrong", "sane", "sentence"), SIGNS)
def test_a_sign_is_told_once_when_it_lasts(wrong: dict[str, float], sane: float, sentence: str) -> None:
    (key,) = wrong
    (found,) = told([wrong] * 3 * PATIENCE)
    assert found.startswith(f"at iteration {10 * (PATIENCE - 1)} of adaptation {sentence}")
    assert told([wrong] * (PATIENCE - 1)) == []
    assert told(([wrong] * (PATIENCE - 1) + [{key: sane}]) * 3) == []
    assert told([{key: sane}] * 3 * PATIENCE) == []


def test_skipped_steps_are_told_whenever_there_are_more() -> None:
    numbers = (0, 1, 1, 3, 3)
    found = told([{"train/skipped_steps": number} for number in numbers])
    assert [sentence.split(" had ")[0] for sentence in found] == [
        "by iteration 10 of adaptation 1 step",
        "by iteration 30 of adaptation 3 steps",
    ]


def test_each_phase_counts_for_itself() -> None:
    notices, wrong = Notices(), {"train/discriminator_accuracy_main": 1.0}
    found = []
    for phase in ("warm_up", "adaptation"):
        for number in range(PATIENCE):
            found += notices.of_metrics({"phase": phase, "iteration": number, **wrong})
    assert [sentence.split()[4] for sentence in found] == ["warm_up", "adaptation"]


def test_a_structure_that_two_validations_in_a_row_miss() -> None:
    shares = lost_shares(torch.tensor([0.9799, 0.02, 0.0001]), torch.tensor([0.9, 0.05, 0.05]), ("ventricle", "wall"))
    notices = Notices()
    assert list(notices.of_shares("adaptation", 10, shares)) == []
    (sentence,) = notices.of_shares("adaptation", 20, shares)
    assert sentence.startswith(
        "at iteration 20 of adaptation hardly any pixel of the target is predicted as wall (0.01 %"
    )
    assert list(notices.of_shares("adaptation", 30, shares)) == []
