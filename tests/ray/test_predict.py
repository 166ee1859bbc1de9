"""The predict command on a run whose network was never trained: what it writes, and how it refuses."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mpscl_ray.data.volumes.preprocess import prepare_volume
from mpscl_ray.data.volumes.recipe import Recipe
from mpscl_ray.errors import ConfigError, StorageError
from mpscl_ray.predict import command as predict
from mpscl_ray.predict.predictor import load_segmenter
from tests.hearts_run import CLASSES, oblique, write_hearts_run, write_image


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hearts_run(tmp_path_factory.mktemp("predict"))


def test_predict_segments_many_files_and_reports_the_bad_one(
    run: Path, cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans, out = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    images = {f"p{seed}": write_image(scans / f"p{seed}.nii.gz", seed, oblique()) for seed in range(3)}
    (scans / "broken.nii.gz").write_bytes(b"<html>not found</html>")
    write_image(scans / "p0_label.nii.gz", 9, oblique())  # not an image by its name
    arguments = [str(run), str(scans), "--out", str(out), "--workers", "2"]
    assert predict.main(arguments) == 3
    shown = capsys.readouterr()
    assert "1 of 4 inputs were not segmented" in shown.err
    assert "broken.nii.gz" in shown.err
    assert sorted(path.name for path in out.iterdir()) == [
        "itksnap_labels.txt",
        *(f"p{seed}_prediction.nii.gz" for seed in range(3)),
        "slicer_labels.ctbl",
        "volumes.json",
    ]
    volumes = json.loads((out / "volumes.json").read_text(encoding="utf-8"))["predictions"]
    predictor = load_segmenter(run, device="cpu")
    for name, image in images.items():
        written = nib.load(out / f"{name}_prediction.nii.gz")
        original = nib.load(scans / f"{name}.nii.gz")
        assert written.shape == image.shape
        assert written.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(written.affine, original.affine)
        for code in ("qform_code", "sform_code"):
            assert int(written.header[code]) == int(original.header[code])
        labels = np.asarray(written.dataobj)
        found = volumes[f"{name}_prediction.nii.gz"]["volumes_ml"]
        expected = {c: np.count_nonzero(labels == i) * 1.5 * 3 * 1.25 / 1000 for i, c in enumerate(CLASSES) if i}
        assert found == pytest.approx(expected, rel=1e-5)
        # The same preparation as training, with the crop placed without labels.
        prepared = prepare_volume(
            image.astype(np.float32), original.affine, None, Recipe(crop=(32, 32), centre="image")
        )
        slices = 2 * (prepared.image + 2.0) / 5.0 - 1
        again = predictor.predict_slices(slices.astype(np.float32))
        present = np.unique(again)
        assert len(present) > 1
        assert np.isin(np.unique(labels), [0, *present]).all()
        counts = np.bincount(labels.ravel(), minlength=5)[1:] / np.bincount(again.ravel(), minlength=5)[1:].clip(1)
        assert counts.max() <= 1.0 + 1e-3, "ties of this network may be rounded otherwise in another process"
    table = (out / "slicer_labels.ctbl").read_text(encoding="utf-8").splitlines()
    assert [line.split()[:2] for line in table[1:]] == [[str(i), name] for i, name in enumerate(CLASSES)]
    assert '"LVC"' in (out / "itksnap_labels.txt").read_text(encoding="utf-8")


def test_predict_overwrites_only_when_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image(tmp_path / "a.nii.gz", 1, oblique())
    write_image(tmp_path / "b.nii", 2, oblique())
    out = tmp_path / "out"
    arguments = [str(run), "--out", str(out), "--workers", "0"]
    assert predict.main([*arguments, str(tmp_path / "a.nii.gz")]) == 0
    first = (out / "a_prediction.nii.gz").read_bytes()
    with pytest.raises(ConfigError, match=r"a_prediction\.nii\.gz already"):
        predict.main([*arguments, str(tmp_path)])
    assert predict.main([*arguments, str(tmp_path / "b.nii"), "--preview", "--probabilities"]) == 0
    names = set(json.loads((out / "volumes.json").read_text(encoding="utf-8"))["predictions"])
    assert names == {"a_prediction.nii.gz", "b_prediction.nii.gz"}
    assert (out / "b_preview.png").exists()
    assert (out / "b_probability_LVC.nii.gz").exists()
    raw = [*arguments, str(tmp_path / "a.nii.gz"), "--label-values", "raw"]
    with pytest.raises(ConfigError, match="already"):
        predict.main(raw)
    assert predict.main([*raw, "--overwrite"]) == 0
    indices = np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(first)).dataobj)
    ids = np.asarray(nib.load(out / "a_prediction.nii.gz").dataobj)
    assert np.array_equal(ids, np.array([0, 205, 420, 500, 820])[indices])
    assert "820 AA" in (out / "slicer_labels.ctbl").read_text(encoding="utf-8")
    assert not list(out.glob(".*")), "nothing half-written is left"


def test_predict_refuses_what_it_cannot_do(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "a.nii.gz"
    write_image(image, 1, oblique())
    out = str(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"choose one of source \(mr\), target \(ct\)"):
        predict.main([str(run), str(image), "--out", out, "--modality", "pet"])
    (tmp_path / "other").mkdir()
    write_image(tmp_path / "other" / "a.nii.gz", 1, oblique())
    with pytest.raises(ConfigError, match="same name"):
        predict.main([str(run), str(image), str(tmp_path / "other"), "--out", out])
    with pytest.raises(StorageError, match="is a file where a folder is needed"):
        predict.main([str(run), str(image), "--out", str(image), "--workers", "0"])
    assert not (tmp_path / "out").exists()
    (tmp_path / "dicom").mkdir()
    (tmp_path / "dicom" / "IM0001").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "empty").mkdir()
    inputs = [str(image), str(tmp_path / "dicom"), str(tmp_path / "empty"), str(tmp_path / "none.nii.gz")]
    assert predict.main([str(run), *inputs, "--out", out, "--workers", "0", "--modality", "mr"]) == 3
    shown = capsys.readouterr().err
    assert "truncated or damaged, 1: IM0001" in shown
    assert "3 of 4 inputs" in shown
    assert (tmp_path / "out" / "a_prediction.nii.gz").exists()
