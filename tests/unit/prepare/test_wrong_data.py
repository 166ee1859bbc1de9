"""Data that look right and are not: each kind is refused with the option that decides, or read safely and said."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from mpscl_ray.data.parquet_reader import read_case
from mpscl_ray.data.volumes.intensities import few_values, kind_of, other_modality
from mpscl_ray.data.volumes.recipe import Recipe
from mpscl_ray.errors import ConfigError, Interrupted
from mpscl_ray.prepare.command import main
from tests.heart_scans import FOLDER, MM, SHAPE, change, cohort, prepared, problems, scan
from tests.raw_volumes import write

# ------------------------------------------------------------------------------------------------------- geometry


def test_millimetres_that_a_header_has_in_two_ways(tmp_path: Path) -> None:
    """sform of 1 mm, qform and pixdim of 1.32 x 1.32 x 10 mm: one of them makes volumes wrong by 17."""
    folder = cohort(tmp_path / "in")
    for path in folder.iterdir():
        volume = nib.load(path)
        other = nib.Nifti1Image(np.asanyarray(volume.dataobj), None)
        other.header.set_qform(np.diag([-1.32, -1.32, 10, 1]), 1)
        other.header.set_sform(np.diag([-1.0, -1, 1, 1]), 1)
        other.header["pixdim"][1:4] = 1.32, 1.32, 10
        nib.save(other, path)
    said = problems(folder)
    assert "1 x 1 x 1 mm by its sform and of 1.32 x 1.32 x 10 mm by its qform" in said
    assert "--geometry sform or --geometry qform" in said
    for geometry, sizes in (("qform", (1.32, 1.32, 10)), ("sform", (1, 1, 1))):
        _, manifest = prepared(folder, geometry=geometry, recipe=Recipe(crop=(12, 12)))
        assert manifest.cases[0].spacing_mm is not None
        assert sorted(manifest.cases[0].spacing_mm) == pytest.approx(sorted(sizes))
        assert f"--geometry {geometry}" in manifest.command


def test_a_label_map_in_another_orientation_gives_the_same_data(tmp_path: Path) -> None:
    folder = cohort(tmp_path / "in")
    before, manifest = prepared(folder)
    expected = {case.id: read_case(before, case)["label"] for case in manifest.cases}
    volume = nib.load(folder / "c2_label.nii.gz")
    nib.save(volume.as_reoriented(np.array([[1, -1], [0, 1], [2, -1]])), folder / "c2_label.nii.gz")
    after, manifest = prepared(folder)
    for case in manifest.cases:
        np.testing.assert_array_equal(read_case(after, case)["label"], expected[case.id])
    assert any("c2" in notice and "turned to the image" in notice for notice in manifest.notices)


@pytest.mark.parametrize(("plane", "said"), [("coronal", True), ("sagittal", True), ("axial", False)])
def test_slices_across_thick_voxels_are_said(tmp_path: Path, plane: str, said: bool) -> None:
    folder = cohort(tmp_path / "in", shape=(30, 30, 9), mm=(1.4, 1.4, 10.0))
    _, manifest = prepared(folder, recipe=Recipe(slice_axis=plane, crop=(24, 24)))
    text = "\n".join(manifest.notices)
    assert ("10 mm thick" in text and "--slice-axis axial" in text) == said
    assert ("most of a slice is padding: 9 x 24 of 24 x 24" in text) == said


def test_a_single_picture_and_sizes_in_cm_are_said(tmp_path: Path) -> None:
    folder = cohort(tmp_path / "in")
    for kind in ("image", "label"):
        change(folder / f"c2_{kind}.nii.gz", lambda array: array[:, :, 5:6])
        path = folder / f"c3_{kind}.nii.gz"
        array, affine = np.asarray(nib.load(path).dataobj), np.diag([0.2, 0.2, 0.4, 1.0])
        write(path, array, affine)
    text = "\n".join(prepared(folder)[1].notices)
    assert "c2: the volume has one slice (28 x 26 x 1 voxels)" in text
    assert "c3: by its header the whole volume is at most 5.6 mm large, its voxels 0.2 x 0.2 x 0.4 mm" in text


# ---------------------------------------------------------------------------------------------------- intensities


@pytest.mark.parametrize("padding", [-1500, -2000, -3024, -32768])
def test_padding_of_ct_changes_nothing_inside(tmp_path: Path, padding: int) -> None:
    folder = cohort(tmp_path / "in", kind="ct")
    recipe = Recipe(slice_axis="axial", crop=None)
    before, manifest = prepared(folder, "ct", modality="ct", recipe=recipe)
    plain = [read_case(before, case)["image"] for case in manifest.cases]
    x, y = np.ogrid[: SHAPE[0], : SHAPE[1]]
    outside = (x - 13.5) ** 2 + (y - 12.5) ** 2 > 13.4**2
    for path in folder.glob("*_image*"):
        change(path, lambda image: np.where(outside[:, :, None], np.int16(padding), image))
    after, manifest = prepared(folder, "ct", modality="ct", recipe=recipe)
    for old, case in zip(plain, manifest.cases, strict=True):
        new = read_case(after, case)["image"]
        assert np.abs(np.asarray(old, float) - np.asarray(new, float))[:, 8:18, 8:18].max() < 0.05
    assert any(f"down to {padding}" in notice and "padding" in notice for notice in manifest.notices)
    assert Recipe.from_json(manifest.recipe).hounsfield


def test_an_image_of_the_other_modality_is_refused(tmp_path: Path) -> None:
    folder = cohort(tmp_path / "mr")
    assert "no Hounsfield units: an MR image" in problems(folder, modality="ct")
    _, manifest = prepared(folder, "ct", modality="ct", any_modality=True)
    assert not Recipe.from_json(manifest.recipe).hounsfield
    folder = cohort(tmp_path / "ct", kind="ct")
    assert "are Hounsfield units: a CT image" in problems(folder)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_a_ct_stored_with_an_offset_is_neither(dtype: type) -> None:
    image = (scan(0, "ct", (60, 60, 20))[0] + 1024).astype(np.float32)
    assert "offset of -1024 was lost" in str(other_modality(image, "ct"))
    assert "offset of 1024" in str(other_modality(image, "mr"))
    padded = image.copy()
    padded[:4] = -2000 + 1024
    assert other_modality(padded, "ct") is not None
    for kind in ("ct", "mr"):
        assert other_modality(scan(1, kind)[0].astype(np.float32), kind) is None
        scaled = scan(1, kind)[0].astype(np.float32)
        assert other_modality((scaled - scaled.mean()) / scaled.std(), kind) is None


def test_modalities_by_their_names() -> None:
    assert {kind_of(name) for name in ("ct", "CTA", "cardiac_ct", "ccta")} == {"ct"}
    assert {kind_of(name) for name in ("mr", "MRI", "cinemri", "lge", "t1_weighted", "mr_t2")} == {"mr"}
    assert {kind_of(name) for name in ("us", "act", "vector", "xray")} == {None}


def test_a_label_map_is_no_image(tmp_path: Path) -> None:
    folder = cohort(tmp_path / "in")
    (folder / "c1_label.nii.gz").replace(folder / "c1_image.nii.gz")
    write(folder / "c1_label.nii.gz", scan(1)[1], np.diag([*MM, 1.0]))
    assert "c1_image.nii.gz has only 3 different values, 0, 1, 2, as a label map" in problems(folder)
    assert few_values(scan(0)[0].astype(np.float32)) is None


def test_nan_by_policy(tmp_path: Path) -> None:
    folder = cohort(tmp_path / "in")

    def with_nan(image: NDArray[Any]) -> NDArray[Any]:
        image = image.astype(np.float32)
        image[3, 3, 3] = np.nan
        return image

    change(folder / "c1_image.nii.gz", with_nan)
    assert "--nan-policy lowest or zero" in problems(folder)
    _, manifest = prepared(folder, nan_policy="lowest")
    assert any("NaN or infinite intensities were set to" in notice for notice in manifest.notices)


# --------------------------------------------------------------------------------------------------------- labels


def test_a_mask_for_each_structure(tmp_path: Path) -> None:
    folder = cohort(tmp_path / "whole")
    expected, manifest = prepared(folder, out=tmp_path / "expected")
    split = tmp_path / "in"
    for number in range(5):
        intensities, label = scan(number)
        affine = np.diag([*MM, 1.0])
        write(split / f"c{number}/mr.nii.gz", intensities, affine)
        for raw, name in ((1, "myocardium"), (2, "ventricle_left")):
            write(split / f"c{number}/segmentations/heart_{name}.nii.gz", (label == raw).astype(np.uint8), affine)
        write(split / f"c{number}/segmentations/liver.nii.gz", np.zeros_like(label), affine)
    masks = {
        "labels": "heart_myocardium=MYO,heart_ventricle_left=LV",
        "image_pattern": "{case}/mr.nii.gz",
        "label_pattern": "{case}/segmentations/*.nii.gz",
    }
    found, manifest = prepared(split, **masks)
    assert manifest.classes == ("background", "MYO", "LV")
    for case in manifest.cases:
        np.testing.assert_array_equal(read_case(found, case)["label"], read_case(expected, case)["label"])
    both = (scan(0)[1] > 0).astype(np.uint8)
    write(split / "c0/segmentations/heart_ventricle_left.nii.gz", both, np.diag([*MM, 1.0]))
    _, manifest = prepared(split, **masks)
    assert any("heart_ventricle_left.nii.gz overlaps the masks before it" in notice for notice in manifest.notices)
    write(split / "c1/segmentations/heart_myocardium.nii.gz", scan(1)[1], np.diag([*MM, 1.0]))
    (split / "c2/segmentations/heart_myocardium.nii.gz").unlink()
    said = problems(split, **masks)
    assert "c1/segmentations/heart_myocardium.nii.gz has the values 0, 1, 2, expected a mask" in said
    assert "case c2 has no mask heart_myocardium" in said
    with pytest.raises(ConfigError, match="needs a \\* for their names"):
        prepared(split, **{**masks, "label_pattern": "{case}/segmentations/heart_myocardium.nii.gz"})


def test_a_structure_without_a_score_is_said(tmp_path: Path) -> None:
    folder = cohort(tmp_path / "in")
    change(folder / "c4_label.nii.gz", lambda label: np.where(label == 2, 0, label).astype(np.uint8))
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["c0", "c1"], "val": ["c2"], "test": ["c4"]}))
    _, manifest = prepared(folder, split=str(split))
    assert "no test case shows the class LV, so it has no score there" in manifest.notices


def test_time_points_of_a_cine_scan(tmp_path: Path) -> None:
    """Frames 0 and 2 of 4 are labelled, as ED and ES are; the frames of a patient stay together."""
    folder, affine = tmp_path / "in", np.diag([*MM, 1.0])
    for number in range(4):
        pairs = [scan(10 * number + time) for time in range(4)]
        labels = [pair[1] * (time in (0, 2)) for time, pair in enumerate(pairs)]
        write(folder / f"c{number}_image.nii.gz", np.stack([pair[0] for pair in pairs], -1), affine)
        write(folder / f"c{number}_label.nii.gz", np.stack(labels, -1).astype(np.uint8), affine)
    assert "--frames labelled" in problems(folder)
    found, manifest = prepared(folder, frames="labelled")
    assert [case.id for case in manifest.cases if case.patient == "c1"] == ["c1_t00", "c1_t02"]
    assert len({(case.patient, case.split) for case in manifest.cases}) == 4
    single = tmp_path / "single"
    for number in range(4):
        intensities, label = scan(10 * number + 2)
        write(single / f"c{number}_image.nii.gz", intensities, affine)
        write(single / f"c{number}_label.nii.gz", label, affine)
    expected, one = prepared(single, range="-2,3", out=tmp_path / "one")
    found, manifest = prepared(folder, frames="2", range="-2,3")
    for case, other in zip(manifest.cases, one.cases, strict=True):
        for kind in ("image", "label"):
            np.testing.assert_array_equal(read_case(found, case)[kind], read_case(expected, other)[kind])
    assert "has 4 time points, 0 to 3, and no time point 4" in problems(folder, frames="4")
    change(folder / "c0_label.nii.gz", lambda label: label[..., 0])
    assert "no label map with as many" in problems(folder, frames="labelled")
    with pytest.raises(ConfigError, match="expected labelled, all, or numbers from 0"):
        prepared(folder, frames="ED")


# ------------------------------------------------------------------------------------------------------- stopping


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_leaves_nothing_behind(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cohort(tmp_path / "in")
    number = getattr(signal, name)

    def stopped(*arguments: object) -> None:
        assert list((tmp_path / "out").glob(".mr.unfinished*"))
        os.kill(os.getpid(), number)

    monkeypatch.setattr("mpscl_ray.prepare.run._stage", stopped)
    before = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    signal.signal(number, before)  # nohup has the shell ignore SIGHUP, and the command keeps it so
    words = ["--layout", "folder", "--modality", "mr", "--labels", "1=MYO,2=LV", "--workers", "0"]
    words += ["--image-pattern", FOLDER["image_pattern"], "--label-pattern", FOLDER["label_pattern"]]
    with pytest.raises(Interrupted, match=f"stopped by {name}"):
        main([str(folder), "--out", str(tmp_path / "out"), *words])
    assert not list((tmp_path / "out").iterdir())
    assert signal.getsignal(number) == before


# ------------------------------------------------------------------------------------------------ a case among others


@pytest.mark.parametrize("value", [-32768, 32767])
def test_padding_of_mr_is_refused(tmp_path: Path, value: int) -> None:
    folder = cohort(tmp_path / "in")

    def padded(image: NDArray[Any]) -> NDArray[Any]:
        image[:2] = value
        return image

    change(folder / "c1_image.nii.gz", padded)
    assert f"of the voxels have the intensity {value}, far from all others" in problems(folder)


def test_a_case_with_other_millimetres_is_said(tmp_path: Path) -> None:
    folder = cohort(tmp_path / "in")
    for kind in ("image", "label"):
        change(folder / f"c3_{kind}.nii.gz", lambda array: array, np.diag([0.5, 0.5, 1.0, 1.0]))
    _, manifest = prepared(folder)
    assert [notice for notice in manifest.notices if "mm wide" in notice] == [
        next(notice for notice in manifest.notices if notice.startswith("the structures of c3 are"))
    ]
