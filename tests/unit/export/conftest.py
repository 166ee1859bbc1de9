"""What the tests of exported models share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model files are unpacked in a folder of the tests, not in that of the user."""
    monkeypatch.setenv("MPSCL_RAY_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
