"""How a search reads the end of a trial from its folder, and which trial is next."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from mpscl_ray.errors import ConfigError, StorageError
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.runs.tensorboard import TensorBoard
from mpscl_ray.tune import command
from mpscl_ray.tune import run as tune_run
from mpscl_ray.tune.ledger import Ledger
from mpscl_ray.tune.search_page import search_page
from mpscl_ray.tune.space import load_space
from mpscl_ray.tune.study import Study
from mpscl_ray.tune.trainable import PAUSE

State = Literal["running", "finished", "failed", "interrupted"]


def test_the_run_to_warm_up_from_is_looked_for_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(**options: object) -> None:
        pytest.fail("Ray would have been started")

    monkeypatch.setattr(tune_run, "connect", start)
    words = ["phantom", f"run.storage={tmp_path}", "--warm-up", str(tmp_path / "nowhere")]
    with pytest.raises(ConfigError, match="nowhere: no such folder, expected that of a run"):
        command.main(words)


def study_in(folder: Path, *words: str, log: Callable[[str], None] = lambda text: None) -> Study:
    space = load_space("phantom", ["search.scheduler=pausing_asha", *words])
    (folder / "search").mkdir(exist_ok=True)
    search = RunDirectory(folder / "search")
    nothing: Any = None
    study = Study(space, space.base, search, nothing, "oracle", Ledger(search.path / "ledger.jsonl"), log)
    if not study.ledger.trials:
        study.ledger.add(1, study.sampler.settings(1))
        study.ledger.report(1, 6, {"val/dice/mean": 0.5})
        study.trial_folder(1).create()
    return study


def test_the_page_of_a_search_has_its_trials_and_their_scores(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    study.ledger.add(2, study.sampler.settings(2))
    study.ledger.report(2, 6, {"val/dice/mean": 0.75})
    study.ledger.end(2, "failed", "a <reason>")
    search_page(study).update()
    text = study.folder.progress_page.read_text(encoding="utf-8")
    assert f"<dd>1 of {study.sampler.total} ended</dd>" in text
    assert "<dd>0.7500, trial 002 at iteration 6</dd>" in text
    assert '<a href="trials/001/progress.html">001</a>' in text
    assert "<li>trial 002 failed: a &lt;reason&gt;</li>" in text
    found = re.search(r'id="curves-data">(.*?)</script>', text)
    assert found is not None
    (panel,) = json.loads(found.group(1))["panels"]
    assert [(curve["name"], curve["values"]) for curve in panel["curves"]] == [("001", [0.5]), ("002", [0.75])]


@pytest.mark.parametrize(
    ("state", "code", "paused", "search_stops", "expected"),
    [
        ("finished", 0, False, False, ("finished", "")),
        ("finished", 0, True, False, ("finished", "")),
        ("interrupted", 130, True, False, (None, "")),
        ("running", None, True, False, (None, "")),
        ("failed", 6, False, False, ("failed", "a reason")),
        ("failed", 1, False, False, ("failed", "a reason")),
        ("failed", 6, True, False, ("failed", "a reason")),
        ("running", None, False, False, ("failed", "its process failed or was lost 4 times: it died")),
        ("interrupted", 130, False, False, (None, "")),
        ("running", None, False, True, (None, "")),
        ("failed", 5, False, False, (None, "")),
    ],
)
def test_the_end_of_a_trial_is_read_from_its_folder(
    tmp_path: Path, state: State, code: int | None, paused: bool, search_stops: bool, expected: tuple[str | None, str]
) -> None:
    study = study_in(tmp_path)
    run = study.trial_folder(1)
    run.write_status(state, exit_code=code, reason="a reason" if state == "failed" else "")
    if paused:
        run.control_files.write(PAUSE, "waits at iteration 6")
    if search_stops:
        study.stopping.set()
    study.trial_ended(1, "it died")
    trial = Ledger(study.ledger.file).trials[1]
    assert (trial.state, trial.reason) == expected
    assert (1 in study.remaining()) == (expected[0] is None)
    assert [type(error) for error in study.errors] == ([StorageError] if code == 5 else [])


def test_a_search_that_was_killed_knows_how_long_its_trials_had_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: seconds)
    study = study_in(tmp_path)
    study.trial_started(1)
    seconds += 10
    study.trial_lost(1, "it died")
    seconds += 1000
    study.trial_started(1)
    seconds += 20
    study.report(1, 8, 0.5, {"val/dice/mean": 0.5})
    study.close()

    study = study_in(tmp_path)
    study.trial_started(1)
    seconds += 300
    study.trial_folder(1).write_status("failed", exit_code=6, reason="a reason")
    study.trial_ended(1)
    assert Ledger(study.ledger.file).trials[1].seconds == 330


def test_a_trial_whose_adaptation_was_ended_by_its_guard_is_not_trained_in_full(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    study.trial_folder(1).append_metrics({"global_step": 56, "phase": "adaptation", "iteration": 6, "iterations": 9})
    study.trial_folder(1).write_status("finished", exit_code=0)
    study.trial_ended(1)
    trial = Ledger(study.ledger.file).trials[1]
    assert (trial.state, trial.reason) == ("stopped", "the adaptation did harm and ended at iteration 6")


def more(study: Study, *dices: float, iteration: int = 30) -> Study:
    """A study of the same folder, opened again when trials 2, 3, ... have reported as well."""
    for number, dice in enumerate(dices, start=2):
        study.ledger.add(number, study.sampler.settings(number))
        study.ledger.report(number, iteration, {"val/dice/mean": dice})
        study.trial_folder(number).create()
        study.trial_folder(number).write_status("running")
    return study_in(study.folder.path.parent)


def test_a_search_that_was_killed_after_a_report_stops_trials_when_it_resumes(tmp_path: Path) -> None:
    again = more(study_in(tmp_path), 0.1, 0.3, 0.2, 0.9, 0.4)
    again.recover()
    states = {number: trial.state for number, trial in again.ledger.trials.items()}
    # Of 12 trials three are promoted from the first rung: 2 and 4 cannot be among them. 5 was when it came.
    assert states == {1: None, 2: "stopped", 3: None, 4: "stopped", 5: None, 6: None}
    assert again.ledger.trials[4].reason == "fell behind at iteration 30"
    assert [again.trial_folder(n).checkpoints.exists() for n in (2, 3)] == [False, True], "its checkpoints are deleted"
    given = []
    for _ in range(4):
        number = again.next_trial()
        assert number is not None
        assert again.next_task(number, None) is not None
        given.append(number)
    assert given == [1, 5, 7, 8], "interrupted, then promoted, then new trials; 3 and 6 wait"


def test_a_search_resumes_with_reports_in_the_order_in_which_they_came(tmp_path: Path) -> None:
    study = more(study_in(tmp_path), 0.1, 0.2, 0.3, 0.9)
    study.ledger.report(1, 30, {"val/dice/mean": 0.95})
    again = study_in(tmp_path)
    assert [again.scheduler.waits_at(number) for number in range(1, 6)] == [None, 30, 30, 30, None], (
        "5 was the best of four, and 1 of five when it came"
    )


def test_one_trial_at_least_is_trained_in_full(tmp_path: Path) -> None:
    first = study_in(tmp_path)
    first.ledger.report(1, 30, {"val/dice/mean": 0.5})
    study = more(first, 0.1, 0.2, 0.6, *[0.1] * 8)

    def all_that_may_run() -> list[int]:
        given = []
        while (number := study.next_trial()) is not None:
            assert study.next_task(number, None) is not None
            given.append(number)
        return given

    assert all_that_may_run() == [4, 1, 3], "three of twelve; 4 was among the best when it came"
    assert study.active
    for number, dice in ((1, 0.6), (3, 0.7), (4, 0.5)):
        study.ledger.report(number, 120, {"val/dice/mean": dice})
        assert study.scheduler.report(number, 120, dice), "of three on the second rung, a quarter is none"
    study.active.clear()
    assert all_that_may_run() == [3], "but one has to be trained in full"
    study._record_end(3, "finished")
    study.active.clear()
    assert (study.next_trial(), study.active) == (None, set())


def test_settings_that_contradict_each_other_end_a_trial_before_it_starts(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    study.ledger.add(2, {**study.sampler.settings(2), "data.global_batch_size": 3, "scaling.num_workers": 2})
    assert study.next_task(2, None) is None
    assert study.ledger.trials[2].state == "failed"
    assert "data.global_batch_size=3" in study.ledger.trials[2].reason
    study.trial_folder(1).control_files.write(PAUSE, "waits at iteration 6")
    task = study.next_task(1, None)
    assert task is not None
    assert task["number"] == 1
    assert study.trial_folder(1).control_files.read(PAUSE) is None, "otherwise it would pause again at once"


def test_a_trial_that_is_over_reports_again_to_ray_tune_and_does_not_run(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    running = study.next_task(1, None)
    assert running is not None
    assert (running["ended"], json.loads(running["task"])["reports"]) == (False, [])
    study.active.clear()
    study._record_end(1, "finished")
    over = study.next_task(1, None)
    assert over is not None
    assert (over["ended"], json.loads(over["task"])["reports"]) == (True, [[6, {"val/dice/mean": 0.5}]])
    assert study.active == set()


def test_a_trial_that_cannot_write_its_end_stays_open_and_stops_the_search(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    study.trial_folder(1).write_status("running")
    study.unreachable[1] = "cannot write s3://bucket/runs"
    study.trial_ended(1)
    assert not study.ledger.trials[1].ended
    assert [type(error) for error in study.errors] == [StorageError]


def test_ashas_decision_ends_a_trial_and_a_resumed_search_knows_it(tmp_path: Path) -> None:
    asha = ("search.scheduler=asha", "search.reduction_factor=2")
    study = study_in(tmp_path, *asha)
    for number, dice in ((2, 0.3), (3, 0.1)):
        study.ledger.add(number, study.sampler.settings(number))
        study.trial_folder(number).create()
        study.trial_folder(number).write_status("interrupted", exit_code=130)
        study._boards[number] = study._boards.get(number) or TensorBoard(tmp_path / "events", warn=print)
        study.report(number, 30, dice, {"val/dice/mean": dice})
    assert [study.trial_folder(n).control_files.read(PAUSE) for n in (2, 3)] == [None, "waits at iteration 30"]
    again = study_in(tmp_path, *asha)
    again.recover()
    assert (again.ledger.trials[3].state, again.ledger.trials[3].reason) == ("stopped", "fell behind at iteration 30")
    assert not again.ledger.trials[2].ended


def test_max_t_stops_a_trial_there_and_keeps_its_checkpoints(tmp_path: Path) -> None:
    study = study_in(tmp_path, "search.scheduler=asha", "search.max_t=50")
    study._boards[1] = TensorBoard(tmp_path / "events", warn=print)
    study.report(1, 50, 0.5, {"val/dice/mean": 0.5})
    assert study.trial_folder(1).control_files.read(PAUSE) == "waits at iteration 50"
    study.trial_folder(1).write_status("interrupted", exit_code=130)
    study.trial_ended(1)
    trial = study.ledger.trials[1]
    assert (trial.state, trial.reason) == ("stopped", "search.max_t is 50")
    assert study.trial_folder(1).checkpoints.exists()


def test_a_rung_at_which_the_first_trials_score_the_same_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    study = study_in(tmp_path, "search.scheduler=asha", "search.reduction_factor=3", log=told.append)
    for number in (2, 3, 4, 5):
        study.ledger.add(number, study.sampler.settings(number))
        study._boards[number] = TensorBoard(tmp_path / "events", warn=print)
        study.report(number, 30, 0.0, {"val/dice/mean": 0.0})
    assert [text for text in told if "rung" in text] == [
        "the first 3 trials at the rung 30 all score 0.0000, so it does not tell them apart and they continue; "
        "search.grace_period=ITERATIONS sets a later first rung"
    ]
    assert not any(study.scheduler.cannot_be_promoted(number) for number in (2, 3, 4, 5))
