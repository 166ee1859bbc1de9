"""Runs the cases of cases.py in gloo processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.distributed.cases import run_case
from tests.worker_processes import on_workers

Ranks = list[dict[str, np.ndarray[Any, Any]]]
Run = Callable[[str, int], Ranks]


@pytest.fixture(scope="session")
def run() -> Run:
    """``run(case, world_size)``: the arrays of each rank, computed once."""
    return cache(lambda case, world_size: on_workers(world_size, run_case, case))
