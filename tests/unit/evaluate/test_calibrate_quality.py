"""The quality estimate calibrated for the weights of a run on validation volumes, and what takes it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from mpscl_ray import export_model, load_segmenter
from mpscl_ray.data.dataset import load_manifest, save_manifest
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.evaluate import calibrate_quality as calibrating
from mpscl_ray.evaluate import case_scores
from mpscl_ray.evaluate import command as evaluate
from mpscl_ray.evaluate.run import evaluate_phases
from mpscl_ray.predict import command as predict
from mpscl_ray.predict.model import read_model
from mpscl_ray.predict.quality import FITTED
from mpscl_ray.runs.run_directory import RunDirectory
from tests.dataset_run import write_run
from tests.json_command import json_of
from tests.raw_volumes import made, mmwhs

AFFINE = np.diag([1.5, 1.5, 2.25, 1])
WEIGHTS = {"checkpoints/step-0000020": 2, "phases/source_only": 1, "phases/adaptation": 2, "best": 3}
HOW: dict[str, Any] = {"workers": 0, "progress": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets of both modalities with labelled validation volumes."""
    folder = tmp_path_factory.mktemp("quality")
    for modality in ("ct", "mr"):
        mmwhs(folder / "raw", modality, affine=AFFINE)
    made(folder / "raw")
    return folder


@pytest.fixture
def run(base: Path, tmp_path: Path) -> RunDirectory:
    """Its network was never trained, so that its Dice is low, but not the same for all appearances."""
    return write_run(tmp_path / "run", base / "out" / "mr", base / "out" / "ct", WEIGHTS)


def pairs(*, falling: bool = False) -> calibrating.Pairs:
    """Dice that is 0.1 + 0.8 times the first feature; the second is noise, the third hardly varies."""
    rng = np.random.default_rng(3)
    first, noise = rng.uniform(0.2, 1.0, 200), rng.uniform(0.6, 0.7, 200)
    third = 0.99 + 1e-4 * (-first if falling else first)
    return [([a, b, c], 0.1 + 0.8 * a) for a, b, c in zip(first.tolist(), noise.tolist(), third.tolist(), strict=True)]


def test_the_fit_finds_the_feature_that_says_the_dice_and_never_weights_one_below_0() -> None:
    intercept, weights = calibrating.fit(pairs(falling=True))
    assert weights["expected_dice"] == pytest.approx(0.8, abs=0.02)
    assert intercept == pytest.approx(0.1, abs=0.1)
    assert min(weights.values()) >= 0
    assert weights["largest_part"] == 0
    _, rising = calibrating.fit(pairs())
    assert rising["largest_part"] < 0.01, "a feature that hardly varies would be extrapolated far"
    reversed_dice = [(values, 1 - score) for values, score in pairs()]
    assert calibrating.fit(reversed_dice)[1]["expected_dice"] == 0


def test_changed_slices_are_the_same_again_and_differ_more_with_the_strength() -> None:
    slices = np.random.default_rng(0).uniform(-1, 1, (3, 16, 16)).astype(np.float32)
    assert calibrating.changed(slices, 4, 0.0) is slices
    weak, strong = (calibrating.changed(slices, 4, strength) for strength in (0.3, 1.0))
    assert np.array_equal(strong, calibrating.changed(slices, 4, 1.0))
    assert 0 < np.abs(weak - slices).mean() < np.abs(strong - slices).mean()
    np.testing.assert_allclose(weak, slices + 0.3 * (strong - slices), atol=1e-6)


def test_every_phase_is_calibrated_and_predict_takes_it_from_the_run_and_its_model_file(
    run: RunDirectory, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(base / "raw" / "ct_train_1005_image.nii.gz")
    words = [image, "--workers", "0", "--out"]
    assert predict.main([str(run.path), *words, str(tmp_path / "before")]) == 0
    assert "no estimate of the quality: these weights are not calibrated" in capsys.readouterr().out
    (entry,) = entries(tmp_path / "before")
    assert entry["quality"]["estimate"] is None
    assert set(entry["quality"]["features"]) == set(FITTED)

    document = json_of(evaluate.main, run.path, "--calibrate-quality", "--workers", "0")
    assert [one["weights"] for one in document["quality"]] == ["source_only", "adaptation", "best"]
    stored = json.loads(run.quality_file.read_text(encoding="utf-8"))
    assert {one["checkpoint"] for one in stored.values()} == {"source_only", "adaptation", "best"}
    for one in stored.values():
        assert one["calibrated_on"] == "source"
        volumes = len(load_manifest(base / "out" / "mr").split("val"))
        assert one["segmentations"] == len(calibrating.STRENGTHS) * volumes
        assert min(one["weights"].values()) >= 0
    model = tmp_path / "hearts.mpscl"
    export_model(run.path, model, "adaptation")
    found = []
    for name, given in {"run": [str(run.path), "--checkpoint", "adaptation"], "file": [str(model)]}.items():
        assert predict.main([*given, *words, str(tmp_path / name)]) == 0
        assert "estimated mean Dice: " in capsys.readouterr().out
        found += [one["quality"] for one in entries(tmp_path / name)]
    assert found[0] == found[1]
    assert 0 <= found[0]["estimate"] <= 1
    assert set(found[0]["structures"]) == set(read_model(run).classes[1:])
    scan: Any = nib.load(image)
    segmenter = load_segmenter(model, device="cpu")
    with pytest.warns(UserWarning, match="may be cut off"):
        labels, quality = segmenter.predict_with_quality(scan.get_fdata(), scan.affine)
    with pytest.warns(UserWarning, match="may be cut off"):
        assert np.array_equal(labels, segmenter.predict(scan.get_fdata(), scan.affine))
    assert quality.estimate == found[0]["estimate"]


def entries(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "volumes.json").read_text(encoding="utf-8"))["predictions"].values())


def test_label_maps_with_a_low_estimate_are_named_the_worst_first(
    run: RunDirectory, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrating.calibrate_quality(run, "adaptation", **HOW)
    images = [str(base / "raw" / f"ct_train_{number}_image.nii.gz") for number in (1001, 1002, 1003)]
    words = [str(run.path), *images, "--checkpoint", "adaptation", "--workers", "0", "--out", str(tmp_path / "out")]
    assert predict.main([*words, "--any-modality"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("estimated mean Dice"))
    assert "3 of 3 below 0.7" in lines[at]
    values = [float(line.split()[0]) for line in lines[at + 1 : at + 4]]
    assert values == sorted(values)


def test_an_ensemble_says_how_much_its_runs_disagree(run: RunDirectory, base: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", base / "out" / "mr", base / "out" / "ct", {"phases/adaptation": 7})
    image = str(base / "raw" / "ct_train_1005_image.nii.gz")
    calibrating.calibrate_quality(run, "adaptation", **HOW)
    words = [str(run.path), image, "--ensemble", str(other.path), "--checkpoint", "adaptation", "--workers", "0"]
    assert predict.main([*words, "--out", str(tmp_path / "one")]) == 0
    (entry,) = entries(tmp_path / "one")
    assert entry["quality"]["features"]["disagreement"] > 0
    assert entry["quality"]["estimate"] is None, "one of them is not calibrated"
    calibrating.calibrate_quality(other, "adaptation", **HOW)
    assert predict.main([*words, "--out", str(tmp_path / "both")]) == 0
    assert entries(tmp_path / "both")[0]["quality"]["estimate"] is not None


def test_no_label_of_the_target_is_read(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    for module in (case_scores, calibrating):
        read = module.read_case
        monkeypatch.setattr(
            module, "read_case", lambda at, case, names, read=read: opened.append(at.name) or read(at, case, names)
        )
    calibrating.calibrate_quality(run, "adaptation", **HOW)
    assert set(opened) == {"mr"}


def test_where_nothing_can_be_calibrated_one_sentence_says_why(run: RunDirectory, base: Path, tmp_path: Path) -> None:
    model = tmp_path / "hearts.mpscl"
    export_model(run.path, model, "adaptation")
    with pytest.raises(ConfigError, match="is a model file, which stays as it is"):
        evaluate.main([str(model), "--calibrate-quality"])
    with pytest.raises(ConfigError, match="give --choose-postprocessing first"):
        evaluate.main([str(run.path), "--calibrate-quality", "--choose-postprocessing"])
    with pytest.raises(ConfigError, match=r"--calibrate-quality takes .* leave out --data"):
        evaluate.main([str(run.path), "--calibrate-quality", "--data", "x"])
    manifest = load_manifest(base / "out" / "mr")
    cases = [
        dataclasses.replace(case, labelled=False, label_map=None) if case.split == "val" else case
        for case in manifest.cases
    ]
    bare = tmp_path / "bare"
    bare.mkdir()
    save_manifest(bare, dataclasses.replace(manifest, cases=tuple(cases)))
    other = write_run(tmp_path / "other", bare, base / "out" / "ct", WEIGHTS)
    with pytest.raises(DataError, match=r"no validation case of .*bare, the source of the run .*, is labelled"):
        calibrating.calibrate_quality(other, "adaptation", **HOW)
    assert not other.quality_file.exists()


def test_a_damaged_file_is_named_with_what_to_do(run: RunDirectory) -> None:
    run.quality_file.write_text('{"x": {"intercept": 0, "weights": {}}}', encoding="utf-8")
    with pytest.raises(DataError, match=r"quality.json is not what evaluate --calibrate-quality writes"):
        read_model(run)


def test_a_run_whose_settings_ask_for_it_is_calibrated_when_it_ends(run: RunDirectory) -> None:
    run.write_config("method: {name: mpscl}\nrun: {calibrate_quality: true}\n")
    evaluate_phases(run, ["adaptation"], **HOW)
    stored = json.loads(run.quality_file.read_text(encoding="utf-8"))
    assert {entry["checkpoint"] for entry in stored.values()} == {"adaptation", "best"}
