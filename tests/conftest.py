"""Fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

# One thread here and in all processes that tests start, as Ray gives a worker of one CPU: with another number, sums are
# taken in another order, and runs that are compared bit for bit differ in the last one. Before anything imports torch.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several processes share the tests (``pytest -n 2``), one takes all that start a Ray, in turn."""
    for item in items:
        if item.path.parent == ROOT / "tests" / "ray":
            item.add_marker(pytest.mark.xdist_group("ray"))


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """Folder with third-party volumes and records, which are not distributed with the code.

    Looked for in ``MPSCL_RAY_TEST_DATA``, else in ``shared/data`` beside the checkout.
    """
    folder = Path(os.environ.get("MPSCL_RAY_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "mscmrseg").is_dir():
        pytest.skip(f"third-party test volumes are not at {folder}; set MPSCL_RAY_TEST_DATA to their folder")
    return folder
