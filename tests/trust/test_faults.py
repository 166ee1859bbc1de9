"""The runner of faults names tests that there are."""

from __future__ import annotations

import re

import pytest

from tests.trust.faults import KINDS, ROOT


@pytest.mark.parametrize("test", sorted({test for tests in KINDS.values() for test in tests}))
def test_the_tests_of_a_fault_exist(test: str) -> None:
    file, _, name = test.partition("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    assert not name or re.search(rf"^def {name}\(", text, re.MULTILINE)
