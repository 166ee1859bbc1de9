"""One truth about scores: those of a run are those of the label maps that predict writes, on the grid of the files."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from medpy.metric import binary

from mpscl_ray.data.dataset import load_manifest, save_manifest
from mpscl_ray.data.volumes.recipe import Recipe
from mpscl_ray.errors import DataError
from mpscl_ray.evaluate import command as evaluate
from mpscl_ray.evaluate import score_command as score
from mpscl_ray.evaluate.run import evaluate_phases
from mpscl_ray.evaluate.scoring import evaluate_checkpoint
from mpscl_ray.predict import command as predict
from mpscl_ray.predict.postprocessing import PostprocessingChoice
from tests.dataset_run import write_run
from tests.raw_volumes import RAW_IDS, made, volume, write

IDS = dict(zip(("MYO", "LAC", "LVC", "AA"), RAW_IDS, strict=True))


def affine(number: int) -> np.ndarray:
    """Oblique, and stored in another order in every other file."""
    angle = math.radians(10 + number % 7)
    turn = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    matrix = np.eye(4)
    matrix[:3, :3] = turn @ np.diag([-1.5 if number % 2 else 1.5, 1.5, 2.25])
    return matrix


@pytest.fixture(scope="module", params=["turned and cropped", "resampled"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on volumes whose crop is smaller than the image, so that its place matters."""
    base = tmp_path_factory.mktemp("scores")
    for modality, low in (("ct", -1000.0), ("mr", 0.0)):
        for number in range(1001, 1007):
            image, label = volume(number, low)
            write(base / "raw" / f"{modality}_train_{number}_image.nii.gz", image, affine(number))
            write(base / "raw" / f"{modality}_train_{number}_label.nii.gz", label, affine(number))
    recipe = Recipe(crop=(8, 10))
    if request.param == "resampled":
        recipe = Recipe(crop=(14, 16), crop_depth=12, spacing_mm=(1.9, 2.0, 1.3), size=(28, 24))
    made(base / "raw", recipe=recipe)
    return write_run(base / "run", base / "out" / "mr", base / "out" / "ct", {"phases/adaptation": 2}).path


def images(run: Path) -> list[str]:
    cases = load_manifest(run.parent / "out" / "ct").split("test")
    return [str(run.parent / "raw" / case.sources["image"]) for case in cases]


def written(run: Path, tmp_path: Path, *options: str) -> Path:
    """Label maps of the test images by the predict command, with the ids of the label files."""
    out = tmp_path / "maps"
    words = ["--checkpoint", "adaptation", "--label-values", "raw", "--workers", "0", "--out", str(out), *options]
    assert predict.main([str(run), *images(run), *words]) == 0
    return out


@pytest.mark.parametrize("largest", [False, True])
def test_train_evaluate_score_and_medpy_agree(run: Path, tmp_path: Path, largest: bool) -> None:
    option = ["--largest-component"] * largest
    out = written(run, tmp_path, *option)
    table = evaluate_phases(run, ["adaptation"], workers=0, progress=False)["adaptation"]
    choice: PostprocessingChoice = "largest_component" if largest else "chosen"
    own = evaluate_checkpoint(run, "adaptation", workers=0, postprocessing=choice, progress=False)
    assert own.protocol == table.protocol == "file"
    assert largest or table.summary.to_json() == own.summary.to_json()
    words = ["--prediction-pattern", "{case}_image_prediction.nii.gz", "--label-pattern", "{case}_label.nii.gz"]
    words += ["--labels", ",".join(f"{value}={name}" for name, value in IDS.items()), "--allow-missing"]
    assert score.main([str(out), str(run.parent / "raw"), *words, "--workers", "0", "--out", str(tmp_path / "s")]) == 0
    scored = json.loads((tmp_path / "s" / "summary.json").read_text(encoding="utf-8"))["volumes"]
    compared = 0
    for case in load_manifest(run.parent / "out" / "ct").split("test"):
        prediction = nib.load(out / case.sources["image"].replace(".nii.gz", "_prediction.nii.gz"))
        label: Any = nib.load(run.parent / "raw" / case.sources["label"])
        given = {
            entry["structure"]: entry for entry in scored[case.sources["image"].removesuffix("_image.nii.gz")]["scores"]
        }
        for found in own.scores[case.id]:
            p, t = (np.asarray(volume.dataobj) == IDS[found.structure] for volume in (prediction, label))
            assert (found.predicted_voxels, found.truth_voxels) == (p.sum(), t.sum())
            for measure in ("dice", "asd_mm", "hd95_mm"):
                value = getattr(found, measure)
                assert given[found.structure][measure] == (
                    None if math.isnan(value) else pytest.approx(value, rel=1e-6)
                )
            if p.any():
                compared += 1
                spacing = label.header.get_zooms()
                assert found.dice == pytest.approx(binary.dc(p, t))
                assert found.asd_mm == pytest.approx(binary.assd(p, t, spacing), rel=1e-6)
                assert found.hd95_mm == pytest.approx(binary.hd95(p, t, spacing), rel=1e-6)
    assert compared >= 3


def test_the_dataset_s_own_label_maps_can_be_scored_against(run: Path, tmp_path: Path) -> None:
    """They are on the grid of the files, and their names stand beside them."""
    out = tmp_path / "maps"
    assert (
        predict.main([str(run), *images(run), "--checkpoint", "adaptation", "--workers", "0", "--out", str(out)]) == 0
    )
    for path in out.glob("*_prediction.nii.gz"):
        path.rename(out / path.name.replace("train_", "").replace("_image_prediction", ""))
    maps = run.parent / "out" / "ct" / "label_maps" / "test"
    assert score.main([str(out), str(maps), "--workers", "0", "--out", str(tmp_path / "s")]) == 0
    scored = json.loads((tmp_path / "s" / "summary.json").read_text(encoding="utf-8"))
    own = evaluate_checkpoint(run, "adaptation", workers=0, progress=False).to_json()
    for name, entry in own["summary"]["structures"].items():
        assert scored["summary"]["structures"][name]["dice"]["mean"] == pytest.approx(entry["dice"]["mean"])


def test_prepared_slices_are_another_protocol_named_wherever_its_numbers_stand(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(run), "--checkpoint", "adaptation", "--workers", "0"]
    assert evaluate.main(words) == 0
    assert "label maps as predict writes them, on the grid of the image files" in capsys.readouterr().out
    assert evaluate.main([*words, "--protocol", "prepared"]) == 0
    assert "PREPARED SLICES" in capsys.readouterr().out
    about = json.loads(
        (run / "results" / "adaptation_test_prepared_protocol" / "summary.json").read_text(encoding="utf-8")
    )
    assert about["protocol"] == "prepared"
    assert "PREPARED SLICES" in (run / "results" / "adaptation_test_prepared_protocol" / "summary.md").read_text(
        encoding="utf-8"
    )
    own = json.loads((run / "results" / "adaptation_test" / "summary.json").read_text(encoding="utf-8"))
    assert own["protocol"] == "file"
    # The crop leaves out part of a structure, which only the grid of the files counts.
    truth = [
        sum(entry["truth_voxels"] for case in content["volumes"].values() for entry in case["scores"])
        for content in (own, about)
    ]
    assert truth[0] != truth[1]


def test_what_nobody_annotated_counts_nowhere(run: Path, tmp_path: Path) -> None:
    """An id of voxels without annotation, from the label file to the scores of evaluate and of score."""
    copied = tmp_path / "raw"
    for path in (run.parent / "raw").glob("ct_*"):
        image: Any = nib.load(path)
        array = np.asarray(image.dataobj).copy()
        if path.name.endswith("_label.nii.gz"):
            array[:7] = 9
        write(copied / path.name, array, image.affine)
    recipe = Recipe.from_json(load_manifest(run.parent / "out" / "ct").recipe)
    folder, manifest = made(copied, recipe=dataclasses.replace(recipe, hounsfield=False), not_annotated_labels="9")
    done = evaluate_checkpoint(run, "adaptation", data=folder, out=tmp_path / "e", workers=0, progress=False)
    whole = evaluate_checkpoint(run, "adaptation", workers=0, progress=False)
    out = written(run, tmp_path)
    for case in manifest.split("test"):
        label = np.asarray(nib.load(copied / case.sources["label"]).dataobj)
        prediction = nib.load(out / case.sources["image"].replace(".nii.gz", "_prediction.nii.gz"))
        for found in done.scores[case.id]:
            p = (np.asarray(prediction.dataobj) == IDS[found.structure]) & (label != 9)
            assert (found.predicted_voxels, found.truth_voxels) == (p.sum(), (label == IDS[found.structure]).sum())
    assert done.scores != whole.scores
    for path in out.glob("*_prediction.nii.gz"):
        path.rename(out / path.name.replace("train_", "").replace("_image_prediction", ""))
    maps = folder / "label_maps" / "test"
    assert score.main([str(out), str(maps), "--workers", "0", "--out", str(tmp_path / "s")]) == 0
    scored = json.loads((tmp_path / "s" / "summary.json").read_text(encoding="utf-8"))
    assert scored["ignore_label"] == 255
    for name, entry in done.to_json()["summary"]["structures"].items():
        expected = entry["dice"]["mean"]
        assert scored["summary"]["structures"][name]["dice"]["mean"] == (expected and pytest.approx(expected))


def test_a_label_map_that_was_changed_is_refused(run: Path, tmp_path: Path) -> None:
    dataset = run.parent / "out" / "ct"
    case = load_manifest(dataset).split("test")[0]
    assert case.label_map is not None
    path = dataset / case.label_map.file
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        with pytest.raises(DataError, match="its SHA-256 is not the manifest's"):
            evaluate_checkpoint(run, "adaptation", workers=0, progress=False)
        path.unlink()
        with pytest.raises(DataError, match="missing, though the manifest lists it"):
            evaluate_checkpoint(run, "adaptation", workers=0, progress=False)
    finally:
        path.write_bytes(content)


def test_a_dataset_without_label_maps_is_scored_on_its_slices_and_says_so(run: Path, tmp_path: Path) -> None:
    dataset = run.parent / "out" / "ct"
    manifest = load_manifest(dataset)
    older = tmp_path / "older"
    older.mkdir()
    for split in ("train", "val", "test"):
        (older / split).symlink_to(dataset / split)
    cases = tuple(dataclasses.replace(case, label_map=None) for case in manifest.cases)
    save_manifest(older, dataclasses.replace(manifest, cases=cases))
    done = evaluate_checkpoint(run, "adaptation", data=older, out=tmp_path / "out", workers=0, progress=False)
    assert done.protocol == "prepared"
    assert any("not on the grid of image files" in notice for notice in done.notices)
    with pytest.raises(DataError, match="prepare it again from volumes, or give --protocol prepared"):
        evaluate_checkpoint(run, "adaptation", data=older, workers=0, protocol="file", progress=False)
