"""The ledger of a search, early stopping that goes by it, and what a search makes of it."""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from mpscl_ray.config import load_config
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.search import figures
from mpscl_ray.search.criteria import CRITERIA, agreement, rank_correlation, score
from mpscl_ray.search.draws import draws
from mpscl_ray.search.early_stopping import EarlyStopping
from mpscl_ray.search.ledger import Ledger, Trial
from mpscl_ray.search.outcome import agreements, best_trial, preset_text, saving, trials_csv, trials_markdown
from mpscl_ray.search.space import load_space

DICE = "val/dice/mean"


def test_a_ledger_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.add(1, {"method.alpha": 0.1})
    ledger.add(2, {"method.alpha": 0.2})
    assert ledger.report(1, 10, {DICE: 0.5})
    assert ledger.report(2, 10, {DICE: math.nan})
    assert not ledger.report(1, 10, {DICE: 0.7}), "the first report of an iteration is the one that counts"
    ledger.report(1, 20, {DICE: 0.6})
    ledger.end(1, "stopped", "fell behind", 12.34)
    read = Ledger(tmp_path / "ledger.jsonl")
    assert read.order == ledger.order == [(1, 10), (2, 10), (1, 20)]
    assert read.trials[1] == ledger.trials[1]
    assert (read.trials[1].iteration, read.trials[1].last, read.trials[1].state) == (20, {DICE: 0.6}, "stopped")
    assert math.isnan(read.trials[2].last[DICE])
    assert not read.trials[2].ended
    with pytest.raises(AssertionError, match="ended twice"):
        read.end(1, "finished")


def test_a_torn_last_line_is_dropped_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    ledger = Ledger(file)
    ledger.add(1, {})
    ledger.report(1, 10, {})
    whole = file.read_bytes()
    for cut in range(len(whole) - len(whole.splitlines()[-1]) - 1, len(whole)):
        file.write_bytes(whole[:cut])
        again = Ledger(file)
        assert again.order == []
        again.report(1, 10, {})
        assert Ledger(file).order == [(1, 10)]
    file.write_bytes(b"x" + whole)
    with pytest.raises(DataError, match="line 1 is damaged"):
        Ledger(file)


class Told:
    """A trial of Ray Tune, and what early stopping said of it."""

    def __init__(self, iterations: int = 90, grace: int = 10, reduction: float = 3) -> None:
        self.stopped: list[tuple[int, int]] = []
        self.scheduler = EarlyStopping(
            iterations,
            grace,
            reduction,
            lambda *_: True,
            lambda number, iteration: self.stopped.append((number, iteration)),
        )

    def report(self, number: int, iteration: int, value: float) -> None:
        result: dict[str, Any] = {"number": number, "iteration": iteration, "score": value, f"values/{DICE}": value}
        assert self.scheduler.on_trial_result(None, None, result) == "CONTINUE", "trials are asked, never killed"


def test_a_trial_is_asked_to_stop_once_where_it_is_not_among_the_best_third() -> None:
    told = Told()
    for number, value in enumerate((0.5, 0.6, 0.4, 0.7), start=1):
        told.report(number, 10, value)
    # Cutoffs are the 2/3 quantiles of what came before: none, 0.5, 0.567, 0.533.
    assert told.stopped == [(3, 10)]
    told.report(3, 30, 0.1)
    told.report(1, 20, 0.0)
    assert told.stopped == [(3, 10)], "between rungs nothing is decided, and nobody is asked twice"
    told.report(1, 30, 0.5)
    told.report(2, 30, 0.4)
    told.report(4, 90, 0.0)
    assert told.stopped == [(3, 10), (2, 30)], "nothing is stopped at its end"


@given(
    st.lists(st.tuples(st.integers(1, 6), st.floats(0, 1), st.booleans()), max_size=40),
    st.integers(0, 40),
)
def test_decisions_do_not_depend_on_interruptions(reports: list[tuple[int, float, bool]], cut: int) -> None:
    whole, first, second = Told(), Told(), Told()
    done: dict[int, int] = {}
    ledger: Any = type("Known", (), {"order": [], "trials": {}})()
    for index, (number, value, _) in enumerate(reports):
        iteration = done[number] = done.get(number, 0) + 10
        if iteration > 90:
            continue
        whole.report(number, iteration, value)
        if index < cut:
            first.report(number, iteration, value)
            ledger.order.append((number, iteration))
            ledger.trials.setdefault(number, Trial(number, {})).reports[iteration] = {DICE: value}
        else:
            if index == cut or not second.scheduler._known:
                assert second.scheduler.replay(ledger, lambda values: values[DICE]) == first.stopped
            second.report(number, iteration, value)
    assert first.stopped + second.stopped == whole.stopped or cut > len(reports)


def test_a_report_that_is_known_decides_nothing() -> None:
    stopped: list[int] = []
    scheduler = EarlyStopping(90, 10, 3, lambda *_: False, lambda number, _: stopped.append(number))
    for number, value in ((1, 0.5), (2, 0.1)):
        scheduler.on_trial_result(None, None, {"number": number, "iteration": 10, "score": value})
    assert stopped == []


def test_rank_correlation_by_hand() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # Ranks 1 2 3 4 against 2 1 4 3: 1 - 6 * 4 / (4 * 15).
    assert rank_correlation([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)
    assert rank_correlation([1, 1, 2], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)
    assert math.isnan(rank_correlation([1, 1], [1, 2]))


def test_scores_and_agreement_of_a_criterion() -> None:
    record = {DICE: 0.5, "val/source/dice/mean": 0.8, "val/entropy": 0.1, "val/label_free/information": 0.3}
    assert [score(record, m) for m in ("oracle", "source_dice", "source_dice_less_entropy", "information")] == [
        0.5,
        0.8,
        pytest.approx(0.7),
        0.3,
    ]
    assert math.isnan(score(record, "nuclear_norm"))
    records = [{DICE: d, "val/source/dice/mean": s} for d, s in ((0.5, 0.9), (0.7, 0.6), (0.6, 0.7))]
    found = agreement(records, "source_dice")
    assert found is not None
    assert (found.correlation, found.regret, found.trials) == (pytest.approx(-1), pytest.approx(0.2), 3)
    assert agreement(records[:1], "source_dice") is None


def some_trials(draw: Callable[[], float]) -> list[Trial]:
    space = load_space("phantom")
    trials = []
    for number in range(1, 7):
        settings = dict.fromkeys(space.keys, 0.1 + 0.05 * number)
        state = "failed" if number == 6 else "finished" if number % 2 else "stopped"
        length = 120 if state == "finished" else 36
        reports = {}
        for iteration in range(12, length + 1, 12):
            values = {name: draw() for name in ("information", "nuclear_norm")}
            reports[iteration] = {f"val/label_free/{name}": value for name, value in values.items()}
            reports[iteration] |= {DICE: 0.6 + 0.01 * number, "val/source/dice/mean": draw(), "val/entropy": draw()}
        trials.append(Trial(number, settings, reports, state, "a loss | was NaN" if number == 6 else ""))  # type: ignore[arg-type]
    return trials


def test_the_best_trial_is_one_that_was_trained_in_full(tmp_path: Path) -> None:
    trials = some_trials(np.random.default_rng(1).random)
    best = best_trial(trials, "oracle")
    assert best is not None
    assert best.number == 5
    assert best_trial([trial for trial in trials if trial.state != "finished"], "oracle") is trials[3]
    assert best_trial([trials[5], Trial(7, {})], "oracle") is None
    space = load_space("phantom")
    file = tmp_path / "best.yaml"
    file.write_text(preset_text(space, best, "oracle"))
    assert "an oracle" in file.read_text()
    config = load_config(str(file))
    assert config.run.name == "tune-phantom-best"
    assert config.method == space.config(best.settings).method
    assert (config.data, config.phases) == (space.base.data, space.base.phases)


def test_the_saving_counts_iterations() -> None:
    found = saving(some_trials(lambda: 0.0), 120, 0, 400)
    assert (found.done, found.in_full) == (3 * 120 + 3 * 36, 5 * 120 + 36)
    assert "468 iterations of 636" in found.sentence()
    assert "in all 868 of 3036 (29 %)" in found.sentence()


def test_tables_have_a_row_per_trial_and_mark_the_oracle() -> None:
    trials, keys = some_trials(lambda: 0.5), load_space("phantom").keys
    rows = list(csv.DictReader(io.StringIO(trials_csv(trials, keys))))
    assert [row["state"] for row in rows] == [trial.state for trial in trials]
    assert float(rows[0]["method.gamma"]) == trials[0].settings["method.gamma"]
    assert float(rows[4]["oracle"]) == 0.65
    markdown = trials_markdown(trials, keys, "oracle").splitlines()
    assert "oracle (oracle: target Dice)" in markdown[0]
    assert [line.split(" | ")[0] for line in markdown[2:5]] == ["| 5", "| 3", "| 1"], "best first, stopped ones after"
    assert all(line.count(" | ") == markdown[0].count(" | ") for line in markdown[2:])


def test_criteria_are_compared_over_trials_in_full() -> None:
    found = agreements(some_trials(np.random.default_rng(1).random))
    assert set(found) == {"source_dice", "source_dice_less_entropy", "information", "nuclear_norm"}
    assert all(value.trials == 3 for value in found.values())
    assert set(found) <= set(CRITERIA)


def test_pictures_are_drawn_whatever_there_is(tmp_path: Path) -> None:
    space = load_space("phantom").distributions
    mixed = load_space("discriminator", ["data.source=s", "data.target=t"]).distributions
    full, one = (
        some_trials(np.random.default_rng(1).random),
        Trial(1, {"method.discriminator": "fc", "method.lambda_main": 0.003}),
    )
    one.reports[10] = {DICE: 0.5}
    for name, trials, entries in (("full", full, space), ("one", [one], mixed), ("none", [], mixed)):
        for kind in ("curves", "parallel", "effects"):
            path = tmp_path / f"{name}-{kind}.png"
            if kind == "curves":
                figures.curves(trials, "oracle", [12, 36], 5, path)
            else:
                draw = figures.parallel_coordinates if kind == "parallel" else figures.effects
                draw(trials, entries, "oracle", path)
            assert imread(path).std() > 0.01


def test_optuna_learns_from_trials_and_goes_on_from_known_ones(tmp_path: Path) -> None:
    space = load_space("phantom", ["search.method=optuna", "search.trials=40"])
    found = draws(space, {}, {})
    trials: dict[int, Trial] = {}
    values: dict[int, float | None] = {}
    for number in range(1, 31):
        trials[number] = Trial(number, found.settings(number), state="finished")
        values[number] = -((trials[number].settings["method.margin_source"] - 0.5) ** 2)
        found.ended(trials[number], values[number])
    assert trials[1].settings == space.default()
    late = [abs(trials[number].settings["method.margin_source"] - 0.5) for number in range(21, 31)]
    assert np.mean(late) < 0.12
    again = draws(space, trials, values)
    more = [abs(again.settings(number)["method.margin_source"] - 0.5) for number in range(31, 36)]
    assert np.mean(more) < 0.15


def test_optuna_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install .mpscl_ray\[optuna\]"):
        draws(load_space("phantom", ["search.method=optuna"]), {}, {})


def test_best_yaml_is_plain_yaml() -> None:
    best = best_trial(some_trials(lambda: 0.5), "oracle")
    assert best is not None
    assert yaml.safe_load(preset_text(load_space("phantom"), best, "information"))["method"]["name"] == "mpscl"
