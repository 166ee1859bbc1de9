"""The evaluate and predict commands on a run whose network was never trained: what they write, and how they refuse."""

from __future__ import annotations

import csv
import gzip
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from medpy.metric import binary

from mpscl_ray.data.dataset import Manifest, Scaling, load_manifest, save_manifest
from mpscl_ray.data.parquet_reader import read_case
from mpscl_ray.data.parquet_writer import write_case
from mpscl_ray.data.volumes.preprocess import prepare_volume
from mpscl_ray.data.volumes.recipe import Recipe
from mpscl_ray.errors import ConfigError, DataError, StorageError
from mpscl_ray.evaluate import command as evaluate
from mpscl_ray.evaluate.metrics import volume_scores
from mpscl_ray.evaluate.run import PHASES_TABLE, evaluate_phases
from mpscl_ray.evaluate.scoring import evaluate_checkpoint
from mpscl_ray.predict import command as predict
from mpscl_ray.predict.predictor import load_segmenter
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train.phase_images import draw_phases
from tests.dataset_run import write_run
from tests.s3 import serve

CLASSES = ("background", "MYO", "LAC", "LVC", "AA")
RECIPE = Recipe(crop=(32, 32))
SPACING = (3.0, 1.5, 1.25)
LABELS = {"values": {"0": "background", "205": "MYO", "420": "LAC", "500": "LVC", "820": "AA"}}


def truth(rng: np.random.Generator, depth: int) -> np.ndarray:
    label = np.zeros((depth, 32, 32), np.uint8)
    for index in range(1, 5):
        low = rng.integers(0, 20, 2)
        label[depth // 4 : depth // 2, low[0] : low[0] + 9, low[1] : low[1] + 8] = index
    return label


def write_dataset(folder: Path, modality: str, labelled_at_all: bool = True, **changes: Any) -> Path:
    rng = np.random.default_rng(len(modality))
    cases = []
    for split, depth, labelled in (
        ("test", 40, True),
        ("test", 7, True),
        ("test", 33, True),
        ("test", 9, False),
        ("val", 5, True),
        ("train", 6, False),
    ):
        image = rng.normal(0, 0.4, (depth, 32, 32)).astype(np.float32)
        label = truth(rng, depth)
        if depth == 7:
            label[label == 4] = 0  # a structure that this volume lacks
        name = f"case{depth:02d}"
        cases.append(
            write_case(
                folder,
                id=name,
                patient=name,
                split=split,
                image=image,
                label=label if labelled and labelled_at_all else None,
                classes=CLASSES,
                content_sha256=name,
                geometry={},
                spacing_mm=SPACING,
                cropped_around_labels=False,
                sources={},
            )
        )
    fields: dict[str, Any] = {
        "version": 1,
        "modality": modality,
        "classes": CLASSES,
        "size": (32, 32),
        "scaling": Scaling(-2.0, 3.0, "given"),
        "recipe": RECIPE.to_json(),
        "splitting": {},
        "labels": LABELS,
        "steps": (),
        "notices": (),
        "command": "",
        "product_version": "0",
        "cases": tuple(cases),
    }
    save_manifest(folder, Manifest(**{**fields, **changes}))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run with two phases, a last and a best checkpoint."""
    base = tmp_path_factory.mktemp("evaluate")
    datasets = [write_dataset(base / modality, modality) for modality in ("mr", "ct")]
    weights = {"checkpoints/step-0000020": 2, "phases/source_only": 1, "phases/adaptation": 2, "best": 3}
    return write_run(base / "run", *datasets, weights).path


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


def write_image(path: Path, seed: int, affine: np.ndarray) -> np.ndarray:
    image = np.random.default_rng(seed).gamma(2.0, 100.0, (36, 20, 40)).astype(np.int16)
    volume = nib.Nifti1Image(image, affine)
    volume.set_qform(affine, code=1)
    volume.set_sform(affine, code=2)
    nib.save(volume, path)
    return image


def oblique() -> np.ndarray:
    angle = math.radians(20)
    turn = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-1.5, 3.0, 1.25])
    affine[:3, 3] = (30, -12, 7)
    return affine


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
        assert counts.max() <= 1.0 + 1e-9
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


def test_predictions_and_tables_in_a_bucket_are_those_on_a_disk(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [str(tmp_path / name) for name in ("a.nii.gz", "b.nii.gz")]
    for number, image in enumerate(images):
        write_image(Path(image), number, oblique())
    more = ["--probabilities", "--preview", "--workers", "0"]
    with serve(tmp_path) as server:
        there, place = server.folder("out"), server.url("out")
        for out in (str(tmp_path / "out"), place):
            assert predict.main([str(run), images[0], "--out", out, *more]) == 0
            assert predict.main([str(run), images[1], "--out", out, *more]) == 0
        here = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert {name: (there / name).read_bytes() for name in there.files()} == here
        assert f"are in {place}" in capsys.readouterr().out
        with pytest.raises(ConfigError, match=r"out.* has a_prediction.nii.gz.* already; give --resume"):
            predict.main([str(run), images[0], "--out", place])
        (there / "b_preview.png").delete()
        capsys.readouterr()
        assert predict.main([str(run), *images, "--out", place, *more, "--resume"]) == 0
        assert "1 of 2 images have their label map already" in capsys.readouterr().out
        assert {name: (there / name).read_bytes() for name in there.files()} == here
        assert predict.main([str(run), images[0], "--out", place, "--workers", "0", "--overwrite"]) == 0

        assert evaluate.main([str(run), "--out", server.url("tables"), "--workers", "0"]) == 0
        assert evaluate.main([str(run), "--workers", "0"]) == 0
        for name in ("per_volume.csv", "summary.csv", "summary.json", "summary.md"):
            tables = (server.folder("tables") / name).read_bytes()
            assert tables == (run / "results" / "last_test_prepared_protocol" / name).read_bytes()

        with pytest.raises(StorageError, match="there is no bucket nowhere"):
            predict.main([str(run), images[0], "--out", server.url("out", "nowhere")])
        with pytest.raises(
            ConfigError, match="is in a bucket, but images are read from local files; copy it to this machine"
        ):
            predict.main([str(run), server.url("images/a.nii.gz"), "--out", place])
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith("out-")], "no image stays here"


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


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_commands_explain_themselves_and_end_with_their_exit_code(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        {"evaluate": evaluate, "predict": predict}[command].main(["--help"])
    shown = capsys.readouterr().out
    assert "examples:" in shown
    assert "exit codes:" in shown
    arguments = [str(tmp_path), *(["image.nii.gz", "--out", str(tmp_path / "out")] if command == "predict" else [])]
    call = [sys.executable, "-m", f"mpscl_ray.{command}", *arguments]
    failed = subprocess.run(call, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert "Traceback" not in failed.stderr
