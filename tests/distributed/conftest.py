"""Runs the cases of cases.py in gloo processes: all cases of one number of workers in one set of processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.distributed.cases import run_cases
from tests.worker_processes import on_workers

Ranks = list[dict[str, np.ndarray[Any, Any]]]
Run = Callable[[str, int], Ranks]

PARITY = ("fc-released", "fc-paper", "patchgan-released", "patchgan-paper", "fc-baseline", "segmentation")
METHODS = (
    "advent",
    "minent",
    "adaoutput",
    "adaoutput-least-squares",
    "adabn",
    "clan",
    "clan-focal",
    "intrada",
    "intrada-volumes",
    "cag",
    "cag-ce",
    "sifa",
    "sifa-first",
)
CASES = {
    1: (*PARITY, *METHODS),
    2: (*PARITY, *METHODS, "non-finite-source", "non-finite-target", "batch-norm", "objects"),
    4: ("fc-released", "intrada", "cag", "sifa", "batch-norm", "objects"),
}


@pytest.fixture(scope="session")
def run() -> Run:
    """``run(case, world_size)``: the arrays of each rank."""

    @cache
    def results_of(world_size: int) -> list[dict[str, dict[str, np.ndarray[Any, Any]]]]:
        return on_workers(world_size, run_cases, CASES[world_size])

    return lambda case, world_size: [results[case] for results in results_of(world_size)]
