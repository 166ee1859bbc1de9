"""Fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# One thread here and in all processes that tests start, as Ray gives a worker of one CPU: with another number, sums are
# taken in another order, and runs that are compared bit for bit differ in the last one. Before anything imports torch.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is in tests/cluster is the second tier: ``-m cluster``."""
    for item in items:
        if ROOT / "tests" / "cluster" in item.path.parents:
            item.add_marker(pytest.mark.cluster)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several processes (``pytest -n 2``) one takes the tests of trainings in tests/ray and one the others there,
    each of the two with one Ray for all of its tests; the rest goes by files."""
    from xdist.scheduler import LoadScopeScheduling

    class TwoRays(LoadScopeScheduling):  # type: ignore[misc, unused-ignore]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if not file.startswith("tests/ray/"):
                return file
            return "trainings" if file.startswith("tests/ray/test_train") else "others on Ray"

    return TwoRays(config, log)


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """Folder with third-party volumes and records, which are not distributed with the code.

    Looked for in ``MPSCL_RAY_TEST_DATA``, else in ``shared/data`` beside the checkout.
    """
    folder = Path(os.environ.get("MPSCL_RAY_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "mscmrseg").is_dir():
        pytest.skip(f"third-party test volumes are not at {folder}; set MPSCL_RAY_TEST_DATA to their folder")
    return folder
