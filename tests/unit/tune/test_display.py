"""The table of trials: redrawn in its own lines on a terminal, a line for each event elsewhere."""

from __future__ import annotations

import io
import math
from types import SimpleNamespace
from typing import Any

from mpscl_ray.tune.display import TrialTable, trial_rows
from mpscl_ray.tune.ledger import Trial


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_rows_name_state_iteration_score_and_settings() -> None:
    trials = [
        Trial(1, {"method.gamma": 0.25, "method.margin_form": "paper"}, {10: {"score": 0.5}}, "finished"),
        Trial(2, {"method.gamma": 12.5, "method.margin_form": "released"}, {10: {"score": math.nan}}),
        Trial(3, {"method.gamma": 1e-5, "method.margin_form": "paper"}),
    ]
    study: Any = SimpleNamespace(
        space=SimpleNamespace(keys=["method.gamma", "method.margin_form"]),
        ledger=SimpleNamespace(trials={trial.number: trial for trial in trials}),
        started={2: 0.0},
        sampler=SimpleNamespace(total=5),
        iterations=60,
        score=lambda trial: trial.last.get("score"),
        metric="oracle",
    )
    lines = trial_rows(study)
    assert [line.split() for line in lines] == [
        ["trial", "state", "iteration", "oracle", "gamma", "margin_form"],
        ["001", "finished", "10/60", "0.5000", "0.25", "paper"],
        ["002", "running", "10/60", "12.5", "released"],
        ["003", "waiting", "0/60", "1e-05", "paper"],
        ["2", "more", "to", "come"],
    ]
    assert len({len(line) for line in lines[:4]}) == 1, "columns stand under each other"


def test_without_a_terminal_each_event_is_a_line_and_no_table_is_drawn() -> None:
    stream = io.StringIO()
    table = TrialTable(lambda: ["table"], stream)
    table.log("trial 001 finished")
    table.redraw()
    table.close()
    assert stream.getvalue() == "trial 001 finished\n"


def test_on_a_terminal_the_table_is_redrawn_in_its_own_lines() -> None:
    stream = Terminal()
    rows = ["one"]
    table = TrialTable(lambda: rows, stream)
    table.log("trial 001 starts")
    table.redraw()
    table.redraw()
    first = stream.getvalue()
    assert first == "\x1b[Jone\n\ntrial 001 starts\n", "at most once a second"
    rows.append("two")
    table.close()
    assert stream.getvalue().removeprefix(first) == "\x1b[3A\x1b[Jone\ntwo\n\ntrial 001 starts\n"
    table.redraw()
    table.log("over")
    assert stream.getvalue().endswith("starts\nover\n")
