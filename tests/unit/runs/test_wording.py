"""Numbers in sentences."""

from __future__ import annotations

import pytest

from mpscl_ray.runs.wording import counted


@pytest.mark.parametrize(
    ("number", "noun", "plural", "said"),
    [
        (0, "case", "", "0 cases"),
        (1, "case", "", "1 case"),
        (2, "labelled case", "", "2 labelled cases"),
        (3, "copy", "copies", "3 copies"),
    ],
)
def test_a_number_and_its_noun(number: int, noun: str, plural: str, said: str) -> None:
    assert counted(number, noun, plural) == said
