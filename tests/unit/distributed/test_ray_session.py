"""Start of Ray on a busy machine: what is retried, what is left behind, what is said."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from mpscl_ray.distributed.ray_session import START_ATTEMPTS, _temp_dir, _unreachable, connect
from mpscl_ray.errors import ClusterError, Interrupted

TOO_SLOW = "The current node timed out during startup. This could happen because some of the raylet failed to startup"


class Starts:
    """``ray.init`` on a machine where the first ``failing`` starts fail, each with a process that stays alive."""

    def __init__(self, failing: int, error: BaseException | None = None) -> None:
        self.failing = failing
        self.error = error or Exception(TOO_SLOW)  # a bare one, as Ray does
        self.processes: list[subprocess.Popen[bytes]] = []

    def __call__(self, *, _temp_dir: str, **options: Any) -> None:
        command = [sys.executable, "-c", "import time; time.sleep(600)", f"--session-dir={_temp_dir}/session"]
        process = subprocess.Popen(command)
        while _temp_dir not in Path(f"/proc/{process.pid}/cmdline").read_text(encoding="utf-8"):
            time.sleep(0.01)  # it is being executed
        self.processes.append(process)
        if len(self.processes) <= self.failing:
            raise self.error


@pytest.fixture
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Ray's temporary folders would be."""
    folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    return folder


def test_a_start_that_fails_is_tried_again(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    starts = Starts(failing=START_ATTEMPTS - 1)
    monkeypatch.setattr(ray, "init", starts)
    with connect(1):
        *failed, started = starts.processes
        assert [process.wait(10) for process in failed] == [-9] * (START_ATTEMPTS - 1), "no process of them is left"
        assert started.poll() is None
        assert len(list(temporary.iterdir())) == 1
    assert list(temporary.iterdir()) == []
    assert capsys.readouterr().err.count(f"warning: Ray did not start ({TOO_SLOW}") == START_ATTEMPTS - 1
    started.kill()
    started.wait()


@pytest.mark.parametrize("before", [None, "1"])
def test_what_is_set_for_a_private_cluster_is_as_before_after_it(
    before: str | None, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
    monkeypatch.setenv(setting, "1")
    if before is None:
        monkeypatch.delenv(setting)
    starts = Starts(failing=0)
    monkeypatch.setattr(ray, "init", starts)
    with connect(1):
        assert os.environ[setting] == (before or "0"), "the user's own choice stays"
    assert os.environ.get(setting) == before
    starts.processes[0].kill()
    starts.processes[0].wait()


def test_starts_that_all_fail_end_in_one_sentence(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = Starts(failing=START_ATTEMPTS)
    monkeypatch.setattr(ray, "init", starts)
    with pytest.raises(ClusterError, match=rf"tried {START_ATTEMPTS} times: {TOO_SLOW}.*; try again when"), connect(1):
        pytest.fail("there is no Ray")
    assert [process.wait(10) for process in starts.processes] == [-9] * START_ATTEMPTS
    assert list(temporary.iterdir()) == []
    assert ClusterError.exit_code == 4


def test_a_start_that_ray_refuses_for_a_wrong_value_is_not_tried_again(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = Starts(failing=START_ATTEMPTS, error=ValueError("num_cpus must be positive"))
    monkeypatch.setattr(ray, "init", starts)
    with pytest.raises(ClusterError, match="refuses to start on this machine: num_cpus must be positive"), connect(1):
        pytest.fail("there is no Ray")
    (process,) = starts.processes
    assert process.wait(10) == -9
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("error", [Interrupted("stopped by SIGINT"), KeyboardInterrupt(), SystemExit(15)])
def test_a_start_that_is_interrupted_is_not_tried_again_and_leaves_nothing(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    starts = Starts(failing=1, error=error)
    monkeypatch.setattr(ray, "init", starts)
    with pytest.raises(type(error)), connect(1):
        pytest.fail("there is no Ray")
    (process,) = starts.processes
    assert process.wait(10) == -9
    assert list(temporary.iterdir()) == []


def test_what_killed_commands_have_left_is_removed_at_the_next_start(temporary: Path) -> None:
    script = "from mpscl_ray.distributed.ray_session import _temp_dir; print(_temp_dir('ray-'), flush=True); input()"
    words = [sys.executable, "-c", script]
    environment = os.environ | {"TMPDIR": str(temporary)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    killed, alive = (subprocess.Popen(words, env=environment, **pipes) for _ in range(2))  # type: ignore[call-overload]
    left, kept = (Path(process.stdout.readline().strip()) for process in (killed, alive))
    (left / "session").mkdir()
    other = temporary / "ray-of-another-program"
    other.mkdir()
    killed.kill()
    killed.wait()
    own = _temp_dir("ray-")
    assert sorted(temporary.iterdir()) == sorted([kept, other, own])
    alive.communicate("\n")


def test_other_versions_on_a_cluster_are_told_with_both() -> None:
    told = RuntimeError(
        "Version mismatch: The cluster was started with:\n    Ray: 2.59.0\n    Python: 3.12.1\nThis "
        "process on node 10.0.0.1 was started with:\n    Ray: 2.60.0\n    Python: 3.11.7\n"
    )
    text = _unreachable("10.0.0.2:6379", told)
    assert "Ray: 2.59.0 Python: 3.12.1 This process on node 10.0.0.1 was started with: Ray: 2.60.0" in text
    assert "install the same Ray and Python" in text


def test_a_mode_of_authentication_that_ray_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "bogus")
    with pytest.raises(ClusterError, match="RAY_AUTH_MODE is 'bogus'; expected token or disabled"), connect(1):
        pytest.fail("there is no Ray")
