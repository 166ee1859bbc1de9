"""The evaluate command on a run whose network was never trained: what it writes, and how it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from medpy.metric import binary

from mpscl_ray.data.dataset import Scaling, load_manifest
from mpscl_ray.data.parquet_reader import read_case
from mpscl_ray.errors import ConfigError, DataError, StorageError
from mpscl_ray.evaluate import command as evaluate
from mpscl_ray.evaluate.metrics import volume_scores
from mpscl_ray.evaluate.run import PHASES_TABLE, evaluate_phases
from mpscl_ray.evaluate.scoring import evaluate_checkpoint
from mpscl_ray.predict.predictor import load_segmenter
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train.phase_images import draw_phases
from tests.hearts_run import CLASSES, SPACING, write_dataset, write_hearts_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hearts_run(tmp_path_factory.mktemp("evaluate"))


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def test_evaluate_scores_every_slice_as_medpy_does(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(run), "--workers", "0"]) == 0
    results = run / "results" / "last_test_prepared_protocol"
    assert sorted(path.name for path in results.iterdir()) == [
        "per_volume.csv",
        "summary.csv",
        "summary.json",
        "summary.md",
    ]
    predictor = load_segmenter(run, device="cpu")
    rows = {(row["case"], row["structure"]): row for row in rows_of(results / "per_volume.csv")}
    folder = run.parent / "ct"
    scored = 0
    for case in load_manifest(folder).split("test"):
        if not case.labelled:
            continue
        arrays = read_case(folder, case)
        labels = predictor.predict_slices(arrays["image"])
        for index, name in enumerate(CLASSES[1:], start=1):
            row, p, t = rows.pop((case.id, name)), labels == index, arrays["label"] == index
            assert (int(row["predicted_voxels"]), int(row["truth_voxels"])) == (p.sum(), t.sum())
            if row["case_kind"] == "ok":
                scored += 1
                assert float(row["dice"]) == pytest.approx(binary.dc(p, t))
                assert float(row["asd_mm"]) == pytest.approx(binary.assd(p, t, SPACING))
                assert float(row["asd_voxel"]) == pytest.approx(binary.assd(p, t))
                means = (binary.asd(p, t) + binary.asd(t, p)) / 2
                assert float(row["asd_voxel_mean_of_means"]) == pytest.approx(means)
            else:
                assert row["asd_mm"] == ""
    assert scored >= 4
    assert not rows, "a case without a label has no score"
    summary = json.loads((results / "summary.json").read_text(encoding="utf-8"))
    assert summary["checkpoint"]["step"] == 20
    assert summary["volumes"]["case40"]["slices"] == 40
    counts = summary["summary"]["structures"]["AA"]["counts"]
    assert counts["absent"] + counts["false_alarm"] == 1  # the volume without one
    out = capsys.readouterr().out
    assert "1 of 4 cases have no label" in out
    assert out.index("AA") < out.index("LAC") < out.index("MYO") < out.index("mean")
    assert "ASD mm" in (results / "summary.md").read_text(encoding="utf-8")


def test_workers_find_the_same_scores(run: Path, cluster: None) -> None:
    alone = evaluate_checkpoint(run, "source_only", out=run / "alone", workers=0, progress=False)
    spread = evaluate_checkpoint(run, "source_only", out=run / "spread", workers=2, progress=False)
    assert (run / "alone" / "per_volume.csv").read_bytes() == (run / "spread" / "per_volume.csv").read_bytes()
    assert alone.summary.mean.counts == spread.summary.mean.counts
    other = evaluate_checkpoint(run, "adaptation", out=run / "other", workers=2, progress=False)
    assert other.scores != spread.scores, "workers must not go on with the weights they had"


def test_the_table_of_phases_has_a_row_for_each(run: Path) -> None:
    done = evaluate_phases(run, ["source_only", "adaptation"], workers=0, progress=False)
    assert list(done) == ["source_only", "adaptation"]
    text = (run / "results" / PHASES_TABLE).read_text(encoding="utf-8")
    assert text.startswith("3 labelled test volumes of ct")
    lines = text.splitlines()
    assert lines[2].split() == ["Dice", "%", "AA", "LAC", "LVC", "MYO", "mean"]
    assert lines[3].startswith("source_only")
    assert lines[4].startswith("adaptation")
    assert {row["row"] for row in rows_of(run / "results" / "phases.csv")} == {"source_only", "adaptation"}
    assert (run / "results" / "source_only_test_prepared_protocol" / "summary.json").exists()


def test_a_target_without_labels_and_their_table_has_no_table_of_phases(run: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "ct", "ct", labelled_at_all=False, classes=(), labels={})
    other = RunDirectory(tmp_path / "run")
    other.create()
    other.write_config(RunDirectory(run).read_config())
    model = RunDirectory(run).read_model()
    other.write_model({**model, "target": {**model["target"], "dataset": str(dataset)}})
    assert evaluate_phases(other.path, ["source_only"], workers=0, progress=False) == {}
    assert draw_phases(other.path, ["source_only"]) is None
    with pytest.raises(DataError, match=r"no case of the split test .* is labelled .*no other split has labels either"):
        evaluate.main([str(run), "--data", str(dataset)])


def test_a_choice_by_target_labels_is_called_oracle(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(run), "--checkpoint", "best", "--split", "val", "--workers", "0"]) == 0
    assert "best (oracle)" in capsys.readouterr().out
    summary = json.loads((run / "results" / "best_val_prepared_protocol" / "summary.json").read_text(encoding="utf-8"))
    assert summary["checkpoint"]["oracle"] is True


def test_the_released_protocol_is_named_and_kept_apart(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(run), "--protocol", "released", "--workers", "0"]) == 0
    assert "RELEASED PROTOCOL" in capsys.readouterr().out
    rows = rows_of(run / "results" / "last_test_released_protocol" / "per_volume.csv")
    short = [row for row in rows if row["case"] == "case07"]
    assert {row["predicted_voxels"] for row in short} == {"0"}  # fewer than 32 slices: none of them counts
    assert {row["asd_voxel"] for row in short} == {"1.0"}
    assert all(row["asd_mm"] == "" for row in rows)


def test_what_cannot_be_evaluated_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no case of the split train .* test \(3\), val \(1\)|val \(1\), test \(3\)"):
        evaluate.main([str(run), "--split", "train"])
    other = write_dataset(tmp_path / "other", "ct", classes=("background", "LAC", "MYO", "LVC", "AA"))
    with pytest.raises(DataError, match="has the classes background, LAC, MYO"):
        evaluate.main([str(run), "--data", str(other)])
    with pytest.raises(DataError, match="prepare a dataset"):
        evaluate.main([str(run), "--data", str(tmp_path / "nowhere")])
    with pytest.raises(ConfigError, match="not the folder of a run"):
        evaluate.main([str(tmp_path)])
    with pytest.raises(ConfigError, match="--workers"):
        evaluate.main([str(run), "--workers", "-1"])
    rescaled = write_dataset(tmp_path / "rescaled", "ct", scaling=Scaling(-2.0, 4.0, "estimated"))
    done = evaluate_checkpoint(run, data=rescaled, out=tmp_path / "out", workers=0, progress=False)
    assert any("scaled by the range -2 to 4" in notice for notice in done.notices)
    case = next(case for case in load_manifest(rescaled).split("test") if case.labelled)
    arrays = read_case(rescaled, case)
    as_trained = (2 * ((arrays["image"] + 1) * 3 - 2 + 2) / 5 - 1).astype(np.float32)
    labels = load_segmenter(run).predict_slices(as_trained)
    expected = volume_scores(labels, arrays["label"], CLASSES, SPACING)
    assert [score.dice for score in done.scores[case.id]] == pytest.approx([score.dice for score in expected], abs=0.01)
    assert (labels != load_segmenter(run).predict_slices(arrays["image"])).mean() > 0.05
    with pytest.raises(StorageError):
        evaluate.main([str(run), "--out", "/dev/null/x"])
