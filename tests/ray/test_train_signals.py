"""Signals to all processes of a train command that started its own Ray, as terminals and batch systems send them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mpscl_ray.errors import Interrupted
from mpscl_ray.runs import checkpoint
from tests.tiny import make_pair
from tests.train_command import LONG, PATIENCE_S, Runs, Start, check_status, started_commands


@pytest.fixture(autouse=True)
def not_under_nohup() -> Iterator[None]:
    """Tests under ``nohup`` would pass their ignored SIGHUP on to the processes that they start."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    with started_commands() as started:
        yield started


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(make_pair(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("runs"))


def is_ray_started(processes: list[int]) -> bool:
    with suppress(FileNotFoundError):  # one has ended meanwhile
        return any(b"raylet_socket_name" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes)
    return False


def test_before_the_first_step_the_run_is_resumable(start: Start, runs: Runs) -> None:
    run, words = runs["early"], runs.arguments("early", *LONG, "scaling.num_workers=1")
    command = start(words)
    deadline = time.monotonic() + PATIENCE_S
    while not is_ray_started(command.processes()):
        assert time.monotonic() < deadline, command.text
        time.sleep(0.1)
    os.killpg(command.process.pid, signal.SIGHUP)
    assert command.wait() == Interrupted.exit_code, command.text
    assert check_status(run, "interrupted", 130, "stopped by SIGHUP") in command.text
    assert "Traceback" not in command.text
    command.assert_nothing_left()


def test_while_it_trains_there_is_a_checkpoint(start: Start, runs: Runs) -> None:
    run, words = runs["late"], runs.arguments("late", *LONG, "run.checkpoint_every=1000000", "scaling.num_workers=1")
    command = start(words)
    command.wait_for_steps(run, 2)
    os.killpg(command.process.pid, signal.SIGTERM)
    assert command.wait() == Interrupted.exit_code, command.text
    assert check_status(run, "interrupted", 130, "stopped by SIGTERM at iteration") in command.text
    stopped = run.read_metrics()[-1]["global_step"]
    assert checkpoint.list_checkpoints(run.checkpoints)[-1].name == f"step-{stopped:07d}"
    assert "Traceback" not in command.text
    command.assert_nothing_left()
    assert command.temporary_files() == []
