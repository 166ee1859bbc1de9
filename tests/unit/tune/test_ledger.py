"""The ledger of a search, early stopping by its reports, and the results of a search."""

from __future__ import annotations

import csv
import io
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from mpscl_ray.config import load_config
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.tune import figures
from mpscl_ray.tune.agreement import agreement, agreements, rank_correlation
from mpscl_ray.tune.asha import PausingASHA
from mpscl_ray.tune.criteria import CRITERIA, score
from mpscl_ray.tune.ledger import Ledger, Trial
from mpscl_ray.tune.results import best_trial, preset_text, saving, trials_csv, trials_markdown
from mpscl_ray.tune.samplers import make_sampler
from mpscl_ray.tune.schedulers import make_scheduler
from mpscl_ray.tune.settings import SearchConfig
from mpscl_ray.tune.space import load_space

DICE = "val/dice/mean"


def test_a_ledger_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.add(1, {"method.alpha": 0.1})
    ledger.add(2, {"method.alpha": 0.2})
    assert ledger.report(1, 10, {DICE: 0.5})
    assert ledger.report(2, 10, {DICE: math.nan})
    assert not ledger.report(1, 10, {DICE: 0.7}), "the first report of an iteration is the one that counts"
    ledger.report(1, 20, {DICE: 0.6}, 7.89)
    assert Ledger(ledger.file).trials[1].seconds == 7.9
    ledger.end(1, "stopped", "fell behind", 12.34)
    read = Ledger(tmp_path / "ledger.jsonl")
    assert read.order == ledger.order == [(1, 10), (2, 10), (1, 20)]
    assert read.trials[1] == ledger.trials[1]
    assert (read.trials[1].iteration, read.trials[1].last, read.trials[1].state) == (20, {DICE: 0.6}, "stopped")
    assert math.isnan(read.trials[2].last[DICE])
    assert not read.trials[2].ended
    with pytest.raises(AssertionError, match="ended twice"):
        read.end(1, "finished")


def test_a_record_is_on_the_disk_before_anything_is_decided_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(f"{os.fstat(descriptor).st_size} bytes synced"))
    file = tmp_path / "ledger.jsonl"
    ledger = Ledger(file, lambda: events.append(f"flushed with {len(ledger.trials)} known"))
    ledger.add(1, {})
    assert events == [f"{file.stat().st_size} bytes synced", "flushed with 0 known"]


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


def test_the_best_third_of_those_on_a_rung_is_promoted_once_it_is_there() -> None:
    halving = PausingASHA([10, 30], 3, total=9)
    assert [halving.report(n, 10, score) for n, score in ((1, 0.5), (2, 0.6), (3, math.nan))] == [True] * 3
    assert halving.promote({1, 3}) is None, "2 is the best of three, and does not wait here"
    assert halving.promote({1, 2, 3}) == 2
    assert halving.promote({1, 2, 3}) is None
    assert not halving.report(4, 10, 0.7), "the best of four does not wait"
    assert not halving.report(4, 20, 0.0), "between rungs nothing is decided"
    assert [halving.report(n, 10, 0.5) for n in (5, 6)] == [True] * 2
    assert halving.promote({1, 3, 5, 6}) is None, "the best two of six, 4 and 2, are promoted already"
    assert [halving.waits_at(n) for n in range(1, 7)] == [10, None, 10, None, 10, 10]
    assert [halving.cannot_be_promoted(n) for n in (1, 5, 6, 3)] == [False, False, False, True], (
        "three of nine can be promoted: 4, 2, and those that equal 1"
    )
    assert halving.report(2, 33, 0.1)
    assert halving.report(4, 30, 0.1)
    assert halving.waits_at(2) == 33, "the first report after a rung counts there"
    assert halving.promote({2, 4}) is None
    assert halving.promote({1, 2, 4}, force=True) == 2, "the best of the highest rung; of equal ones the first"
    assert PausingASHA([], 3, 9).report(1, 10, 0.5) is False


def test_trials_with_equal_scores_continue_together() -> None:
    halving = PausingASHA([10], 4, total=5)
    assert [halving.report(number, 10, 0.0) for number in (5, 1, 2)] == [True] * 3, "of three, a quarter is none"
    assert not halving.report(4, 10, 0.0)
    assert not any(halving.cannot_be_promoted(number) for number in (1, 2, 4, 5))
    assert [halving.promote({1, 2, 5}) for _ in range(4)] == [1, 2, 5, None]
    assert not halving.report(3, 10, 0.1), "the best of five"
    assert halving.report(6, 10, 0.0)
    assert halving.promote({6}) is None


def search_settings(**values: Any) -> SearchConfig:
    return SearchConfig(grace_period=10, reduction_factor=2, **values)


def test_asha_of_ray_tune_stops_what_is_below_the_median_keeps_equals_and_decides_the_same_again() -> None:
    reports = [(1, 10, 0.5), (2, 10, 0.5), (3, 10, 0.4), (4, 10, 0.9), (1, 20, 0.6), (5, 10, math.nan), (4, 20, 0.5)]
    first, compared_at = make_scheduler(search_settings(), 40, 5)
    assert compared_at == [10, 20]
    assert [first.report(*report) for report in reports] == [False, False, True, False, False, True, True]
    assert [first.waits_at(number) for number in range(1, 6)] == [None, None, 10, 20, 10]
    assert [first.cannot_be_promoted(number) for number in range(1, 6)] == [False, False, True, True, True]
    assert first.promote({3, 4, 5}, force=True) is None, "what is stopped stays so"
    again, _ = make_scheduler(search_settings(), 40, 5)
    assert [again.report(*report) for report in reports] == [False, False, True, False, False, True, True]


def test_the_scheduler_is_chosen_by_name() -> None:
    assert isinstance(make_scheduler(search_settings(scheduler="pausing_asha"), 40, 5)[0], PausingASHA)
    fifo, compared_at = make_scheduler(search_settings(scheduler="fifo"), 40, 5)
    assert compared_at == []
    assert [fifo.report(number, 10, score) for number, score in ((1, 0.5), (2, 0.1), (3, 0.6))] == [False] * 3
    assert make_scheduler(search_settings(), 10, 5)[1] == [], "no rung lies before the end"


def test_a_score_of_nan_is_the_lowest_whenever_it_comes() -> None:
    halving = PausingASHA([10], 2, total=4)
    assert halving.report(1, 10, math.nan)
    assert not halving.report(2, 10, 0.5), "the best of two"
    assert halving.report(3, 10, math.nan)
    assert not halving.report(4, 10, 0.1), "the second of four"
    assert [halving.cannot_be_promoted(number) for number in (1, 3)] == [True, True]


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1)), max_size=60), st.integers(2, 4), st.integers(1, 15))
def test_promotions_follow_from_the_reports_alone(reports: list[tuple[int, float]], reduction: int, step: int) -> None:
    live, again = PausingASHA([10, 30], reduction, 9), PausingASHA([10, 30], reduction, 9)
    done, waiting, resumed = dict.fromkeys(range(1, 10), 0), set[int](), set[int]()
    for number, value in reports:
        if number in waiting:
            number = live.promote(waiting) or 0
            waiting.discard(number)
            resumed.add(number)
        if number == 0:
            continue
        done[number] += step
        waits = live.report(number, done[number], value)
        assert again.report(number, done[number], value) == waits, "a promotion decides nothing for other trials"
        resumed.discard(number)
        waiting |= {number} if waits else set()
    for number in done:
        assert (live.waits_at(number) is not None) == (number in waiting)
        if number not in resumed:  # a trial that has not reported since it resumed is found on its rung
            assert again.waits_at(number) == live.waits_at(number)


def test_rank_correlation_by_hand() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # Ranks 1 2 3 4 against 2 1 4 3: 1 - 6 * 4 / (4 * 15).
    assert rank_correlation([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)
    assert rank_correlation([1, 1, 2], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)
    assert math.isnan(rank_correlation([1, 1], [1, 2]))


def test_scores_and_agreement_of_a_criterion() -> None:
    record = {DICE: 0.5, "val/source/dice/mean": 0.8, "val/entropy": 0.1, "val/unsupervised/information": 0.3}
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
            reports[iteration] = {f"val/unsupervised/{name}": value for name, value in values.items()}
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
    assert "an oracle" in file.read_text(encoding="utf-8")
    config = load_config(str(file))
    assert config.run.name == "tune-phantom-best"
    assert config.method == space.config(best.settings).method
    assert (config.data, config.phases) == (space.base.data, space.base.phases)


def test_the_saving_counts_iterations() -> None:
    trials = {trial.number: trial for trial in some_trials(lambda: 0.0)}
    shared = [("source_only", 300), ("warm_up", 100)]
    resolved = SimpleNamespace(schedule=[*shared, ("adaptation", 120)])
    ledger = SimpleNamespace(trials=trials)
    found = saving(SimpleNamespace(ledger=ledger, shared_phases=shared, resolved=resolved, iterations=120))  # type: ignore[arg-type]
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


def test_figures_are_drawn_from_many_trials_one_and_none(tmp_path: Path) -> None:
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


def test_optuna_learns_from_trials_and_from_those_of_the_ledger(tmp_path: Path) -> None:
    space = load_space("phantom", ["search.method=optuna", "search.num_samples=40"])
    found = make_sampler(space, {}, {})
    trials: dict[int, Trial] = {}
    values: dict[int, float | None] = {}
    for number in range(1, 31):
        trials[number] = Trial(number, found.settings(number), state="finished")
        values[number] = -((trials[number].settings["method.margin_source"] - 0.5) ** 2)
        found.ended(trials[number], values[number])
    assert trials[1].settings == space.default()
    late = [abs(trials[number].settings["method.margin_source"] - 0.5) for number in range(21, 31)]
    assert np.mean(late) < 0.12
    again = make_sampler(space, trials, values)
    more = [abs(again.settings(number)["method.margin_source"] - 0.5) for number in range(31, 36)]
    assert np.mean(more) < 0.15


def test_a_missing_optuna_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install .mpscl_ray\[optuna\]"):
        make_sampler(load_space("phantom", ["search.method=optuna"]), {}, {})


def test_best_yaml_is_plain_yaml() -> None:
    best = best_trial(some_trials(lambda: 0.5), "oracle")
    assert best is not None
    assert yaml.safe_load(preset_text(load_space("phantom"), best, "information"))["method"]["name"] == "mpscl"
