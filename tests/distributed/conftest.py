"""Runs cases of workers.py in gloo processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Arrays = dict[str, np.ndarray[Any, Any]]
RunWorkers = Callable[[int, tuple[str, ...]], dict[str, list[Arrays]]]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def run_workers(tmp_path_factory: pytest.TempPathFactory) -> RunWorkers:
    """``run_workers(world_size, cases)``: what each rank wrote, by case."""

    def run(world_size: int, cases: tuple[str, ...]) -> dict[str, list[Arrays]]:
        folder = tmp_path_factory.mktemp("workers")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
        script = str(Path(__file__).with_name("workers.py"))
        logs = [folder / f"log-{rank}" for rank in range(world_size)]
        processes = []
        for rank, log in enumerate(logs):
            command = [sys.executable, "-W", "error", script, str(rank), str(world_size), str(folder), *cases]
            with log.open("w") as stream:
                processes.append(subprocess.Popen(command, env=environment, stdout=stream, stderr=stream))
        try:
            codes = [process.wait(timeout=300) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        assert not any(codes), "\n".join(f"rank {rank}:\n{log.read_text()}" for rank, log in enumerate(logs))
        return {
            case: [dict(np.load(folder / f"{case}-{rank}.npz", allow_pickle=False)) for rank in range(world_size)]
            for case in cases
        }

    return run
