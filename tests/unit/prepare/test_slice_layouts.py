"""Layouts of inputs that are slices already: TFRecords, npy and npz."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpscl_ray.errors import ConfigError
from mpscl_ray.prepare.label_table import RELEASED
from mpscl_ray.prepare.layouts import scan
from mpscl_ray.prepare.source_cases import LayoutOptions
from tests.listings import ids, pairs, touch


def test_tfrecords_modality_and_split_from_the_words(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "ct/ct_train_slice10.tfrecords",
        "ct/ct_train_slice9.tfrecords",
        "ct/sifa_validation_ct_01.tfrecords",
        "mr/training_07.tfrecords",
        "image_mr_1007.nii.gz",
        "gth_mr_1007.nii.gz",
    )
    found = scan(tmp_path, "tfrecord", LayoutOptions())
    assert [(case.modality, case.id, case.split) for case in found.cases] == [
        ("ct", "ct_train_slice9", "train"),
        ("ct", "ct_train_slice10", "train"),
        ("ct", "sifa_validation_ct_01", "val"),
        ("mr", "mr_1007", "test"),
        ("mr", "training_07", "train"),
    ]
    assert found.table is RELEASED
    volume = next(case for case in found.cases if case.id == "mr_1007")
    assert (volume.kind, volume.labels[0].name) == ("released_nifti", "gth_mr_1007.nii.gz")


def test_a_record_of_no_known_modality(tmp_path: Path) -> None:
    touch(tmp_path, "train_slice0.tfrecords")
    (problem,) = scan(tmp_path, "tfrecord", LayoutOptions()).problems
    assert problem == "train_slice0.tfrecords: neither ct nor mr in its name or folder; give --modality"
    assert ids(scan(tmp_path, "tfrecord", LayoutOptions(modality="mr"))) == ["train_slice0"]


def test_slices_grouped_by_number(tmp_path: Path) -> None:
    touch(
        tmp_path, *(f"ct_train_slice{k}.tfrecords" for k in range(5)), "ct_val_slice0.tfrecords", "ct_train_x.tfrecords"
    )
    found = scan(tmp_path, "tfrecord", LayoutOptions(group_slices=2))
    groups = {case.id: [path.stem.rpartition("slice")[2] for path in case.images] for case in found.cases}
    assert groups == {
        "ct_train_slices0000": ["0", "1"],
        "ct_train_slices0001": ["2", "3"],
        "ct_train_slices0002": ["4"],
        "ct_val_slices0000": ["0"],
        "ct_train_x": ["ct_train_x"],
    }
    assert any("does not say which slices are of one patient" in notice for notice in found.notices)
    with pytest.raises(ConfigError, match="--group-slices 0"):
        scan(tmp_path, "tfrecord", LayoutOptions(group_slices=0))


def test_npy_release(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "train_ct/ct_train_slice1.npy",
        "train_ct/ct_train_slice0.npy",
        "gt_train_ct/ct_train_slice0_gt.npy",
        "gt_train_ct/ct_train_slice1_gt.npy",
        "val_mr/mr_val_slice3.npy",
        "test_mr/image_mr_1007.nii.gz.npz",
    )
    found = scan(tmp_path, "npy", LayoutOptions())
    assert pairs(found, tmp_path) == {
        "ct/ct_train_slice0": ("train_ct/ct_train_slice0.npy", "gt_train_ct/ct_train_slice0_gt.npy"),
        "ct/ct_train_slice1": ("train_ct/ct_train_slice1.npy", "gt_train_ct/ct_train_slice1_gt.npy"),
        "mr/mr_1007": ("test_mr/image_mr_1007.nii.gz.npz",),
        "mr/mr_val_slice3": ("val_mr/mr_val_slice3.npy",),
    }
    assert [case.split for case in found.cases] == ["train", "train", "test", "val"]


def test_npy_groups_do_not_mix_labelled_and_unlabelled_slices(tmp_path: Path) -> None:
    touch(tmp_path, "ct_train_slice0.npy", "ct_train_slice1.npy", "ct_train_slice0_gt.npy")
    (problem,) = scan(tmp_path, "npy", LayoutOptions(group_slices=10)).problems
    assert problem == "ct_train_slice1_gt.npy: missing, though other slices of its group are labelled"
