"""Runs the cases of workers.py in gloo processes: all cases of one number of workers in one set of processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Ranks = list[dict[str, np.ndarray[Any, Any]]]
Run = Callable[[str, int], Ranks]

ROOT = Path(__file__).resolve().parents[2]
PARITY = ("fc-released", "fc-paper", "patchgan-released", "patchgan-paper", "segmentation")
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
    4: ("fc-released", "patchgan-paper", "adaoutput", "clan", "intrada", "cag", "sifa", "batch-norm", "objects"),
}


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """``run(case, world_size)``: the arrays that each rank wrote."""

    @cache
    def folder_of(world_size: int) -> Path:
        folder = tmp_path_factory.mktemp(f"workers-{world_size}")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
        script = str(Path(__file__).with_name("workers.py"))
        logs = [folder / f"log-{rank}" for rank in range(world_size)]
        processes = []
        for rank, log in enumerate(logs):
            arguments = [script, str(rank), str(world_size), str(folder), *CASES[world_size]]
            with log.open("w") as stream:
                command = [sys.executable, "-W", "error", *arguments]
                processes.append(subprocess.Popen(command, env=environment, stdout=stream, stderr=stream))
        try:
            codes = [process.wait(timeout=1800) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        assert not any(codes), "\n".join(f"rank {rank}:\n{log.read_text()}" for rank, log in enumerate(logs))
        return folder

    def read(case: str, world_size: int) -> Ranks:
        folder = folder_of(world_size)
        return [dict(np.load(folder / f"{case}-{rank}.npz", allow_pickle=False)) for rank in range(world_size)]

    return read
