"""The score command on label maps that no run made: pairs, grids, missing structures, medpy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from medpy.metric import binary

from mpscl_ray.data.volumes.nifti import read_label
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.evaluate import medpy_check
from mpscl_ray.evaluate.file_pairs import find_pairs
from mpscl_ray.evaluate.score import score
from mpscl_ray.evaluate.score_command import main
from mpscl_ray.evaluate.score_files import present_ids, resample_nearest
from tests.nifti_files import rotated
from tests.scored_maps import AFFINE, NAMES, SHAPE, hearts, rows_of, run, save, scored

# --------------------------------------------------------------------------------------------------------- numbers


def test_scores_are_medpys_on_rotated_and_anisotropic_grids(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = scored(cohort, *NAMES)
    assert sorted(path.name for path in (cohort / "out").iterdir()) == ["scores.csv", "summary.json", "summary.md"]
    assert len(rows) == 6
    for (case, structure), row in rows.items():
        p, t = (nib.load(cohort / side / f"{case}.nii.gz") for side in ("pred", "truth"))
        index = ("MYO", "LV").index(structure) + 1
        masks = np.asarray(p.dataobj) == index, np.asarray(t.dataobj) == index
        spacing = nib.affines.voxel_sizes(t.affine)
        assert float(row["dice"]) == pytest.approx(binary.dc(*masks), rel=1e-12)
        assert float(row["asd_mm"]) == pytest.approx(binary.assd(*masks, spacing), rel=1e-6)
        assert float(row["hd95_mm"]) == pytest.approx(binary.hd95(*masks, spacing), rel=1e-6)
        api = score(cohort / "pred" / f"{case}.nii.gz", cohort / "truth" / f"{case}.nii.gz")[str(index)]
        assert (float(row["dice"]), float(row["asd_mm"])) == (api.dice, api.asd_mm)
    summary = json.loads((cohort / "out" / "summary.json").read_text(encoding="utf-8"))
    mean = summary["summary"]["structures"]["LV"]["dice"]["mean"]
    assert mean == pytest.approx(np.mean([float(rows[f"c{n}", "LV"]["dice"]) for n in range(3)]))
    printed = capsys.readouterr().out
    assert "3 cases of" in printed
    assert f"{100 * mean:.1f} ±" in printed
    assert "HD95 mm" in printed
    assert "HD95 mm" in (cohort / "out" / "summary.md").read_text(encoding="utf-8")


def test_every_voxel_and_only_those_without_the_ignored_id_count(tmp_path: Path) -> None:
    """By hand: 100 of 200 voxels are found; of 150 that are left without the ignored ones, all 100 found are."""
    truth, prediction = np.zeros((2, 20, 20, 10), np.uint8)
    truth[:10, :2] = 1
    truth[15:18, 15:18, 2:5] = prediction[15:18, 15:18, 2:5] = 2
    prediction[:5, :2] = 1
    save(tmp_path / "pred/a.nii.gz", prediction)
    save(tmp_path / "truth/a.nii.gz", truth)
    rows = scored(tmp_path, *NAMES)
    assert float(rows["a", "MYO"]["dice"]) == pytest.approx(200 / 300)
    assert (float(rows["a", "LV"]["dice"]), float(rows["a", "LV"]["hd95_mm"])) == (1.0, 0.0)
    truth[7:10] = 9
    prediction[9, 9] = 1  # a false alarm where the label says nothing
    save(tmp_path / "pred/a.nii.gz", prediction)
    save(tmp_path / "truth/a.nii.gz", truth)
    rows = scored(tmp_path, *NAMES, "--ignore-label", "9")
    assert (rows["a", "MYO"]["predicted_voxels"], rows["a", "MYO"]["truth_voxels"]) == ("100", "140")
    assert float(rows["a", "MYO"]["dice"]) == pytest.approx(200 / 240)
    about = json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))
    assert about["volumes"]["a"]["ignored_voxels"] == 3 * 20 * 10
    assert "the id 9 in the label is counted nowhere: 600 voxels of 1 case" in "".join(about["notices"])
    assert scored(tmp_path, "--labels", "1=MYO,2=LV,9=void") == rows


def test_missed_invented_and_absent_structures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prediction, label = hearts(1)
    save(tmp_path / "pred/a.nii.gz", np.where(prediction == 2, 0, prediction).astype(np.uint8))
    save(tmp_path / "truth/a.nii.gz", np.where(label == 1, 0, label).astype(np.uint8))
    rows = scored(tmp_path, "--labels", "1=MYO,2=LV,3=RV", "--cross-check", "medpy")
    assert [rows["a", name]["case_kind"] for name in ("MYO", "LV", "RV")] == ["false_alarm", "missed", "absent"]
    assert [rows["a", name]["dice"] for name in ("MYO", "LV", "RV")] == ["0.0", "0.0", ""]
    diagonal = np.linalg.norm(np.array(SHAPE) * [1.25, 1.5, 4.0])
    assert float(rows["a", "LV"]["asd_mm_worst_case"]) == pytest.approx(diagonal)
    assert rows["a", "LV"]["asd_mm"] == ""
    printed = capsys.readouterr().out
    assert "(1m)" in printed
    assert "dice: 0.0e+00 in 2 comparisons" in printed
    assert "hd95_mm: nothing to compare" in printed


@pytest.mark.parametrize("worse", [False, True])
def test_the_cross_check_compares_each_structure(
    worse: bool, cohort: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if worse:  # another definition of ASD, as medpy 0.4 had it
        monkeypatch.setattr(binary, "assd", lambda p, t, s: (binary.asd(p, t, s) + binary.asd(t, p, s)) / 2)
    assert run(cohort, *NAMES, "--cross-check", "medpy", "--out", str(cohort / "out")) == (6 if worse else 0)
    printed = capsys.readouterr()
    assert "dice: 0.0e+00 in 6 comparisons" in printed.out
    check = json.loads((cohort / "out/summary.json").read_text(encoding="utf-8"))["cross_check"]
    assert {name: entry["compared"] for name, entry in check.items()} == dict.fromkeys(medpy_check.TOLERANCES, 6)
    for name, entry in check.items():
        assert (entry["difference"] <= medpy_check.TOLERANCES[name]) == (not worse or name != "asd_mm")
    assert ("asd_mm differ from medpy" in printed.err) == worse


# ---------------------------------------------------------------------------------------------------------- grids


def test_another_grid_is_refused_unless_resampling_is_asked_for(cohort: Path) -> None:
    prediction = read_label(cohort / "pred/c0.nii.gz")
    moved = prediction.affine + np.array([[0, 0, 0, 3.0]] + 3 * [[0] * 4])
    save(cohort / "pred/c0.nii.gz", prediction.array.astype(np.uint8), moved)
    save(cohort / "pred/c1.nii.gz", hearts(1)[0][1:], rotated(25.0))
    with pytest.raises(DataError) as refused:
        run(cohort, *NAMES, "--out", str(cohort / "out"))
    assert "2 of 3 pairs cannot be scored; nothing was written" in str(refused.value)
    assert "affine [-1.25 0 0 33; 0 1.5 0 -20; 0 0 4 10]" in str(refused.value)
    assert "affine [-1.25 0 0 30; 0 1.5 0 -20; 0 0 4 10]" in str(refused.value)
    assert "shape (21, 18, 12)" in str(refused.value)
    assert "shape (22, 18, 12)" in str(refused.value)
    assert not list((cohort / "out").iterdir())
    scored(cohort, *NAMES, "--resample", "nearest")
    about = json.loads((cohort / "out/summary.json").read_text(encoding="utf-8"))
    assert [about["volumes"][case]["resampled"] for case in ("c0", "c1", "c2")] == [True, True, False]
    assert "resampled to the grid of the label (nearest voxel): c0, c1" in about["notices"]


def test_noise_of_stored_numbers_is_the_same_grid(cohort: Path) -> None:
    noisy = AFFINE + np.random.default_rng(0).normal(0, 1e-5, (4, 4)) * [[1], [1], [1], [0]]
    before = scored(cohort, *NAMES)
    save(cohort / "pred/c0.nii.gz", hearts(0)[0], noisy)
    assert scored(cohort, *NAMES) == before
    # A hundredth of a voxel at the far corner is the limit.
    for factor, same in ((0.0003, True), (0.0008, False)):
        save(cohort / "pred/c0.nii.gz", hearts(0)[0], AFFINE + np.diag([factor * 1.25, 0, 0, 0]))
        if same:
            run(cohort, *NAMES)
        else:
            with pytest.raises(DataError, match="not on the grid"):
                run(cohort, *NAMES)


@pytest.mark.parametrize("factor", [2, 3])
def test_resampling_to_a_finer_grid_repeats_voxels(factor: int) -> None:
    labels, _ = hearts(3)
    fine = AFFINE @ np.diag([1 / factor, 1 / factor, 1 / factor, 1])
    fine[:3, 3] = (AFFINE @ [*[(1 / factor - 1) / 2] * 3, 1])[:3]
    shape = tuple(factor * n for n in SHAPE)
    repeated = labels.repeat(factor, 0).repeat(factor, 1).repeat(factor, 2)
    assert np.array_equal(resample_nearest(labels, AFFINE, shape, fine), repeated)
    assert np.array_equal(resample_nearest(repeated, fine, SHAPE, AFFINE), labels)


def test_resampling_turns_and_leaves_background_outside() -> None:
    labels, _ = hearts(4)
    turned, affine = labels.transpose(2, 0, 1)[:, ::-1, :], AFFINE[:, [2, 0, 1, 3]].copy()
    affine[:, 3] = AFFINE @ [SHAPE[0] - 1, 0, 0, 1]
    affine[:3, 1] *= -1
    assert np.array_equal(resample_nearest(turned, affine, SHAPE, AFFINE), labels)
    full = np.maximum(labels, 1)
    for step, there, here in ((5, slice(None, -5), slice(5, None)), (-5, slice(5, None), slice(None, -5))):
        shifted = AFFINE.copy()
        shifted[:3, 3] += step * AFFINE[:3, 0]
        expected = np.zeros_like(labels)
        expected[there] = full[here]
        assert np.array_equal(resample_nearest(full, AFFINE, SHAPE, shifted), expected)


# ---------------------------------------------------------------------------------------------------------- pairs


def pairs(folder: Path, predictions: str, labels: str, **options: Any) -> dict[str, tuple[str, str]]:
    for side, names in (("p", predictions), ("t", labels)):
        for name in names.split():
            path = folder / side / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    found = find_pairs(folder / "p", folder / "t", **options)
    return {
        pair.case: (
            pair.prediction.relative_to(folder / "p").as_posix(),
            pair.label.relative_to(folder / "t").as_posix(),
        )
        for pair in found.pairs
    }


@pytest.mark.parametrize(
    ("predictions", "labels", "expected"),
    [
        ("a.nii.gz b.nii dataset.json", "a.nii b.nii.gz notes.txt", {"a": ("a.nii.gz", "a.nii")}),
        ("a_pred.nii.gz", "a_gt.nii.gz", {"a": ("a_pred.nii.gz", "a_gt.nii.gz")}),
        ("a_image_prediction.nii.gz", "a_label.nii.gz", {"a": ("a_image_prediction.nii.gz", "a_label.nii.gz")}),
        ("h_1_0000_prediction.nii.gz", "h_1.nii.gz", {"h_1": ("h_1_0000_prediction.nii.gz", "h_1.nii.gz")}),
        ("a_Seg.nii.gz", "a.nii.gz", {"a": ("a_Seg.nii.gz", "a.nii.gz")}),
        ("a_seg.nii a.nii", "a_seg.nii a.nii", {"a": ("a.nii", "a.nii"), "a_seg": ("a_seg.nii", "a_seg.nii")}),
        ("a_0000.nii.gz", "a_0000.nii.gz", {"a_0000": ("a_0000.nii.gz", "a_0000.nii.gz")}),
        ("case_1.nii case_11.nii", "case_1.nii case_11.nii", {"case_1": ("case_1.nii", "case_1.nii")}),
    ],
)
def test_pairs_by_name(predictions: str, labels: str, expected: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    found = pairs(tmp_path, predictions, labels)
    assert found.items() >= expected.items()
    assert len(found) == sum("nii" in name for name in predictions.split())


def test_probability_maps_and_pictures_of_predict_are_no_predictions(tmp_path: Path) -> None:
    written = "a_prediction.nii.gz a_probability_LV.nii.gz a_preview.png volumes.json slicer_labels.ctbl"
    assert pairs(tmp_path / "1", written, "a.nii.gz") == {"a": ("a_prediction.nii.gz", "a.nii.gz")}
    with pytest.raises(DataError, match=r"predictions without a label, 1: b_probability_LV.nii.gz"):
        pairs(tmp_path / "2", "a_prediction.nii.gz b_probability_LV.nii.gz", "a.nii.gz")


def test_pairs_by_pattern(tmp_path: Path) -> None:
    files = "x/seg.nii.gz x/seg.png y/seg.nii.gz", "truth-x.nii.gz truth-y.nii.gz image-x.nii.gz"
    patterns = {"prediction_pattern": "{case}/s*", "label_pattern": "truth-{case}.nii.gz"}
    assert pairs(tmp_path, *files, **patterns) == {
        case: (f"{case}/seg.nii.gz", f"truth-{case}.nii.gz") for case in ("x", "y")
    }
    with pytest.raises(DataError, match=r"below it: x/seg.nii.gz, y/seg.nii.gz; give --prediction-pattern"):
        find_pairs(tmp_path / "p", tmp_path / "t")
    with pytest.raises(DataError, match=r"none of 3 files matches --prediction-pattern '\{case\}.nii'"):
        find_pairs(tmp_path / "p", tmp_path / "t", "{case}.nii")
    with pytest.raises(ConfigError, match=r"--label-pattern 'a': must contain \{case\}"):
        find_pairs(tmp_path / "p", tmp_path / "t", "{case}/seg.nii.gz", "a")


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ("a.nii b.nii", "a.nii c.nii", "predictions without a label, 1: b.nii; labels without a prediction, 1: c.nii"),
        ("a.nii", "b.nii", "labels without a prediction, 1: b.nii; correct the names"),
        ("a.nii", "a_seg.nii a_gt.nii", "a.nii belongs to .*a_gt.nii and .*a_seg.nii alike; give --label-pattern"),
        ("a.nii a_pred.nii", "a.nii", "a.nii belongs to .*a.nii and .*a_pred.nii alike; give --prediction-pattern"),
        ("a.nii a.nii.gz", "a.nii", "are both of the case a"),
        ("a.nii", "readme.txt", "or .mha among 1 file$"),
        ("a.nii", "a.dcm", "convert DICOM to NIfTI first"),
        ("a_image.nii", "a_image.nii a_label.nii", "labels without a prediction, 1: a_label.nii"),
    ],
)
def test_what_has_no_clear_pair_is_refused(predictions: str, labels: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        pairs(tmp_path, predictions, labels)


def test_a_folder_is_not_scored_against_itself(cohort: Path) -> None:
    with pytest.raises(DataError, match=r"c0.nii.gz is prediction and label at once"):
        main([str(cohort / "pred"), str(cohort / "pred"), *NAMES])


def test_extra_files_are_left_out_only_when_asked(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(cohort / "pred/more.nii.gz", hearts(5)[0])
    (cohort / "truth/c2.nii.gz").unlink()
    with pytest.raises(DataError, match=r"predictions without a label, 2: c2.nii.gz, more.nii.gz; .*--allow-missing"):
        run(cohort, *NAMES)
    assert {case for case, _ in scored(cohort, *NAMES, "--allow-missing")} == {"c0", "c1"}
    assert "note: predictions without a label, left out: c2.nii.gz, more.nii.gz" in capsys.readouterr().out
    about = json.loads((cohort / "out/summary.json").read_text(encoding="utf-8"))
    assert [Path(path).name for path in about["predictions_without_label"]] == ["c2.nii.gz", "more.nii.gz"]


def test_warnings_on_labels_are_one_line_for_each_kind(cohort: Path) -> None:
    for side, array in zip(("pred", "truth"), hearts(2), strict=True):
        save(cohort / side / "c2.nii.gz", array, rotated(40.0))
    scored(cohort, *NAMES)
    about = json.loads((cohort / "out/summary.json").read_text(encoding="utf-8"))
    (notice,) = about["notices"]
    assert notice.startswith("label of c1, and 1 more likewise: the volume is oblique: its axes are up to 25 degrees")
    assert "up to 40 degrees" in about["volumes"]["c2"]["notices"][0]


def test_two_files(cohort: Path) -> None:
    files = [str(cohort / side / "c1.nii.gz") for side in ("pred", "truth")]
    assert main([*files, *NAMES, "--out", str(cohort / "one")]) == 0
    both = scored(cohort, *NAMES)
    assert rows_of(cohort / "one") == {key: row for key, row in both.items() if key[0] == "c1"}


@pytest.mark.parametrize("ids", [[0, 3, 205], [-5, 0, 7], [0, 2**30]])
def test_present_ids(ids: list[int]) -> None:
    array = np.random.default_rng(0).choice(np.array(ids, np.int32), (9, 8, 7))
    assert present_ids(np.asfortranarray(array)) == set(ids)


def test_a_damaged_file_is_named_and_the_others_are_not_written(cohort: Path) -> None:
    path = cohort / "pred/c1.nii.gz"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"1 of 3 pairs cannot be scored(.|\n)*c1.nii.gz"):
        run(cohort, *NAMES)
    save(path, hearts(1)[0] * np.float32(0.5), rotated(25.0))
    with pytest.raises(DataError, match="perhaps the map was interpolated"):
        run(cohort, *NAMES)


def test_the_command_and_the_function_share_a_name() -> None:
    program = "import mpscl_ray, importlib\ntry: importlib.import_module('mpscl_ray.score')\nexcept ImportError: pass\n"
    program += "from mpscl_ray import score\nassert callable(score) and callable(mpscl_ray.score)"
    subprocess.run([sys.executable, "-c", program], check=True)
