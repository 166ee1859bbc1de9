"""From a run to label maps by way of a model file, with workers that open it themselves."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mpscl_ray.export import command as export
from mpscl_ray.predict import command as predict
from tests.hearts_run import oblique, write_hearts_run, write_image


def test_workers_open_a_model_file_and_predict_what_the_run_predicts(
    cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, model, scans = write_hearts_run(tmp_path), tmp_path / "hearts.mpscl", tmp_path / "scans"
    scans.mkdir()
    for seed in range(2):
        write_image(scans / f"p{seed}.nii.gz", seed, oblique())
    assert export.main([str(run), "--out", str(model)]) == 0
    by_run = [str(run), str(scans), "--checkpoint", "best", "--out", str(tmp_path / "run_maps"), "--workers", "0"]
    assert predict.main(by_run) == 0
    shutil.rmtree(run)
    assert predict.main([str(model), str(scans), "--out", str(tmp_path / "model_maps"), "--workers", "2"]) == 0
    maps = sorted(path.name for path in (tmp_path / "run_maps").glob("*.nii.gz"))
    assert maps == ["p0_prediction.nii.gz", "p1_prediction.nii.gz"]
    for name in maps:
        assert (tmp_path / "run_maps" / name).read_bytes() == (tmp_path / "model_maps" / name).read_bytes()
    assert "2 label maps" in capsys.readouterr().out
