"""Who may write a run: locks of commands and of worker 0."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mpscl_ray.errors import ConfigError
from mpscl_ray.runs import lock
from mpscl_ray.runs.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    folder = RunDirectory(tmp_path / "runs" / "demo")
    folder.create()
    return folder


@contextmanager
def another_process_holds(run: RunDirectory) -> Iterator[subprocess.Popen[str]]:
    script = f"""
import sys
from pathlib import Path
from mpscl_ray.runs.run_directory import RunDirectory
with RunDirectory(Path({str(run.path)!r})).lock():
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_second_process_is_refused_and_a_dead_one_is_not_waited_for(run: RunDirectory) -> None:
    assert run.store.lock_owner() is None
    with another_process_holds(run) as process:
        with (
            pytest.raises(ConfigError, match=rf"the run demo is in use by process {process.pid} on .*another run.name"),
            run.lock(),
        ):
            pass
        assert run.store.lock_owner() == process.pid
        (run.path / ".status.json.partial-123").touch()
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        assert run.store.lock_owner() is None
        with run.lock():
            assert (run.path / ".lock").read_text(encoding="utf-8").startswith(f"{os.getpid()} ")
            assert not (run.path / ".status.json.partial-123").exists()
    with run.lock():
        pass


def test_a_lock_held_on_another_host_counts(run: RunDirectory) -> None:
    with another_process_holds(run) as process:
        (run.path / ".lock").write_text(f"{process.pid} elsewhere 2026-01-01\n")  # as a shared disk shows it
        with pytest.raises(ConfigError, match=rf"in use by process {process.pid} on elsewhere since"), run.lock():
            pass


def test_worker_0_waits_for_that_of_a_command_that_was_killed(run: RunDirectory) -> None:
    entered = threading.Event()

    def train() -> None:
        with run.store.worker_lock("", 0):
            entered.set()

    worker = threading.Thread(target=train)
    with run.store.worker_lock("", 0):
        worker.start()
        with run.store.worker_lock("", 1):
            assert not entered.wait(0.3), "other workers write nothing that it does, and are not waited for"
    worker.join(30)
    assert entered.is_set()


def test_lock_is_free_after_an_error(run: RunDirectory) -> None:
    with pytest.raises(RuntimeError), run.lock():
        raise RuntimeError
    with run.lock(), pytest.raises(ConfigError, match=f"process {os.getpid()} "), run.lock():
        pass


def test_without_flock_the_pid_decides(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with run.lock(), pytest.raises(ConfigError, match=f"in use by process {os.getpid()} "), run.lock():
        pass
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    (run.path / ".lock").write_text(f"{ended.pid} {os.uname().nodename} earlier\n")
    with run.lock():
        pass
