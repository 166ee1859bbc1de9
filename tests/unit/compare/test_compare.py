"""The comparison without training: cells and what they share, the ledger, the table, and what is refused."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from mpscl_ray.compare import command as compare
from mpscl_ray.compare import run as compare_run
from mpscl_ray.compare.cells import Cell, CellLedger, Entry, Plan, check_presets, make_cells, system_config
from mpscl_ray.compare.comparison_page import comparison_page
from mpscl_ray.compare.published import PUBLISHED, STRUCTURES, published_for
from mpscl_ray.compare.runner import Comparison, total_seconds
from mpscl_ray.compare.table import (
    CellResult,
    Direction,
    best,
    comparison_csv,
    format_comparison,
    gap_closed,
    over_seeds,
    rows_of,
)
from mpscl_ray.compare.trainable import OUTCOME
from mpscl_ray.config import to_dict
from mpscl_ray.config.systems import SYSTEMS, shared_phase
from mpscl_ray.config.titles import system_of
from mpscl_ray.data.dataset import load_manifest
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train.ray.room import Room
from tests.tiny import make_dataset, make_pair

ADAPTS = ["baseline", "cscl", "mpscl"]


def cells_of(systems: list[str], seeds: tuple[int, ...] = (1,), overrides: tuple[str, ...] = ()) -> dict[str, Cell]:
    names = {"forward": ("ct", "mr"), "backward": ("mr", "ct")}
    plan = Plan(tuple(systems), seeds, tuple(names), dict.fromkeys(names, "phantom"), overrides)
    cells = make_cells(plan, names, {None: ("data/ct", "data/mr")}, "cells")
    return {cell.name: cell for cell in cells}


def test_the_page_of_a_comparison_has_its_runs_and_the_table(tmp_path: Path) -> None:
    cells = list(cells_of(["source_only", "mpscl", "supervised"]).values())[:3]
    ledger = CellLedger(tmp_path / "cells.json")
    summary = {"structures": {"mean": {"dice": {"mean": 0.754}}}}
    ledger[cells[0].name].state, ledger[cells[0].name].summary = "finished", summary
    ledger[cells[1].name].state = "running"
    ledger[cells[2].name].state, ledger[cells[2].name].reason = "failed", "no <room>"
    page = comparison_page(
        RunDirectory(tmp_path), cells, ledger, lambda: {cells[1].name: 40}, lambda: "Dice %  mean\n<table>"
    )
    page.update()
    text = (tmp_path / "progress.html").read_text(encoding="utf-8")
    assert "1 of 3 runs are finished, 1 running." in text
    assert f'<a href="cells/{cells[0].name}/progress.html">{cells[0].name}</a>' in text
    assert "<td>75.4</td>" in text
    assert f"<td>40 of {cells[1].own_iterations}</td>" in text
    assert "no &lt;room&gt;" in text
    assert "<pre>Dice %  mean\n&lt;table&gt;</pre>" in text


def test_a_comparison_that_was_killed_knows_how_long_its_cells_had_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (cell,) = list(cells_of(["source_only"]).values())[:1]

    def start() -> Comparison:
        ledger = CellLedger(tmp_path / "cells.json")
        room = Room(cell.config, use_gpu=False)
        return Comparison([cell], ledger, RunDirectory(tmp_path), room, lambda: None, lambda: "")

    lost = start()
    trial = lost.next()
    assert isinstance(trial, dict)
    lost.started(trial)
    lost.reported(trial, {"seconds": 30})
    lost.lost(trial, "it died")
    lost.reported(trial, {"seconds": 30})
    lost.reported(trial, {"seconds": 60})

    resumed = start()
    trial = resumed.next()
    assert isinstance(trial, dict)
    resumed.started(trial)
    resumed.reported(trial, {"seconds": 30})
    outcome = {"state": "interrupted", "seconds": 45, "phase_seconds": {"source_only": 12}}
    resumed.reported(trial, {OUTCOME: json.dumps(outcome).encode()})
    entry = CellLedger(tmp_path / "cells.json")[cell.name]
    assert (entry.seconds, entry.unfinished_seconds) == (30 + 60 + 45, 0)
    assert entry.phase_seconds == {"source_only": 30 + 60 + 12}


# --------------------------------------------------------------------------------------------------------- cells


def test_cells_are_all_combinations_with_their_own_data_and_seed() -> None:
    cells = cells_of(["source_only", "mpscl"], (1, 4))
    assert list(cells) == [
        f"{direction}-seed{seed}-{system}"
        for direction in ("ct2mr", "mr2ct")
        for seed in (1, 4)
        for system in ("source_only", "mpscl")
    ]
    config = cells["mr2ct-seed4-mpscl"].config
    assert (config.data.source, config.data.target) == ("data/mr", "data/ct")
    assert (config.run.seed, config.run.name, config.run.storage) == (4, "mr2ct-seed4-mpscl", "cells")


def test_cells_share_what_they_train_alike_and_nothing_across_seeds_and_directions() -> None:
    cells = cells_of(["source_only", *ADAPTS, "supervised"], (1, 2))
    for prefix in ("ct2mr-seed1", "ct2mr-seed2", "mr2ct-seed1", "mr2ct-seed2"):
        for system in ("source_only", "baseline", "supervised"):
            assert cells[f"{prefix}-{system}"].parent is None, "the first of its kind, or of another length"
        for system in ("cscl", "mpscl"):
            cell = cells[f"{prefix}-{system}"]
            assert (cell.parent, cell.fork_phase) == (f"{prefix}-baseline", "warm_up")
            assert (cell.iterations, cell.own_iterations) == (650, 250)
    everything = cells_of(list(SYSTEMS))
    assert everything["ct2mr-seed1-adabn"].parent == "ct2mr-seed1-source_only"
    for cell in everything.values():
        if cell.parent is not None:
            parent = everything[cell.parent]
            assert (parent.direction, parent.seed) == (cell.direction, cell.seed)
            assert shared_phase(parent.config, cell.config) == cell.fork_phase
    assert everything["ct2mr-seed1-mpscl"].fork_phase == "warm_up"
    assert everything["ct2mr-seed1-cag"].fork_phase == "source_only", "of the first system that trains this phase"
    assert everything["ct2mr-seed1-clan"].fork_phase == "source_only"
    assert everything["ct2mr-seed1-sifa_v2"].parent is None


def test_budgets_are_equal() -> None:
    """AdaBN trains no weights in its 50 batches of statistics."""
    iterations = {cell.system: cell.iterations for cell in cells_of(list(SYSTEMS)).values()}
    assert iterations.pop("adabn") == 650 + 50
    assert set(iterations.values()) == {650}


def test_every_system_of_the_table_is_recognised_by_its_settings() -> None:
    for cell in cells_of(list(SYSTEMS)).values():
        assert system_of(to_dict(cell.config)) == cell.system


@pytest.mark.parametrize(
    ("override", "shared"),
    [
        ("method.margin_source=0.1", "warm_up"),
        ("method.beta=0", "warm_up"),
        ("phases.adaptation=999", "warm_up"),
        ("scaling.num_workers=1", "warm_up"),
        ("phases.warm_up=99", "source_only"),
        ("method.lambda_main=0.5", None),
        ("optim.lr=1", "source_only"),
        ("run.seed=2", None),
        ("phases.source_only_lr=1", None),
        ("phases.source_only=1", None),
    ],
)
def test_a_phase_is_shared_only_where_all_that_decides_it_is_equal(override: str, shared: str | None) -> None:
    one, other = system_config("phantom", "mpscl", []), system_config("phantom", "mpscl", [override])
    # A setting of the discriminators does not matter to the source-only phase, but may be taken to.
    found = shared_phase(one, other)
    assert found == shared or (override.startswith("method.lambda") and found == "source_only")


def test_a_group_of_presets_may_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "mpscl.yaml").write_text("preset: small/mpscl\nphases: {adaptation: 7}\n")
    assert system_config(str(tmp_path), "mpscl", []).phases.adaptation == 7
    with pytest.raises(ConfigError, match="have no system cscl, only mpscl"):
        system_config(str(tmp_path), "cscl", [])
    with pytest.raises(ConfigError, match=r"no group of presets 'nowhere'; give one of ct2mr, mr2ct"):
        system_config("nowhere", "cscl", [])
    with pytest.raises(ConfigError, match=r"^there is no group of presets 'smal'; did you mean 'small'\?$"):
        system_config("smal", "cscl", [])


# -------------------------------------------------------------------------------------------------------- ledger


def test_the_ledger_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    ledger = CellLedger(tmp_path / "cells.json")
    ledger["a"].state = "finished"
    ledger["a"].summary = {"structures": {}}
    ledger["b"].reason = "it broke"
    ledger.write()
    again = CellLedger(tmp_path / "cells.json")
    assert again.entries == ledger.entries
    assert again["c"] == Entry()
    (tmp_path / "cells.json").write_text('{"cells": {"a": {"state": 1, "colour": "red"}}}')
    with pytest.raises(DataError, match=r"cells\.json is damaged"):
        CellLedger(tmp_path / "cells.json")


def test_wall_time_counts_shared_phases_for_each_that_uses_them(tmp_path: Path) -> None:
    """grandchild <- child (forked after source_only of parent) <- parent."""
    ledger = CellLedger(tmp_path / "cells.json")
    ledger.entries = {
        "p": Entry(seconds=100, phase_seconds={"source_only": 30, "warm_up": 45, "adaptation": 95}),
        "c": Entry(seconds=70, phase_seconds={"warm_up": 20, "adaptation": 65}, forked=["p", "source_only"]),
        "g": Entry(seconds=50, phase_seconds={"adaptation": 44}, forked=["c", "warm_up"]),
        "h": Entry(seconds=80, phase_seconds={"warm_up": 9}, forked=["c", "source_only"]),
    }
    found = {name: total_seconds(name, ledger) for name in "pcgh"}
    assert found == {"p": 100, "c": 70 + 30, "g": 50 + 20 + 30, "h": 80 + 30}


# --------------------------------------------------------------------------------------------------------- table


def result(seed: int, dice: float, asd: float = 5.0, missed: int = 0) -> CellResult:
    values = dict.fromkeys([*STRUCTURES, "mean"], dice)
    return CellResult(seed, values, dict.fromkeys(values, asd), missed, 650, 120.0)


def direction(**results: list[CellResult]) -> Direction:
    return Direction(
        title="CT to MR",
        data="Scored on 4 volumes.",
        structures=("MYO", "LAC", "LVC", "AA"),
        rows=SYSTEMS,
        results=results,
        runs=3,
        unit="mm",
        published=published_for("ct", "mr", STRUCTURES),
    )


WHOLE = direction(
    source_only=[result(seed, dice) for seed, dice in ((1, 0.2), (2, 0.3), (3, 0.4))],
    baseline=[result(seed, 0.6, asd=4.0) for seed in (1, 2, 3)],
    mpscl=[result(1, 0.7, asd=math.nan, missed=4), result(2, 0.7)],
    supervised=[result(seed, 0.8, asd=1.0) for seed in (1, 2, 3)],
)


def test_rows_by_hand() -> None:
    rows = {row.system: row for row in rows_of(WHOLE)}
    lower = rows["source_only"].dice["mean"]
    assert (lower.mean, lower.sd) == pytest.approx((30.0, 10.0))
    assert rows["baseline"].gap == pytest.approx(60.0)
    assert (rows["source_only"].gap, rows["supervised"].gap) == pytest.approx((0.0, 100.0))
    assert (rows["mpscl"].runs, rows["mpscl"].missed) == (2, 4)
    assert rows["mpscl"].gap == pytest.approx(100 * 0.45 / 0.55), "between the bounds of its two seeds, not of three"
    (alone,) = (row for row in rows_of(direction(baseline=[result(1, 0.7)])) if row.system == "baseline")
    assert math.isnan(alone.gap)
    assert math.isnan(rows["mpscl"].asd["mean"].mean), "a seed without ASD must not make the method better"
    assert rows["baseline"].minutes == pytest.approx(2.0)
    assert (rows["cscl"].runs, rows["cscl"].iterations) == (0, None)


def test_the_best_is_bold_but_not_the_upper_bound() -> None:
    rows = rows_of(WHOLE)
    assert best(rows, "dice", "AA") == {"mpscl"}
    assert best(rows, "asd", "AA") == {"baseline"}
    tie = rows_of(direction(baseline=[result(1, 0.70001)], mpscl=[result(1, 0.70002)]))
    assert best(tie, "dice", "mean") == {"baseline", "mpscl"}, "equal as printed"
    assert best(rows_of(direction()), "dice", "mean") == frozenset()


def test_numbers_over_seeds() -> None:
    assert math.isnan(over_seeds([0.5]).sd)
    assert math.isnan(over_seeds([]).mean)
    assert math.isnan(over_seeds([0.5, math.nan]).mean)
    assert math.isnan(gap_closed(0.5, 0.6, 0.6))


def test_csv_has_every_number_once_and_published_ones_apart() -> None:
    rows = list(csv.DictReader(io.StringIO(comparison_csv([WHOLE]))))
    assert len(rows) == len(SYSTEMS) * 5
    by_key = {(row["system"], row["structure"]): row for row in rows}
    mean = by_key["mpscl", "mean"]
    assert (mean["dice_percent_mean"], mean["published_mmwhs_dice_percent"]) == ("70.0", "69.87")
    assert (mean["asd_mm_mean"], mean["seeds"], mean["seeds_planned"], mean["missed"]) == ("", "2", "3", "4")
    assert by_key["mpscl", "AA"]["published_mmwhs_dice_percent"] == ""
    assert by_key["cscl", "mean"]["dice_percent_mean"] == ""


@pytest.mark.parametrize(
    ("style", "bold", "row"),
    [
        ("text", "*70.0 ± 0.0*", "MPSCL (2 of 3 seeds)"),
        ("markdown", "**70.0 ± 0.0**", "| MPSCL (2 of 3 seeds) |"),
        ("latex", r"\textbf{70.0 $\pm$ 0.0}", "MPSCL (2 of 3 seeds) &"),
    ],
)
def test_styles(style: Any, bold: str, row: str) -> None:
    text = format_comparison([WHOLE], style)
    assert bold in text
    assert row in text
    assert "published, MM-WHS" in text
    assert "other people's measurements on other data" in text
    if style == "latex":
        body = text[text.index(r"\midrule") : text.index(r"\bottomrule")].strip().splitlines()[1:]
        assert len({line.count("&") for line in body}) == 1
        spec = text.split(r"\begin{tabular}{")[1].partition("}")[0]
        assert body[0].count("&") == len(spec) - 1
        assert "%" not in text.split("\n\n", 1)[1].replace(r"\%", "")
    if style == "markdown":
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) == 1


def test_published_numbers_stand_only_beside_the_papers_structures_and_modalities() -> None:
    assert published_for("mr", "ct", STRUCTURES)["mpscl"].dice == 84.08
    assert published_for("mr", "ct", frozenset({"LV", "MYO", "RV"})) == {}
    assert published_for("bssfp", "lge", STRUCTURES) == {}
    text = format_comparison([dataclasses.replace(WHOLE, published={})], "markdown")
    assert "published" not in text
    assert all(numbers.dice or numbers.asd for table in PUBLISHED.values() for numbers in table.values())


# ------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mpscl", "nothing"], "no system nothing; the systems are source_only"),
        (["mpscl", "cslc"], r"no system cslc; did you mean 'cscl'\?$"),
        (["run.seed=3"], "run.seed is not a setting of a comparison"),
        (["method.name=segmentation"], "method.name is not"),
        (["--seeds", "0"], "--seeds is '0'"),
        (["--seeds", "1,1"], "--seeds is '1,1'"),
        (["--seeds", "many"], "expected a number of seeds"),
        (["--max-concurrent", "0"], "--max-concurrent is 0"),
        (["--presets", "a,b,c"], "expected one group"),
        (["optim.lrate=1"], "is not a setting"),
        (["--presets", "small"], "give the folders of two prepared datasets with --data"),
    ],
)
def test_wrong_command_lines_are_one_sentence(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        compare.main([*arguments, "--out", str(tmp_path / "out")])


def test_presets_of_all_systems_and_directions_are_checked_before_ray_starts(tmp_path: Path) -> None:
    groups = [tmp_path / "forward", tmp_path / "backward"]
    for group in groups:
        group.mkdir()
        for system in ("baseline", "cscl"):
            (group / f"{system}.yaml").write_text(f"preset: small/{system}\n")
    words = ["baseline", "cscl", "--presets", ",".join(map(str, groups)), "data.source=nowhere", "data.target=nowhere"]
    by_direction = {"forward": str(groups[0]), "backward": str(groups[1])}
    plan = Plan(("baseline", "cscl"), (1,), ("forward", "backward"), by_direction, ("data.source=nowhere",))
    assert check_presets(plan).data.source == "nowhere"
    (groups[1] / "cscl.yaml").write_text("preset: small/cscl\noptim: {lrate: 1}\n")
    with pytest.raises(ConfigError, match=r"optim.lrate.* is not a setting"):
        compare.main(words)
    (groups[1] / "cscl.yaml").unlink()
    with pytest.raises(ConfigError, match=r"backward have no system cscl, only baseline"):
        compare.main(words)


@pytest.mark.parametrize(("text", "seeds"), [("3", (1, 2, 3)), ("1,4", (1, 4)), ("7,", (7,))])
def test_seeds(text: str, seeds: tuple[int, ...]) -> None:
    assert compare._seeds(text) == seeds


def test_an_unlabelled_target_is_refused_before_the_training(tmp_path: Path) -> None:
    make_pair(tmp_path)
    make_dataset(tmp_path / "lge", "lge", labelled=())
    datasets = [str(tmp_path / name) for name in ("mr", "lge")]
    manifests = [load_manifest(Path(folder)) for folder in datasets]
    compare_run._check_labels(["backward"], datasets, manifests)
    with pytest.raises(ConfigError, match=r"mr to .*lge \(forward\) cannot be scored.*--directions backward"):
        compare_run._check_labels(["forward"], datasets, manifests)
