"""Finding and pairing files by name: every layout, and unusual folders. No file is opened here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.prepare.label_table import MMWHS, LabelTable
from mpscl_ray.prepare.layouts import scan
from mpscl_ray.prepare.source_cases import LayoutOptions
from tests.listings import ids, pairs, touch

FOLDER = LayoutOptions(modality="mr", image_pattern="{case}_C0.nii.gz", label_pattern="{case}_C0_manual.nii.gz")


# -------------------------------------------------------------------------------------------------------- MM-WHS


def test_mmwhs_in_one_folder_or_many(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "ct_train/ct_train_1001_image.nii.gz",
        "ct_train/ct_train_1001_label.nii.gz",
        "mr_train_1002_label.nii.gz",
        "mr_train_1002_image.nii.gz",
        "ct_test/ct_test_2001_image.nii.gz",
        "README.txt",
    )
    found = scan(tmp_path, "mmwhs", LayoutOptions())
    assert pairs(found, tmp_path) == {
        "ct/ct_1001": ("ct_train/ct_train_1001_image.nii.gz", "ct_train/ct_train_1001_label.nii.gz"),
        "mr/mr_1002": ("mr_train_1002_image.nii.gz", "mr_train_1002_label.nii.gz"),
    }
    assert found.table is MMWHS
    assert found.problems == ()
    assert found.notices[0].startswith("volumes of the challenge's own test set")
    assert found.notices[1] == "files that are not part of the layout, 1: README.txt"
    assert ids(scan(tmp_path, "mmwhs", LayoutOptions(modality="ct"))) == ["ct_1001"]


def test_mmwhs_patients_of_ct_and_mr_are_different_people(tmp_path: Path) -> None:
    touch(tmp_path, "ct_train_1001_image.nii.gz", "mr_train_1001_image.nii.gz")
    assert [case.patient for case in scan(tmp_path, "mmwhs", LayoutOptions()).cases] == ["ct_1001", "mr_1001"]


def test_a_label_without_image_and_an_image_without_label(tmp_path: Path) -> None:
    touch(tmp_path, "ct_train_1001_image.nii.gz", "ct_train_1002_label.nii.gz")
    found = scan(tmp_path, "mmwhs", LayoutOptions())
    assert found.problems == ("ct_train_1002_label.nii.gz: a label whose image is missing",)
    (case,) = found.cases
    assert case.labels == ()
    assert case.label_hint == "ct_train_1001_label.nii.gz"


def test_duplicates_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "a/ct_train_1001_image.nii.gz", "b/ct_train_1001_image.nii.gz", "b/ct_train_1001_label.nii.gz")
    (problem,) = scan(tmp_path, "mmwhs", LayoutOptions()).problems
    assert problem.startswith("case ct_1001 has 2 image files: a/ct_train_1001_image.nii.gz, b/ct_train_1001_image")


# -------------------------------------------------------------------------------------------------------- folder


def test_patterns_pair_by_name_never_by_position(tmp_path: Path) -> None:
    names = [f"patient{k}_C0.nii.gz" for k in (10, 9, 1)] + [f"patient{k}_C0_manual.nii.gz" for k in (9, 10, 1)]
    touch(tmp_path, *names)
    found = scan(tmp_path, "folder", FOLDER)
    assert ids(found) == ["patient1", "patient9", "patient10"]
    for case in found.cases:
        assert case.images[0].name == f"{case.id}_C0.nii.gz"
        assert case.labels[0].name == f"{case.id}_C0_manual.nii.gz"
    assert found.table is None


def test_a_label_that_matches_both_patterns_is_a_label(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "a_seg.nii.gz")
    options = LayoutOptions(modality="mr", image_pattern="{case}.nii.gz", label_pattern="{case}_seg.nii.gz")
    assert pairs(scan(tmp_path, "folder", options), tmp_path) == {"mr/a": ("a.nii.gz", "a_seg.nii.gz")}


def test_label_maps_are_no_images_of_an_unlabelled_folder(tmp_path: Path) -> None:
    names = ("a_C0.nii.gz", "b_C0.nii.gz", "a_C0_manual.nii.gz")
    options = LayoutOptions(modality="mr", image_pattern="{case}.nii.gz")
    (problem,) = scan(touch(tmp_path, *names), "folder", options).problems
    assert problem.startswith("images by --image-pattern that are named like label maps, 1: a_C0_manual.nii.gz; ")
    assert scan(tmp_path, "folder", replace(options, label_pattern="{case}_manual.nii.gz")).problems == ()
    assert scan(tmp_path, "folder", replace(options, image_pattern="{case}_C0.nii.gz")).problems == ()


def test_patterns_with_folders_wildcards_and_repeats(tmp_path: Path) -> None:
    touch(tmp_path, "x/scan 1/scan 1_T1_v7.nii", "x/scan 1/mask.nii", "x/other/scan 1_T1_v7.nii")
    options = LayoutOptions(modality="mr", image_pattern="x/{case}/{case}_T1_*.nii", label_pattern="x/{case}/mask.nii")
    found = scan(tmp_path, "folder", options)
    assert pairs(found, tmp_path) == {"mr/scan 1": ("x/scan 1/scan 1_T1_v7.nii", "x/scan 1/mask.nii")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (LayoutOptions(modality="mr"), "needs --modality and --image-pattern"),
        (LayoutOptions(image_pattern="{case}.nii"), "needs --modality and --image-pattern"),
        (LayoutOptions(modality="mr", image_pattern="*.nii"), "must contain {case}"),
    ],
)
def test_the_folder_layout_needs_its_options(tmp_path: Path, options: LayoutOptions, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scan(touch(tmp_path, "a.nii"), "folder", options)


def test_patients_by_a_pattern(tmp_path: Path) -> None:
    touch(tmp_path, "s1_day1_C0.nii.gz", "s1_day2_C0.nii.gz", "odd_C0.nii.gz")
    options = LayoutOptions(modality="mr", image_pattern="{case}_C0.nii.gz", patient_pattern=r"^(s\d+)_")
    found = scan(tmp_path, "folder", options)
    assert {case.id: case.patient for case in found.cases if case.id != "odd"} == {"s1_day1": "s1", "s1_day2": "s1"}
    assert found.problems == (r"case odd: --patient-pattern '^(s\\d+)_' does not match it",)
    with pytest.raises(ConfigError, match="not a regular expression"):
        scan(tmp_path, "folder", LayoutOptions(modality="mr", image_pattern="{case}_C0.nii.gz", patient_pattern="("))


# ------------------------------------------------------------------------------------------------- what folders hold


def test_unicode_spaces_and_long_paths(tmp_path: Path) -> None:
    deep = "/".join(["long folder name " + "x" * 80] * 8)
    touch(tmp_path, "Zoë Müller 心_C0.nii.gz", f"{deep}/in depth_C0.nii.gz")
    options = LayoutOptions(modality="mr", image_pattern="{case}_C0.nii.gz")
    assert ids(scan(tmp_path, "folder", options)) == ["Zoë Müller 心"]
    options = LayoutOptions(modality="mr", image_pattern="*/*/*/*/*/*/*/*/{case}_C0.nii.gz")
    assert ids(scan(tmp_path, "folder", options)) == ["in depth"]


def test_names_that_cannot_name_a_file_of_the_dataset(tmp_path: Path) -> None:
    touch(tmp_path, "心" * 70 + "_C0.nii.gz", "a\nb_C0.nii.gz")
    problems = scan(tmp_path, "folder", FOLDER).problems
    assert len(problems) == 2
    assert all("cannot name a file of the dataset" in problem for problem in problems)


def test_symlinks_loops_and_broken_ones(tmp_path: Path) -> None:
    store = touch(tmp_path / "store", "ct_train_1001_image.nii.gz")
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "linked").symlink_to(store)
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "self.nii.gz").symlink_to(folder / "self.nii.gz")
    (folder / "ct_train_1002_image.nii.gz").symlink_to(tmp_path / "gone.nii.gz")
    found = scan(folder, "mmwhs", LayoutOptions())
    assert ids(found) == ["ct_1001"]
    assert sorted(found.problems) == [
        f"{folder}/ct_train_1002_image.nii.gz: a symlink to something that does not exist",
        f"{folder}/self.nii.gz: a symlink to something that does not exist",
    ]
    assert any("leads to a folder" in notice for notice in found.notices)


def test_hidden_files_are_ignored(tmp_path: Path) -> None:
    touch(tmp_path, "._ct_train_1001_image.nii.gz", ".DS_Store", ".cache/ct_train_1003_image.nii.gz")
    touch(tmp_path, "ct_train_1001_image.nii.gz")
    found = scan(tmp_path, "mmwhs", LayoutOptions())
    assert ids(found) == ["ct_1001"]
    assert found.notices == ()


@pytest.mark.parametrize("layout", ["mmwhs", "tfrecord", "npy"])
def test_folders_without_files_of_the_layout(tmp_path: Path, layout: str) -> None:
    with pytest.raises(DataError, match="no such folder"):
        scan(tmp_path / "nowhere", layout, LayoutOptions())
    with pytest.raises(DataError, match="the folder holds no files"):
        scan(tmp_path, layout, LayoutOptions())
    touch(tmp_path, "notes.txt")
    with pytest.raises(DataError, match=rf"layout {layout}\); it holds notes.txt"):
        scan(tmp_path, layout, LayoutOptions())
    with pytest.raises(DataError, match="a file; give the folder"):
        scan(tmp_path / "notes.txt", layout, LayoutOptions())


def test_dicom_in_another_layout_says_how_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "IM0001").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 50)
    with pytest.raises(DataError, match=r"DICOM files.*--layout folder --image-pattern"):
        scan(tmp_path, "mmwhs", LayoutOptions())


def test_an_unknown_layout(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected one of mmwhs, nnunet, folder, tfrecord, npy"):
        scan(touch(tmp_path, "a"), "bids", LayoutOptions())


# -------------------------------------------------------------------------------------------------------- nnU-Net


def nnunet(folder: Path, *names: str, **about: Any) -> Path:
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "MYO": 1, "LV": 2},
        "numTraining": 2,
        "file_ending": ".nii.gz",
        **about,
    }
    touch(folder, *names)
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


NAMES = ("imagesTr/a_0000.nii.gz", "imagesTr/b_0000.nii.gz", "labelsTr/a.nii.gz", "labelsTr/b.nii.gz")


def test_nnunet(tmp_path: Path) -> None:
    nnunet(tmp_path, *NAMES, "imagesTs/c_0000.nii.gz", "labelsTs/c.nii.gz")
    found = scan(tmp_path, "nnunet", LayoutOptions())
    assert pairs(found, tmp_path) == {
        "ct/a": ("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"),
        "ct/b": ("imagesTr/b_0000.nii.gz", "labelsTr/b.nii.gz"),
        "ct/c": ("imagesTs/c_0000.nii.gz", "labelsTs/c.nii.gz"),
    }
    assert [case.split for case in found.cases] == [None, None, "test"]
    assert found.table == LabelTable(("background", "MYO", "LV"), {0: 0, 1: 1, 2: 2})
    assert (found.problems, found.notices) == ((), ())


def test_nnunet_test_images_without_labels_are_left_out(tmp_path: Path) -> None:
    found = scan(nnunet(tmp_path, *NAMES, "imagesTs/c_0000.nii.gz"), "nnunet", LayoutOptions())
    assert ids(found) == ["a", "b"]
    assert found.notices == (
        "1 test image without labels (labelsTs is empty), left out; segment with mpscl_ray.predict",
    )


def test_nnunet_older_forms(tmp_path: Path) -> None:
    # The Decathlon: no channel suffix, ids as keys, `modality` for the channels.
    touch(tmp_path, "imagesTr/la_003.nii.gz", "labelsTr/la_003.nii.gz")
    about = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "left atrium"}, "numTraining": 1}
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    found = scan(tmp_path, "nnunet", LayoutOptions())
    assert pairs(found, tmp_path) == {"mr/la_003": ("imagesTr/la_003.nii.gz", "labelsTr/la_003.nii.gz")}
    assert found.table is not None
    assert found.table.classes == ("background", "left atrium")


def test_the_decathlon_may_number_its_cases_by_four_digits(tmp_path: Path) -> None:
    names = ("imagesTr/ct_1001.nii.gz", "labelsTr/ct_1001.nii.gz", "imagesTr/ct_1002.nii.gz", "labelsTr/ct_1002.nii.gz")
    found = scan(nnunet(tmp_path, *names), "nnunet", LayoutOptions())
    assert pairs(found, tmp_path) == {"ct/ct_1001": names[:2], "ct/ct_1002": names[2:]}
    assert (found.problems, found.notices) == ((), ())


def test_nnunet_ids_that_share_a_name_are_one_class_and_a_structure_of_id_0_is_reported(tmp_path: Path) -> None:
    labels = {"0": "AA", "1": "LV", "2": "MYO", "3": "LV"}
    found = scan(nnunet(tmp_path, *NAMES, labels=labels), "nnunet", LayoutOptions())
    assert found.table == LabelTable(("background", "LV", "MYO"), {0: 0, 1: 1, 2: 2, 3: 1})
    assert found.notices == ("dataset.json: the label 0, called 'AA', becomes background",)


def test_nnunet_channels_counts_and_ignored_labels(tmp_path: Path) -> None:
    labels = {"background": 0, "MYO": 1, "LV": 3, "ignore": 4}
    nnunet(
        tmp_path, *NAMES, "imagesTr/a_0001.nii.gz", "imagesTr/b_0001.nii.gz", labels=labels, numTraining=5,
        channel_names={"0": "T1 weighted", "1": "T2"},
    )  # fmt: skip
    found = scan(tmp_path, "nnunet", LayoutOptions())
    assert found.cases[0].modality == "t1_weighted"
    assert found.table == LabelTable(("background", "MYO", "LV"), {0: 0, 1: 1, 3: 2}, not_annotated=frozenset({4}))
    assert [notice.split(":")[0] for notice in found.notices] == [
        "imagesTr",
        "dataset.json says numTraining 5, imagesTr holds 2 cases",
    ]
    second = scan(tmp_path, "nnunet", LayoutOptions(channel=1))
    assert second.cases[0].images[0].name == "a_0001.nii.gz"


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (
            {"labels": {"background": 0, "whole": [1, 2]}},
            "the labels whole are regions of several ids, and a voxel has one label here",
        ),
        ({"labels": {}}, "are not NAME: ID pairs"),
        ({"labels": {"background": 0, "MYO": 1, "LV": 1}}, "the label 1 has two names, LV and MYO"),
        (
            {"labels": {"background": 0, "MYO": 1, "LV": 2, "myo": 3}},
            "'MYO' and 'myo' differ only in upper and lower",
        ),
        (
            {"labels": {"background": 0, "LV": 1, "LV ": 2}},
            "'LV' and 'LV ' differ only in .*blanks",
        ),
        (
            {"labels": {"MYO": 0, "LV": 1, "background": 2}},
            "the label 0 is called 'MYO' and 2 background; 0 is background here",
        ),
        ({"labels": {"background": 0}}, "0 labels besides background"),
        ({"channel_names": {}}, "no name for channel 0; give --modality"),
        ({"file_ending": ".png"}, r"file_ending '\.png'"),
    ],
)
def test_nnunet_refusals(tmp_path: Path, about: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"dataset\.json: .*{message}"):
        scan(nnunet(tmp_path, *NAMES, **about), "nnunet", LayoutOptions())


def test_nnunet_needs_its_json(tmp_path: Path) -> None:
    touch(tmp_path, *NAMES)
    with pytest.raises(DataError, match=r"dataset\.json: cannot be read"):
        scan(tmp_path, "nnunet", LayoutOptions())
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        scan(tmp_path, "nnunet", LayoutOptions())
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "LV": 1, "LV": 2}}')
    with pytest.raises(DataError, match=r"dataset\.json: 'LV' is there twice, as 1 and 2; correct the file"):
        scan(tmp_path, "nnunet", LayoutOptions())


def test_reference_folders(reference_data: Path) -> None:
    options = LayoutOptions(modality="lge", image_pattern="{case}_LGE.nii.gz", label_pattern="{case}_LGE_manual.nii.gz")
    found = scan(reference_data / "mscmrseg" / "lge", "folder", options)
    assert ids(found) == [f"patient{k}" for k in range(1, 46)]
    assert [case.id for case in found.cases if case.labels] == [f"patient{k}" for k in range(1, 6)]
    assert (found.problems, found.notices) == ((), ())
