"""Comparisons over folds: their cells, their table, and which datasets go together."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from pathlib import Path

import pytest

from mpscl_ray.compare import command as compare
from mpscl_ray.compare.cells import Plan, make_cells
from mpscl_ray.compare.folds import check_folds, pairs_of
from mpscl_ray.compare.table import CellResult, comparison_csv, format_comparison, rows_of
from mpscl_ray.data.dataset import load_manifest
from mpscl_ray.errors import ConfigError
from tests.tiny import make_dataset, make_folds
from tests.unit.compare.test_compare import WHOLE, direction, result


def test_cells_of_folds_have_their_own_data_and_share_phases_within_a_fold_alone() -> None:
    names = {"forward": ("mr", "ct")}
    pairs: dict[int | None, tuple[str, str]] = {k: (f"data/mr/fold{k}", f"data/ct/fold{k}") for k in range(2)}
    plan = Plan(("baseline", "mpscl"), (1, 2), ("forward",), {"forward": "phantom"}, (), folds=True)
    cells = {cell.name: cell for cell in make_cells(plan, names, pairs, "cells")}
    assert list(cells) == [
        f"mr2ct-fold{fold}-seed{seed}-{system}"
        for fold in (0, 1)
        for seed in (1, 2)
        for system in ("baseline", "mpscl")
    ]
    for cell in cells.values():
        assert (cell.config.data.source, cell.config.data.target) == pairs[cell.fold]
        assert cell.config.run.seed == cell.seed
        shared = f"mr2ct-fold{cell.fold}-seed{cell.seed}-baseline"
        assert cell.parent == (shared if cell.system == "mpscl" else None)


def in_folds(*scores: tuple[int, int, float]) -> list[CellResult]:
    return [dataclasses.replace(result(seed, dice), fold=fold) for fold, seed, dice in scores]


FOLDED = dataclasses.replace(
    direction(
        source_only=in_folds((0, 1, 0.2), (0, 2, 0.4), (1, 1, 0.4), (1, 2, 0.6), (2, 1, 0.1), (2, 2, 0.3)),
        baseline=in_folds((0, 1, 0.5), (1, 1, 0.7), (1, 2, 0.9)),
        supervised=in_folds(*((fold, seed, 1.0) for fold in range(3) for seed in (1, 2))),
    ),
    folds=(0, 1, 2),
    runs=6,
    published={},
)


def test_numbers_over_folds_by_hand() -> None:
    rows = {row.system: row for row in rows_of(FOLDED)}
    whole = rows["source_only"].dice["mean"]
    assert whole.mean == pytest.approx((30 + 50 + 20) / 3)
    assert whole.sd == pytest.approx(math.sqrt(((10 / 3) ** 2 + (50 / 3) ** 2 + (40 / 3) ** 2) / 2)), "over 3 folds"
    assert (rows["source_only"].folds, rows["source_only"].runs) == (3, 6)
    part = rows["baseline"]
    assert part.dice["mean"].mean == pytest.approx((50 + 80) / 2), "of the folds, whatever their seeds"
    assert (part.folds, part.runs) == (2, 3)
    lower = (20 + (40 + 60) / 2) / 2  # of the same runs
    assert part.gap == pytest.approx(100 * (65 - lower) / (100 - lower))
    one = {row.system: row for row in rows_of(FOLDED.of_fold(1))}["source_only"]
    assert (one.dice["mean"].mean, one.dice["mean"].sd) == pytest.approx((50.0, math.sqrt(200))), "over two seeds"


def test_every_form_of_the_table_has_the_folds() -> None:
    entries = list(csv.DictReader(io.StringIO(comparison_csv([FOLDED]))))
    own = [row for row in entries if (row["system"], row["structure"]) == ("source_only", "mean")]
    assert [(row["fold"], row["folds"], row["seeds"], row["seeds_planned"]) for row in own] == [
        ("", "3", "6", "6"),
        *((str(fold), "", "2", "2") for fold in range(3)),
    ]
    assert [float(row["dice_percent_mean"]) for row in own] == pytest.approx([100 / 3, 30, 50, 20])
    text, markdown = (format_comparison([FOLDED], style) for style in ("text", "markdown"))
    for table in (text, markdown):
        assert "over 3 folds (n = 3) of the mean over 2 seeds of the mean over volumes" in table
        assert "(3 of 6 runs)" in table
        assert "The training volumes of two folds are partly the same" in table
    (line,) = (line for line in markdown.splitlines() if line.startswith("| W/o adaptation | 30.0 |"))
    assert line.split("|")[2:5] == [" 30.0 ", " 50.0 ", " 20.0 "]
    assert "fold" not in format_comparison([WHOLE], "text")


def test_folds_and_plain_datasets_are_told_apart(tmp_path: Path) -> None:
    for modality in ("mr", "ct"):
        make_folds(tmp_path / modality, modality, folds=2, seed=int(modality == "ct"))
    make_folds(tmp_path / "three", "ct", folds=3)
    make_dataset(tmp_path / "plain", "ct")
    mr, ct, three, plain = (str(tmp_path / name) for name in ("mr", "ct", "three", "plain"))
    pairs = pairs_of(mr, ct, folds=True)
    assert pairs == {k: (f"{mr}/fold{k}", f"{ct}/fold{k}") for k in (0, 1)}
    assert pairs_of(plain, f"{mr}/fold0", folds=False) == {None: (plain, f"{mr}/fold0")}
    manifests = {fold: [load_manifest(dataset) for dataset in pair] for fold, pair in pairs.items()}
    (warning,) = check_folds(pairs, manifests)
    assert warning.startswith("the folds of source and target were drawn with other seeds, 0 and 1: ")
    for source, target, folds, message in (
        (mr, ct, False, "mr holds 2 folds: give --folds to compare over them, or one of them, e.g. .*mr/fold0"),
        (mr, plain, True, "plain has no folds to compare over with --folds; prepare it with --folds K, or leave"),
        (f"{mr}/fold0", ct, True, "fold0 has no folds to compare over with --folds; give .*mr, which holds some"),
        (mr, three, True, r"mr holds 2 folds \(0 to 1\), and .*three holds 3 folds \(0 to 2\): .* the same --folds"),
    ):
        words = ["--data", source, target, "--out", str(tmp_path / "out"), *(["--folds"] if folds else [])]
        with pytest.raises(ConfigError, match=message):
            compare.main(words)
    with pytest.raises(ConfigError, match="phantom:ct has no folds"):
        compare.main(["--folds", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    (tmp_path / "three" / "fold2" / "manifest.json").unlink()
    pairs = pairs_of(mr, three, folds=True)
    with pytest.raises(ConfigError, match="three/fold0 is fold 0 of 3, and 2 folds are there"):
        check_folds(pairs, {fold: [load_manifest(dataset) for dataset in pair] for fold, pair in pairs.items()})
