"""Which cases are of one patient or one scan, and in which split they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.prepare.copies import same_scans, sketch
from mpscl_ray.prepare.patients import group_patients, patient_in
from mpscl_ray.prepare.source_cases import SourceCase
from tests.heart_scans import cohort, prepared, problems, scan

# ------------------------------------------------------------------------------------------------------- patients


@pytest.mark.parametrize(
    ("case", "patient"),
    [
        ("patient001_frame01", "patient001"),
        ("patient001_ED", "patient001"),
        ("ED-patient001", "patient001"),
        ("patient7_C0", "patient7"),
        ("A0S9V9_sa_ES", "A0S9V9"),
        ("sub-01_ses-02_run-1_T1w", "sub-01"),
        ("p12_visit_2", "p12"),
        ("p12_20210304", "p12"),
        ("p12_2021-03-04", "p12"),
        ("04.03.2021_p12", "p12"),
        ("2021-03-04", "2021-03-04"),
        ("p_13-14-2021", "p_13-14-2021"),
        ("p12_left", "p12"),
        ("smith_ED", "smith"),
        ("scan_1", "scan_1"),
        ("heart_scan_1", "heart_scan_1"),
        ("case_0003", "case_0003"),
        ("BRATS_001", "BRATS_001"),
        ("c1", "c1"),
    ],
)
def test_the_patient_in_a_name(case: str, patient: str) -> None:
    assert patient_in(case) == patient


def grouped(*names: str, pattern: str | None = None) -> tuple[list[str], str, list[str]]:
    wrong: list[str] = []
    found = group_patients([SourceCase(name, "mr", name, "nifti", ()) for name in names], pattern, wrong)
    return [case.patient for case in found.cases], found.ambiguous, wrong


def test_a_pattern_decides_which_part_is_the_patient() -> None:
    assert grouped("p1_ED", "p1_ES", pattern=".+")[0] == ["p1_ED", "p1_ES"]
    assert grouped("a7_x", "b7_y", pattern=r"a(\d+)|b(\d+)")[0] == ["7", "7"]
    assert grouped("a7", "b", pattern=r"\d+")[2] == [r"case b: --patient-pattern '\\d+' does not match it"]


@pytest.mark.parametrize(
    "names", [("p01_a", "p01_b", "p02_a", "p02_b"), ("case12a", "case12b", "case13a"), ("p1-1", "p1-2", "p2-1", "p3-1")]
)
def test_names_that_may_be_of_one_patient_are_not_split_at_random(tmp_path: Path, names: tuple[str, ...]) -> None:
    folder = cohort(tmp_path / "in", names)
    said = problems(folder)
    assert "may be of one patient" in said
    assert "--patient-pattern" in said
    assert "may be of one patient" not in "\n".join(prepared(folder, patient_pattern=".+")[1].notices)
    _, manifest = prepared(folder, split="1,0,0")
    assert any("may be of one patient" in notice for notice in manifest.notices)


def two(*forms: str) -> tuple[str, ...]:
    return tuple(form.format(number) for number in range(1, 6) for form in forms)


@pytest.mark.parametrize(
    ("names", "example"),
    [
        (two("k{}_190301", "k{}_200405"), "^([^_]+)"),
        (two("P{}ED", "P{}ES"), r"^(\D*\d+)"),
        (two("Pat{}Visit1", "Pat{}Visit2"), r"^(\D*\d+)"),
        (two("pat_00{}_1", "pat_00{}_2"), r"^(\D*\d+)"),
        (two("1_P00{}", "2_P00{}"), r"([^\W_]+)$"),
        (two("ED00{}", "ES00{}"), r"(\d+)$"),
        (two("p{}", "p0{}"), r"0*(\d+)"),
        (tuple(f"{name}_{end}" for name in ("meier", "huber", "wolf") for end in "ab"), "^([^_]+)"),
        (tuple(f"{name}_{day}-03-2019" for name in ("meier", "huber", "wolf") for day in (1, 2)), "^([^_]+)"),
        (("anna1", "anna2", "bob1", "cleo1"), r"^(\D+)"),
        (("h0", "h1", "h2", "h3", "h0_copy", "h1_aug"), "^([^_]+)"),
        (two("p{} (1)", "p{} (2)"), r"^(\D*\d+)"),
        (two("p{}_35%", "p{}_75%"), "^([^_]+)"),
    ],
)
def test_the_example_of_a_pattern_fits_the_names(names: tuple[str, ...], example: str) -> None:
    _, said, _ = grouped(*names)
    assert f"--patient-pattern '{example}'," in said
    assert grouped(*names, pattern=example)[1:] == ("", [])


def test_cases_in_the_folder_of_a_patient_are_not_split_at_random(tmp_path: Path) -> None:
    options = {"image_pattern": "**/{case}_image.nii.gz", "label_pattern": "**/{case}_label.nii.gz"}
    names = tuple(f"{{}}{patient}/{case}{patient}" for patient in (1, 2, 3) for case in "xy")
    folder = cohort(tmp_path / "in", tuple(name.format("pat") for name in names))
    assert "may be of one patient by their names, 3 groups: x1, y1; x2, y2" in problems(folder, **options)
    sites = cohort(tmp_path / "sites", tuple(name.format("site") for name in names))
    assert len(prepared(sites, **options)[1].cases) == 6


def test_a_repeated_name_among_many_is_said() -> None:
    for many, more in ((12, "case003_b"), (10, "case003-2")):
        names = [*(f"case{number:03d}" for number in range(many)), more]
        found = group_patients([SourceCase(name, "mr", name, "nifti", ()) for name in names], None, [])
        assert found.ambiguous == ""
        assert [f"1 group: case003, {more}; " in notice for notice in found.notices] == [True]


def test_other_names_with_the_stem_of_a_patient_are_its_own() -> None:
    names = [f"A1D0{patient}_{end}" for patient in (1, 2) for end in ("ED", "ES", "MID")]
    assert grouped(*names) == (["A1D01"] * 3 + ["A1D02"] * 3, "", [])
    assert grouped("scan_ED", "scan_ES", "scan_7")[0] == ["scan", "scan", "scan_7"]


def test_what_may_be_one_patient_in_two_splits_of_a_file_is_named(tmp_path: Path) -> None:
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["k1a", "k1b", "k2a"], "val": ["k2b"], "test": ["k3a", "k3b"]}))
    names = tuple(f"k{patient}{end}" for patient in (1, 2, 3) for end in "ab")
    _, manifest = prepared(cohort(tmp_path / "in", names), split=str(split))
    said = [notice for notice in manifest.notices if "in several splits" in notice]
    assert [notice.partition(": ")[2] for notice in said] == ["k2a (train), k2b (val)"]


@pytest.mark.parametrize(
    "names",
    [
        tuple(f"c{i}" for i in range(9)),
        ("la_003", "la_004"),
        ("1a2b", "77x", "8y"),
        tuple(f"case{i:02d}" for i in range(1, 41)),
        tuple(f"patient{i:03d}" for i in range(1, 31)),
        tuple(f"ct_train_{i}" for i in range(1001, 1021)),
        tuple(f"{i}" for i in range(1, 30)),
        tuple(f"site{site}_{i:03d}" for site in (1, 2) for i in range(40)),
        ("c0", "c1", "c2", "c3", "anna", "bob", "cleo"),
        ("john_smith", "john_doe", "mary_jones", "peter_x", "eva_y"),
        ("2019-03-01", "2019-03-02", "2019-04-01"),
    ],
)
def test_names_of_different_patients_are_left_alone(names: tuple[str, ...]) -> None:
    assert grouped(*names) == (list(names), "", [])


def test_frames_of_a_patient_are_in_one_split(tmp_path: Path) -> None:
    names = tuple(f"patient{patient:03d}_frame{frame:02d}" for patient in range(1, 6) for frame in (1, 12))
    _, manifest = prepared(cohort(tmp_path / "in", names))
    splits: dict[str, set[str]] = {}
    for case in manifest.cases:
        assert case.patient == case.id.partition("_")[0]
        splits.setdefault(case.patient, set()).add(case.split)
    assert all(len(found) == 1 for found in splits.values())
    assert sum("10 cases are taken for 5 patients" in notice for notice in manifest.notices) == 1


def test_patients_by_the_folder(tmp_path: Path) -> None:
    names = tuple(f"{patient}/t{time}/x" for patient in ("anna", "bob", "cleo") for time in (1, 2))
    folder = cohort(tmp_path / "in", names, image="{}/image.nii.gz", label="{}/label.nii.gz")
    patterns = {
        "image_pattern": "{patient}/{case}/**/image.nii.gz",
        "label_pattern": "{patient}/{case}/**/label.nii.gz",
    }
    _, manifest = prepared(folder, **patterns)
    assert {case.id: case.patient for case in manifest.cases}["bob_t2"] == "bob"
    assert len({(case.patient, case.split) for case in manifest.cases}) == 3


def test_one_scan_under_two_names(tmp_path: Path) -> None:
    folder = cohort(tmp_path / "in")
    for kind in ("image", "label"):
        volume = nib.load(folder / f"c0_{kind}.nii.gz")
        nib.save(volume.as_reoriented(np.array([[2, 1], [0, -1], [1, 1]])), folder / f"c9_{kind}.nii.gz")
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["c0", "c1", "c2"], "test": ["c3", "c9"]}))
    assert "the same image under several names: c0 (train), c9 (test)" in problems(folder, split=str(split)).replace(
        "c9 (test), c0 (train)", "c0 (train), c9 (test)"
    )


def test_one_label_map_of_two_images(tmp_path: Path) -> None:
    folder = cohort(tmp_path / "in")
    shutil.copy(folder / "c0_label.nii.gz", folder / "c2_label.nii.gz")
    _, manifest = prepared(folder)
    (notice,) = [notice for notice in manifest.notices if "the same label map" in notice]
    assert {"c0", "c2"} == set(notice.split(" have ")[0].split(", "))


def test_sketches_know_a_scan_and_no_other() -> None:
    one, other = (scan(seed, shape=(60, 50, 30))[0].astype(np.float32) for seed in (1, 2))
    retouched = one.copy()
    retouched[30, 25, 15] += 100
    copies = [np.asfortranarray(one), one[::-1].transpose(2, 0, 1), retouched, one[8:, :, 3:]]
    copies += [one * 0.5 + 7, one + 1, one.max() - one, ((one - one.mean()) / one.std())[::-1].transpose(2, 0, 1)]
    sketches = [sketch(one), *(sketch(np.asarray(copy, np.float32)) for copy in copies), sketch(other)]
    assert same_scans(sketches) == [0] * 9 + [9]
    assert same_scans([sketch(other), *sketches[1:5], sketch(one)]) == [0, 1, 1, 1, 1, 1]
    assert sketch(np.zeros((30, 30, 30), np.float32)) == ()
    assert same_scans([(), ()]) == [0, 1]


# --------------------------------------------------------------------------------------------------------- splits


def test_folds_of_nnunet(tmp_path: Path) -> None:
    folder = cohort(tmp_path / "in")
    path = tmp_path / "splits_final.json"
    folds = [{"train": ["c0", "c1", "c2"], "val": ["c3", "c4"]}, {"train": ["c2", "c3", "c4"], "val": ["c0", "c1"]}]
    path.write_text(json.dumps(folds))
    for fold, options in ((0, {}), (1, {"fold": 1})):
        _, manifest = prepared(folder, split=str(path), **options)
        assert [case.id for case in manifest.split("train")] == folds[fold]["train"]
        assert [case.id for case in manifest.split("val")] == folds[fold]["val"]
        assert any("the first of 2 folds" in notice for notice in manifest.notices) == (fold == 0)
    with pytest.raises((ConfigError, DataError), match="has the folds 0 to 1"):
        prepared(folder, split=str(path), fold=2)
    with pytest.raises((ConfigError, DataError), match="--fold 1 needs --split FILE"):
        prepared(folder, fold=1)
