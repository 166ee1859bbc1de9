"""The compare command on a real Ray: two real cells, and tables of a stub."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from mpscl_ray.compare import command as compare
from mpscl_ray.errors import ConfigError, TrainingError
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.run_directory import RunDirectory
from tests.stub_fit import fit
from tests.tiny import make_folds, make_pair
from tests.tiny_presets import METHOD, write_presets


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("data"))


def arguments(data: Path, presets: Path, out: Path, *more: str) -> list[str]:
    return ["--data", str(data / "mr"), str(data / "ct"), "--presets", str(presets), "--out", str(out), *more]


def test_two_real_cells_share_their_first_phases_and_are_scored(cluster: None, data: Path, tmp_path: Path) -> None:
    presets, out = write_presets(tmp_path / "presets"), tmp_path / "out"
    words = arguments(data, presets, out, "--seeds", "1", "--directions", "forward", "baseline", "mpscl")
    assert compare.main(words) == 0
    baseline, mpscl = (RunDirectory(out / "cells" / f"mr2ct-seed1-{system}") for system in ("baseline", "mpscl"))
    for file in (checkpoint.TENSORS, checkpoint.STATE):
        assert len({(run.phases / "warm_up" / file).read_bytes() for run in (baseline, mpscl)}) == 1
    assert baseline.read_metrics()[0]["global_step"] == 2
    assert [record["global_step"] for record in mpscl.read_metrics()] == [10, 12], "it trains its own phase alone"
    scores = json.loads(
        (mpscl.results / "adaptation_test_prepared_protocol" / "summary.json").read_text(encoding="utf-8")
    )
    rows = list(csv.DictReader((out / "comparison.csv").open()))
    (row,) = (row for row in rows if (row["system"], row["structure"]) == ("mpscl", "mean"))
    dice = scores["summary"]["structures"]["mean"]["dice"]["mean"]
    assert float(row["dice_percent_mean"]) == pytest.approx(100 * dice)
    page = RunDirectory(out).progress_page.read_text(encoding="utf-8")
    assert "2 of 2 runs are finished" in page
    assert '<a href="cells/mr2ct-seed1-mpscl/progress.html">' in page
    assert "All phases are trained" in mpscl.progress_page.read_text(encoding="utf-8")


def test_a_table_with_shared_phases_that_resumes_and_grows(
    cluster: None, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    presets, out = write_presets(tmp_path / "presets"), tmp_path / "out"
    words = arguments(data, presets, out, "--seeds", "1", "--directions", "forward")
    assert compare.main([*words, *METHOD], fit=fit) == 0

    cells = {path.name: RunDirectory(path) for path in (out / "cells").iterdir()}
    assert cells.keys() == {f"mr2ct-seed1-{system}" for system in METHOD}
    mpscl = cells["mr2ct-seed1-mpscl"]
    assert [record["global_step"] for record in mpscl.read_metrics()] == [10, 12], "it trains its own phase alone"
    rows = list(csv.DictReader((out / "comparison.csv").open()))
    for system, last in (("mpscl", "adaptation"), ("supervised", "supervised"), ("source_only", "source_only")):
        scores = json.loads(
            (cells[f"mr2ct-seed1-{system}"].results / f"{last}_test_prepared_protocol" / "summary.json").read_text(
                encoding="utf-8"
            )
        )
        (row,) = (row for row in rows if (row["system"], row["structure"]) == (system, "mean"))
        dice = scores["summary"]["structures"]["mean"]["dice"]["mean"]
        assert float(row["dice_percent_mean"]) == pytest.approx(100 * dice)
        assert (row["iterations"], row["seeds"]) == ("12", "1")
        assert float(row["minutes"]) > 0
    for file in ("comparison.txt", "comparison.md", "comparison.tex"):
        assert "MPSCL" in (out / file).read_text(encoding="utf-8")
    assert "mpscl_ray.report" in capsys.readouterr().out
    status = json.loads((out / "status.json").read_text(encoding="utf-8"))
    assert status["state"] == "finished"
    assert status["runs"] == {"total": len(METHOD), "finished": len(METHOD), "failed": 0, "running": 0}

    before = {name: run.metrics_file.stat().st_mtime_ns for name, run in cells.items()}
    assert compare.main([*words, *METHOD], fit=fit) == 0
    assert {name: run.metrics_file.stat().st_mtime_ns for name, run in cells.items()} == before

    with pytest.raises(ConfigError, match=r"mr2ct-seed1-\w+ was started with another config: optim.lr"):
        compare.main([*words, *METHOD, "optim.lr=0.5"], fit=fit)


def test_a_cell_that_fails_does_not_stop_the_rest_and_is_tried_again(cluster: None, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    presets = write_presets(tmp_path / "presets", baseline={"optim": {"lr": 1e30}, "phases": {"source_only_lr": 1e30}})
    words = arguments(data, presets, out, "--seeds", "1", "--directions", "backward", "baseline", "mpscl")
    with pytest.raises(TrainingError, match="1 of 2 runs failed: ct2mr-seed1-baseline"):
        compare.main(words, fit=fit)
    cells = json.loads((out / "cells.json").read_text(encoding="utf-8"))["cells"]
    assert "not finite" in cells["ct2mr-seed1-baseline"]["reason"]
    assert cells["ct2mr-seed1-mpscl"]["state"] == "finished"
    status = json.loads((out / "status.json").read_text(encoding="utf-8"))
    assert status["exit_code"] == 6
    assert status["runs"] == {"total": 2, "finished": 1, "failed": 1, "running": 0}
    assert "MPSCL" in (out / "comparison.md").read_text(encoding="utf-8")

    write_presets(tmp_path / "presets")
    assert compare.main(words, fit=fit) == 0
    cells = json.loads((out / "cells.json").read_text(encoding="utf-8"))["cells"]
    assert {cell["state"] for cell in cells.values()} == {"finished"}


def test_folds_are_trained_scored_and_resumed_as_cells(
    cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for number, modality in enumerate(("mr", "ct")):
        make_folds(data / modality, modality, seed=number)
    presets = write_presets(tmp_path / "presets")
    words = arguments(data, presets, out, "--folds", "--seeds", "1", "--directions", "forward")
    assert compare.main([*words, "source_only", "baseline", "mpscl"], fit=fit) == 0
    said = capsys.readouterr().out
    assert "warning: the folds of source and target were drawn with other seeds, 0 and 1" in said
    assert "mr to ct, 2 folds, seeds 1: 6 runs" in said
    assert "mr2ct-fold0-seed1-source_only" in said.rpartition("mpscl_ray.report")[2]
    assert "fold1" not in said.rpartition("mpscl_ray.report")[2].splitlines()[0], "runs of one fold go together"
    cells = json.loads((out / "cells.json").read_text(encoding="utf-8"))["cells"]
    assert cells.keys() == {
        f"mr2ct-fold{k}-seed1-{system}" for k in (0, 1) for system in ("source_only", "baseline", "mpscl")
    }
    for fold in (0, 1):
        assert cells[f"mr2ct-fold{fold}-seed1-mpscl"]["forked"] == [f"mr2ct-fold{fold}-seed1-baseline", "warm_up"]
        scored = cells[f"mr2ct-fold{fold}-seed1-mpscl"]["scored_on"]
        assert (scored["split"], scored["volumes"]) == ("test", 3)
        assert scored["dataset"] == str(data / "ct" / f"fold{fold}")
    rows = [
        row
        for row in csv.DictReader((out / "comparison.csv").open())
        if (row["system"], row["structure"]) == ("mpscl", "mean")
    ]
    assert [(row["fold"], row["folds"]) for row in rows] == [("", "2"), ("0", ""), ("1", "")]
    whole, *parts = (float(row["dice_percent_mean"]) for row in rows)
    assert whole == pytest.approx(sum(parts) / 2)
    page = RunDirectory(out).progress_page.read_text(encoding="utf-8")
    assert "<th>fold</th>" in page.replace(' class="number"', "")
    assert "fold 1" in page
    assert f"6 labelled test volumes of CT in 2 folds of {data / 'ct'}" in page

    runs = {name: RunDirectory(out / "cells" / name) for name in cells}
    before = {name: run.metrics_file.stat().st_mtime_ns for name, run in runs.items()}
    assert compare.main([*words, "source_only", "baseline", "mpscl", "supervised"], fit=fit) == 0
    assert {name: run.metrics_file.stat().st_mtime_ns for name, run in runs.items()} == before
    assert "8 runs, 6 of them finished" in capsys.readouterr().out
