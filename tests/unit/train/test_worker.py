"""A run that a scheduler may stop waits for the decision after each validation."""

from __future__ import annotations

import threading
from pathlib import Path

from mpscl_ray.runs.atomic_files import write_atomically
from mpscl_ray.runs.control_files import STOP_FILE, VALIDATION_GATE_FILE
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train.ray.worker import STOP_THERE, wait_for_decision


def test_a_run_without_a_scheduler_does_not_wait(tmp_path: Path) -> None:
    assert wait_for_decision(RunDirectory(tmp_path), 10)


def test_training_waits_until_it_is_decided_on_this_step_or_a_later_one(tmp_path: Path) -> None:
    file = tmp_path / VALIDATION_GATE_FILE
    file.write_text("10")
    assert wait_for_decision(RunDirectory(tmp_path), 10)
    answers: list[bool] = []
    waiting = threading.Thread(target=lambda: answers.append(wait_for_decision(RunDirectory(tmp_path), 20)))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive(), "step 10 says nothing of step 20"
    write_atomically(file, b"30")
    waiting.join(30)
    assert answers == [True]


def test_a_run_that_should_stop_has_the_stop_file_after_the_wait(tmp_path: Path) -> None:
    (tmp_path / VALIDATION_GATE_FILE).write_text("10")
    assert wait_for_decision(RunDirectory(tmp_path), 10)
    assert not (tmp_path / STOP_FILE).exists()
    (tmp_path / VALIDATION_GATE_FILE).write_text(f"20 {STOP_THERE}")
    assert wait_for_decision(RunDirectory(tmp_path), 20)
    assert (tmp_path / STOP_FILE).exists()


def test_the_wait_for_a_decision_has_a_limit(tmp_path: Path) -> None:
    (tmp_path / VALIDATION_GATE_FILE).write_text("0")
    assert not wait_for_decision(RunDirectory(tmp_path), 1, patience_s=0.1)


def test_the_wait_ends_when_the_scheduler_is_gone(tmp_path: Path) -> None:
    file = tmp_path / VALIDATION_GATE_FILE
    file.write_text("0")
    answers: list[bool] = []
    waiting = threading.Thread(target=lambda: answers.append(wait_for_decision(RunDirectory(tmp_path), 1)))
    waiting.start()
    file.unlink()
    waiting.join(30)
    assert answers == [True]
