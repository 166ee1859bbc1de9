"""What status.json says of a command, however it ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mpscl_ray.errors import DataError, Interrupted
from mpscl_ray.runs.lifecycle import carry_out
from mpscl_ray.runs.run_directory import RunDirectory

RESUME = "python -m mpscl_ray.train run.name=x"


def raising(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.fixture
def folder(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "x")
    run.create()
    run.append_metrics({"phase": "warm_up", "iteration": 3, "global_step": 7})
    return run


def test_work_that_is_done(folder: RunDirectory) -> None:
    states = []
    assert carry_out(folder, RESUME, lambda: states.append(folder.read_status()["state"])) == 0
    assert states == ["running"]
    status = folder.read_status()
    assert (status["state"], status["exit_code"], status["resume_command"]) == ("finished", 0, RESUME)
    assert (status["phase"], status["iteration"], status["global_step"]) == ("warm_up", 3, 7)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Interrupted("stopped by SIGTERM at iteration 3"), "stopped by SIGTERM at iteration 3"),
        (KeyboardInterrupt(), "stopped by SIGINT while Ray started or ended"),
        (SystemExit(15), "stopped by SIGTERM while Ray started or ended"),
    ],
)
def test_work_that_is_interrupted_says_how_to_resume(
    folder: RunDirectory, capsys: pytest.CaptureFixture[str], error: BaseException, reason: str
) -> None:
    assert carry_out(folder, RESUME, raising(error)) == 130
    status = folder.read_status()
    assert (status["state"], status["exit_code"], status["reason"]) == ("interrupted", 130, reason)
    assert status["global_step"] == 7
    assert capsys.readouterr().out == f"{reason}; to resume:\n  {RESUME}\n"


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [(DataError("a file is damaged"), 3, "a file is damaged"), (KeyError("x"), 1, "KeyError: 'x'")],
)
def test_work_that_fails_is_written_down_and_raised(
    folder: RunDirectory, error: Exception, code: int, reason: str
) -> None:
    with pytest.raises(type(error)):
        carry_out(folder, RESUME, raising(error))
    status = folder.read_status()
    assert (status["state"], status["exit_code"], status["reason"]) == ("failed", code, reason)
