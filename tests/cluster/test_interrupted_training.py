"""The train command, killed and stopped in every way; and a worker that finds damage in what it streams."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpscl_ray.distributed.ray_session import connect
from mpscl_ray.errors import DataError
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.run_directory import RunDirectory
from tests.tiny import make_dataset, make_pair
from tests.train_command import (
    EVERY,
    LONG,
    STEPS,
    Runs,
    Start,
    check_status,
    signal_worker,
    started_commands,
    starts,
    wait_for_free_cpus,
)


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Starts commands, on a Ray that this process is on or on one of their own."""
    with connect(2, object_store_memory=200 * 2**20), started_commands() as started:
        yield started


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(make_pair(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("runs"))


def last_step(run: RunDirectory) -> int:
    return int(run.read_metrics()[-1]["global_step"])


def test_a_run_that_is_stopped_and_killed_resumes_each_time_to_its_end(start: Start, runs: Runs) -> None:
    """In turn: two SIGTERMs on a Ray of its own; SIGKILL, SIGTERM and nothing on a cluster."""
    run, words = runs["stopped"], runs.arguments("stopped", *LONG)

    command = start(words)
    command.wait_for_steps(run, 2)
    command.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == 130
    assert run.read_status()["state"] in ("running", "interrupted"), "it may not have had the time to write it"
    left_at_once = command

    command = start(words, cluster=True)
    reached = command.wait_for_steps(run, 3, start=2)
    command.process.kill()
    command.wait()
    assert run.read_status()["state"] == "running"

    command = start(words, cluster=True)
    command.wait_for_steps(run, 3, start=3)
    command.process.terminate()
    assert command.wait() == 130, command.text
    check_status(run, "interrupted", 130, "stopped by SIGTERM at iteration")
    stopped = last_step(run)
    assert checkpoint.list_checkpoints(run.checkpoints)[-1].name == f"step-{stopped:07d}"
    command.assert_nothing_left()
    wait_for_free_cpus()

    command = start(words, cluster=True)
    assert command.wait() == 0, command.text
    check_status(run, "finished", 0, "")
    steps = starts(run)
    assert len(steps) == 4
    assert steps[0] == 0
    assert reached - EVERY <= steps[2]
    assert steps[3] == stopped
    assert [record["global_step"] for record in run.read_metrics()] == list(range(1, STEPS + 1))
    left_at_once.assert_nothing_left(seconds=150)  # Agents of a Ray that was left give up only after a minute.


def test_a_worker_that_stops_answering_is_named_and_replaced(start: Start, runs: Runs) -> None:
    """SIGSTOP, as when the network to it is cut; the log of the worker that waits says where it does."""
    run, words = runs["silent"], runs.arguments("silent", *LONG, "scaling.collective_timeout_s=10")
    command = start(words, cluster=True)
    reached = command.wait_for_steps(run, EVERY + 3)
    signal_worker(run, 1, signal.SIGSTOP)
    command.wait_for_steps(run, 3, start=2)
    command.process.terminate()
    assert command.wait() == 130, command.text
    told = re.search(r"worker 1 on [\d.]+ did not answer for 10 s .* after step (\d+): its process hangs", command.text)
    assert told is not None, command.text
    assert reached - 1 <= int(told[1])
    assert reached - EVERY <= starts(run)[1], "at most one checkpoint interval is done again"
    log = (run.logs / "worker-0.log").read_text(encoding="utf-8")
    assert "Thread 0x" in log
    assert "in all_reduce" in log
    wait_for_free_cpus()


def test_a_flipped_bit_in_slices_that_workers_stream(start: Start, runs: Runs, tmp_path: Path) -> None:
    target = make_dataset(tmp_path / "ct", "ct", seed=1)
    file = target / "train" / "ct_train_1.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 16
    file.write_bytes(data)
    words = runs.arguments("flipped", f"data.target={target}", "data.in_memory=false", "scaling.num_workers=1")
    command = start(words, cluster=True)
    assert command.wait() == DataError.exit_code, command.text
    assert f"error: {file}: damaged" in command.text
    assert "Traceback" not in command.text
