"""Rules chosen for the weights of a run on validation volumes, and what takes them."""

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
from mpscl_ray.evaluate import case_scores
from mpscl_ray.evaluate import choose_postprocessing as choosing
from mpscl_ray.evaluate import command as evaluate
from mpscl_ray.evaluate.case_scores import SegmentedCase
from mpscl_ray.evaluate.run import evaluate_phases
from mpscl_ray.evaluate.scoring import evaluate_checkpoint
from mpscl_ray.predict import command as predict
from mpscl_ray.predict.model import read_model
from mpscl_ray.predict.postprocessing import Postprocessing, Rule
from mpscl_ray.runs.run_directory import RunDirectory
from tests.dataset_run import write_run
from tests.raw_volumes import made, mmwhs

CLASSES = ("background", "LV", "RV")
AFFINE = np.diag([1.5, 1.5, 2.25, 1])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets of both modalities with labelled validation volumes, and a run whose network was never trained."""
    folder = tmp_path_factory.mktemp("choice")
    for modality in ("ct", "mr"):
        mmwhs(folder / "raw", modality, affine=AFFINE)
    made(folder / "raw")
    return folder


@pytest.fixture
def run(base: Path, tmp_path: Path) -> RunDirectory:
    weights = {"checkpoints/step-0000020": 2, "phases/source_only": 1, "phases/adaptation": 2, "best": 3}
    return write_run(tmp_path / "run", base / "out" / "mr", base / "out" / "ct", weights)


def labels(*sizes: int, holes: bool = False) -> np.ndarray:
    """A label map in which the first structure has parts of these sizes."""
    array = np.zeros((len(sizes) * 2 + 4, 8, 64), np.uint8)
    for number, size in enumerate(sizes):
        array[2 * number, 0, :size] = 1
    if holes:
        array[-3:, 2:5, 2:5] = 1
        array[-2, 3, 3] = 0
    return array


def by_anatomy(source: np.ndarray, *predictions: np.ndarray) -> Rule:
    found = [choosing._parts_of(array, CLASSES, 0.1) for array in (source, *predictions)]
    rules = choosing._by_anatomy(CLASSES[1:], found[:1], found[1:])
    assert "RV" not in rules, "it is in no volume"
    return rules["LV"]


@pytest.mark.parametrize(
    ("source", "predictions", "rule"),
    [
        (labels(60), [labels(50, 3), labels(50)], Rule(largest_component=True)),
        (labels(60), [labels(50), labels(40)], Rule()),
        (labels(40, 20), [labels(50, 3)], Rule()),
        (labels(60), [labels(50, 3), labels(30, 20)], Rule()),
        (labels(60), [labels(50, 2), labels(30, 20)], Rule(min_ml=0.3)),
        (labels(60), [labels(50, holes=True), labels(50, 3)], Rule(fill_holes=True)),
        (labels(3, holes=True), [labels(3, holes=True)], Rule()),
    ],
    ids="specks,one_part,two_in_truth,two_as_large,small_ones,holes,holes_in_truth".split(","),
)
def test_labels_of_the_source_say_what_a_structure_is_like(
    source: np.ndarray, predictions: list[np.ndarray], rule: Rule
) -> None:
    assert by_anatomy(source, *predictions) == rule


def test_dice_chooses_for_each_structure_by_itself() -> None:
    """The largest part of LV is right and its speck wrong; of RV the smaller part is the true one."""
    truth, found = np.zeros((2, 6, 10, 12), np.uint8)
    truth[1:5, 1:5, 1:5] = found[1:5, 1:5, 1:5] = 1
    found[5, 8, 0:2] = 1
    truth[0, 7:9, 0:8] = found[0, 7:9, 0:8] = 2
    found[2:6, 6:8, 8:12] = 2
    table = choosing.dice_of_candidates(SegmentedCase(found, truth, (10, 10, 10), found), CLASSES)
    rules, scores = choosing._by_dice(CLASSES[1:], table[None])
    assert rules == {"LV": Rule(largest_component=True), "RV": Rule()}
    assert scores["LV"] == (pytest.approx(128 / 130), 1.0)
    assert scores["RV"][0] == scores["RV"][1] == pytest.approx(32 / 64)


def test_every_phase_gets_rules_that_predict_evaluate_and_an_exported_model_take(
    run: RunDirectory, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([str(run.path), "--choose-postprocessing", "--workers", "0"]) == 0
    said = capsys.readouterr().out
    assert "postprocessing of adaptation (label_free, validation volumes: " in said
    stored = json.loads(run.postprocessing_file.read_text(encoding="utf-8"))
    assert {entry["checkpoint"] for entry in stored.values()} == {"source_only", "adaptation", "best"}
    assert all(entry["chosen_by"] == "label_free" and not entry["validation_dice"] for entry in stored.values())
    # Rules that surely change something, whatever the random network predicts.
    for entry in stored.values():
        entry["rules"] = {name: {"largest_component": True} for name in read_model(run).classes[1:]}
    run.postprocessing_file.write_text(json.dumps(stored), encoding="utf-8")
    how: dict[str, Any] = {"workers": 0, "progress": False}
    table = evaluate_checkpoint(run, "adaptation", **how)
    plain = evaluate_checkpoint(run, "adaptation", postprocessing="none", **how)
    largest = evaluate_checkpoint(run, "adaptation", postprocessing="largest_component", **how)
    assert (table.name, plain.name) == ("adaptation_test", "adaptation_test_no_postprocessing")
    assert table.summary == largest.summary != plain.summary
    model = tmp_path / "hearts.mpscl"
    card = export_model(run.path, model, "adaptation")
    assert card["postprocessing"]["rules"] == table.postprocessing.to_json()
    expected = table.summary.to_json()["structures"]["mean"]["dice"]["mean"]
    assert card["scores"]["structures"]["mean"]["dice"]["mean"] == expected
    image = str(base / "raw" / "ct_train_1005_image.nii.gz")
    of_run, maps = [str(run.path), "--checkpoint", "adaptation"], {}
    for name, words in {"run": of_run, "file": [str(model)], "off": [*of_run, "--no-postprocessing"]}.items():
        out = tmp_path / name
        assert predict.main([words[0], image, *words[1:], "--workers", "0", "--out", str(out)]) == 0
        (file,) = out.glob("*_prediction.nii.gz")
        maps[name] = np.asarray(nib.load(file).dataobj)
        entry = json.loads((out / "volumes.json").read_text(encoding="utf-8"))["predictions"][file.name]
        assert bool(entry["postprocessing"]) == (name != "off")
    assert np.array_equal(maps["run"], maps["file"])
    assert not np.array_equal(maps["run"], maps["off"])
    scan: Any = nib.load(image)
    api = load_segmenter(model, device="cpu")
    for choice, name in (("chosen", "run"), ("none", "off")):
        with pytest.warns(UserWarning, match="may be cut off"):
            found = api.predict(scan.get_fdata(), scan.affine, postprocessing=choice)  # type: ignore[arg-type]
        assert np.array_equal(found, maps[name])


def test_labels_of_the_target_choose_only_where_the_run_uses_them(run: RunDirectory, base: Path) -> None:
    run.write_config("method: {name: mpscl}\nrun: {select: oracle}\n")
    chosen = choosing.choose_postprocessing(run, "adaptation", workers=0, progress=False)
    assert chosen.postprocessing.oracle
    assert set(chosen.dice) == set(read_model(run).classes[1:])
    assert all(after >= before for before, after in chosen.dice.values())
    done = evaluate_checkpoint(run, "adaptation", workers=0, progress=False)
    assert done.row_label == "adaptation (oracle)"
    assert any("chose the postprocessing" in notice for notice in done.notices)
    run.write_model({**run.read_model(), "labelled": "target"})
    assert choosing.criterion_of(run) == "supervised"


def test_without_labels_of_the_target_nothing_of_them_is_read(
    run: RunDirectory, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    read_case, read_label_map = case_scores.read_case, case_scores.read_label_map
    monkeypatch.setattr(
        case_scores, "read_case", lambda at, case, names: opened.append((at.name, *names)) or read_case(at, case, names)
    )
    monkeypatch.setattr(
        case_scores, "read_label_map", lambda at, case: opened.append((at.name, "label")) or read_label_map(at, case)
    )
    choosing.choose_postprocessing(run, "adaptation", workers=0, progress=False)
    assert ("mr", "label") in opened
    assert [entry for entry in opened if entry[0] == "ct"] == [("ct", "image")] * len(
        load_manifest(base / "out" / "ct").split("val")
    )


def test_what_cannot_be_chosen_is_refused(run: RunDirectory, base: Path, tmp_path: Path) -> None:
    model = tmp_path / "hearts.mpscl"
    export_model(run.path, model)
    with pytest.raises(ConfigError, match="is a model file, which stays as it is"):
        choosing.choose_postprocessing(str(model))
    source = tmp_path / "mr"
    source.mkdir()
    manifest = load_manifest(base / "out" / "mr")
    save_manifest(
        source, dataclasses.replace(manifest, cases=tuple(case for case in manifest.cases if case.split != "val"))
    )
    described = run.read_model()
    run.write_model({**described, "source": {**described["source"], "dataset": str(source)}})
    with pytest.raises(DataError, match=r"no validation case of .*mr, the source of the run .* is labelled"):
        choosing.choose_postprocessing(run, workers=0, progress=False)
    run.postprocessing_file.write_text('{"x": {"rules": {"MYO": {"size": 3}}, "chosen_by": null}}', encoding="utf-8")
    with pytest.raises(DataError, match="the rule of MYO has 'size'"):
        read_model(run)
    run.postprocessing_file.write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="does not read as JSON"):
        read_model(run)


def test_a_run_whose_settings_ask_for_it_chooses_before_it_is_scored(run: RunDirectory) -> None:
    evaluate_phases(run, ["adaptation"], workers=0, progress=False)
    assert not run.postprocessing_file.exists()
    run.write_config("method: {name: mpscl}\nrun: {choose_postprocessing: true}\n")
    done = evaluate_phases(run, ["adaptation"], workers=0, progress=False)["adaptation"]
    stored = json.loads(run.postprocessing_file.read_text(encoding="utf-8"))
    assert done.postprocessing.to_json() in [entry["rules"] for entry in stored.values()]
    table = json.loads((run.results / "phases.json").read_text(encoding="utf-8"))
    assert table["postprocessing"] == {"adaptation": done.postprocessing.to_json()}


@pytest.mark.parametrize("words", ["--data x", "--out x", "--split val", "--protocol prepared", "--no-postprocessing"])
def test_options_that_choosing_does_not_take_are_refused(words: str) -> None:
    with pytest.raises(ConfigError, match=f"own datasets; leave out {words.split()[0]}"):
        evaluate.main(["run", "--choose-postprocessing", *words.split()])


def test_a_rule_keeps_to_its_weights(run: RunDirectory) -> None:
    choosing.choose_postprocessing(run, "source_only", workers=0, progress=False)
    other = load_segmenter(run.path, "adaptation", device="cpu")
    assert other._predictor.postprocessing("chosen") == Postprocessing()
    assert len(read_model(run).postprocessing) == 1
