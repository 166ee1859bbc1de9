"""What status.json says of how far a run is, while it runs."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpscl_ray.errors import StorageError
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.position import StatusUpdates, TrainingPosition, position
from mpscl_ray.runs.run_directory import RunDirectory


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    folder = RunDirectory(tmp_path / "run")
    folder.create()
    folder.write_status("running", resume_command="the same")
    return folder


@pytest.fixture
def at(run: RunDirectory) -> Callable[..., None]:
    """Adds a record of metrics."""

    def add(step: int, phase: str = "warm_up", **values: Any) -> None:
        run.append_metrics({"global_step": step, "phase": phase, "iteration": step - 10, "iterations": 40, **values})

    return add


def test_a_position_has_the_last_validation_and_the_newest_checkpoint(
    run: RunDirectory, at: Callable[..., None]
) -> None:
    assert position(run) == {}
    at(20, **{"val/selection_score": 0.5, "val/dice/mean": float("nan"), "val/source/dice/mean": 0.6})
    at(30)
    for name in ("step-0000020", "step-0000030"):
        checkpoint.save(run.checkpoints / name, {"position": {"step": 20}})
    assert position(run) == {
        "phase": "warm_up",
        "iteration": 20,
        "iterations": 40,
        "global_step": 30,
        "validation": {"global_step": 20, "selection_score": 0.5, "source_dice": 0.6},
        "checkpoint": "step-0000030",
    }


def test_a_position_without_the_checkpoints_of_a_bucket_that_does_not_answer(
    run: RunDirectory, at: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent() -> list[str]:
        raise StorageError("the bucket does not answer")

    at(20)
    monkeypatch.setattr(run.store, "step_checkpoints", silent)
    assert position(run) == {"phase": "warm_up", "iteration": 10, "iterations": 40, "global_step": 20}


def test_speed_and_remaining_time(run: RunDirectory, at: Callable[..., None]) -> None:
    clock = Clock()
    at(15)  # of an earlier start, which the workers rewind
    progress = TrainingPosition(run, 110, clock)
    assert progress.read() == {}
    run.rewind_metrics(0)
    for seconds, step, phase, expected in (
        (0, 20, "warm_up", (None, None)),
        (5, 30, "warm_up", (2.0, 40)),
        (5, 30, "warm_up", (2.0, 40)),  # nothing new
        (5, 60, "adaptation", (None, None)),  # another phase has another speed
        (10, 65, "adaptation", (0.5, 90)),
        (5, 62, "adaptation", (None, None)),  # workers started again from a checkpoint
        (2, 64, "adaptation", (1.0, 46)),
    ):
        clock.seconds += seconds
        if position(run).get("global_step") != step:
            run.rewind_metrics(step - 1)
            at(step, phase)
        found = progress.read()
        assert (found["iterations_per_s"], found["eta_s"]) == expected, step
        assert (found["global_step"], found["total_steps"]) == (step, 110)


def test_a_status_is_written_every_few_seconds_at_most_and_only_where_it_changed(run: RunDirectory) -> None:
    clock, fields = Clock(), {"global_step": 1}
    updates = StatusUpdates(run, lambda: dict(fields), clock)

    def written() -> int | None:
        updates.update()
        return run.read_status().get("global_step")

    assert written() == 1
    fields["global_step"] = 2
    assert written() == 1
    clock.seconds += 3
    assert written() == 2
    inode = run.status_file.stat().st_ino
    clock.seconds += 3
    assert written() == 2
    assert run.status_file.stat().st_ino == inode, "it was not written again"
    fields["global_step"] = 3
    updates.update(at_once=True)
    assert run.read_status()["global_step"] == 3


def test_an_update_keeps_the_state_and_a_new_state_drops_the_speed(run: RunDirectory) -> None:
    run.write_status("interrupted", exit_code=130, reason="stopped by SIGTERM")
    run.update_status(global_step=7, iterations_per_s=2.0, eta_s=5)
    status = run.read_status()
    assert (status["state"], status["exit_code"], status["reason"]) == ("interrupted", 130, "stopped by SIGTERM")
    assert (status["global_step"], status["eta_s"], status["resume_command"]) == (7, 5, "the same")
    assert (status["pid"], status["host"]) == (os.getpid(), platform.node())
    run.write_status("finished", exit_code=0)
    assert run.read_status()["global_step"] == 7
    assert not {"iterations_per_s", "eta_s"} & run.read_status().keys()


def test_no_run_ends_for_its_status(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**position: Any) -> None:
        raise StorageError("no space left")

    monkeypatch.setattr(run, "update_status", full)
    StatusUpdates(run, lambda: {"global_step": 1}).update()
    run.metrics_file.write_text("damaged\n{}\n")
    assert position(run) == {}
