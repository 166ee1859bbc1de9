"""What a search makes of how a trial's process ended, read from the trial's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

from mpscl_ray.errors import StorageError
from mpscl_ray.run_folder import RunFolder
from mpscl_ray.search.ledger import Ledger
from mpscl_ray.search.space import load_space
from mpscl_ray.search.study import Study
from mpscl_ray.search.task import STOP_EARLY, STOP_SEARCH

State = Literal["running", "finished", "failed", "interrupted"]


def study_in(folder: Path) -> Study:
    space = load_space("phantom")
    (folder / "search").mkdir(exist_ok=True)
    search = RunFolder(folder / "search")
    nothing: Any = None
    study = Study(space, space.base, search, nothing, "oracle", Ledger(search.path / "ledger.jsonl"), lambda text: None)
    if not study.ledger.trials:
        study.ledger.add(1, study.draws.settings(1))
        study.ledger.report(1, 6, {"val/dice/mean": 0.5})
        study.trial_folder(1).create()
    return study


@pytest.mark.parametrize(
    ("state", "code", "early", "search_stops", "expected"),
    [
        ("finished", 0, False, False, ("finished", "")),
        ("finished", 0, True, False, ("finished", "")),
        ("interrupted", 130, True, False, ("stopped", "fell behind at iteration 6")),
        ("failed", 6, False, False, ("failed", "a reason")),
        ("failed", 1, False, False, ("failed", "a reason")),
        ("running", None, False, False, ("failed", "its process was lost 4 times")),
        ("interrupted", 130, False, False, (None, "")),
        ("running", None, False, True, (None, "")),
        ("failed", 5, False, False, (None, "")),
    ],
)
def test_a_trial_has_the_end_that_its_folder_tells(
    tmp_path: Path, state: State, code: int | None, early: bool, search_stops: bool, expected: tuple[str | None, str]
) -> None:
    study = study_in(tmp_path)
    run = study.trial_folder(1)
    run.write_status(state, exit_code=code, reason="a reason" if state == "failed" else "")
    if early:
        study._fell_behind(1, 6)
    study.stopping = search_stops
    study.ended(1)
    trial = Ledger(study.ledger.file).trials[1]
    assert (trial.state, trial.reason) == expected
    assert (1 in study.remaining()) == (expected[0] is None)
    assert run.checkpoints.exists() == (expected[0] != "stopped"), "weights of a stopped trial are of no use to anyone"
    assert [type(problem) for problem in study.held_up] == ([StorageError] if code == 5 else [])


def test_a_search_that_was_killed_between_a_report_and_its_consequence_draws_it_later(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    for number, dice in ((2, 0.1), (3, 0.9)):
        study.ledger.add(number, study.draws.settings(number))
        study.ledger.report(number, 6, {"val/dice/mean": dice})
        study.trial_folder(number).create()
        study.trial_folder(number).write_status("running")
    again = study_in(tmp_path)
    again.settle()
    assert {number: trial.state for number, trial in again.ledger.trials.items()} == {1: None, 2: "stopped", 3: None}
    assert again.remaining()[:2] == [1, 3]
    assert (again.trial_folder(2).path / STOP_EARLY).exists()
    assert not (again.folder.path / STOP_SEARCH).exists()


def test_settings_that_do_not_go_together_end_a_trial_before_it_starts(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    study.ledger.add(2, {**study.draws.settings(2), "data.batch_size": 3, "scaling.workers": 2})
    assert study.next_task(2, None) is None
    assert study.ledger.trials[2].state == "failed"
    assert "data.batch_size=3" in study.ledger.trials[2].reason
    task = study.next_task(1, None)
    assert task is not None
    assert task["number"] == 1


def test_a_trial_that_cannot_tell_its_end_holds_the_search_up_and_has_none(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    study.trial_folder(1).write_status("running")
    study.unreachable[1] = "cannot write s3://bucket/runs"
    study.ended(1)
    assert not study.ledger.trials[1].ended
    assert [type(problem) for problem in study.held_up] == [StorageError]
