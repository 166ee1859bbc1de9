"""Images that are no dataset: what is refused, and with which message."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mpscl_ray.data.volumes.recipe import Recipe
from mpscl_ray.errors import DataError
from mpscl_ray.prepare.layouts import scan
from mpscl_ray.prepare.source_cases import LayoutOptions
from tests.raw_volumes import made, mmwhs, refusal, volume, write


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return mmwhs(tmp_path / "in")


def test_all_problems_are_reported_at_once(source: Path) -> None:
    names = {number: source / f"ct_train_{number}_image.nii.gz" for number in range(1001, 1007)}
    names[1001].write_bytes(names[1001].read_bytes()[:-1000])
    write(names[1002], np.zeros((20, 24, 18), dtype=np.float32))
    (source / "ct_train_1003_label.nii.gz").unlink()
    write(source / "ct_train_1004_label.nii.gz", np.zeros((5, 5, 5), dtype=np.int16))
    image, label = volume(1005)
    label[0, 0, :3] = 421
    write(source / "ct_train_1005_label.nii.gz", label)
    image[3, 3, 3] = np.nan
    write(names[1006], image)
    text = "\n".join(refusal(source))
    for part in (
        "ct_train_1001_image.nii.gz is truncated",
        "ct_train_1002_image.nii.gz has the intensity 0 in every voxel",
        "case ct_1003",
        "ct_train_1004_label.nii.gz has shape (5, 5, 5)",
        "421 (3 voxels)",
        "ct_train_1006_image.nii.gz is NaN, infinite or beyond single precision in 1 voxel",
    ):
        assert part in text


def test_a_split_that_cannot_be_is_told_before_volumes_are_read(source: Path) -> None:
    for number in range(1001, 1007):
        (source / f"ct_train_{number}_image.nii.gz").write_bytes(b"")  # none can be read
        if number == 1003:
            (source / f"ct_train_{number}_image.nii.gz").unlink()
            (source / f"ct_train_{number}_label.nii.gz").unlink()
    (problem,) = refusal(source, split="mmwhs")
    assert problem.startswith("--split mmwhs: none of the published test volumes 1003, 1008, 1014, 1019 is among")


def test_labels_that_the_table_does_not_know(source: Path) -> None:
    path = source / "ct_train_1002_label.nii.gz"
    _, label = volume(1002)
    count = int((label == 420).sum())
    label[label == 420] = 421
    write(path, label)
    (problem,) = refusal(source)
    assert f"421 ({count} voxels)" in problem
    assert "written by mistake for 420" in problem
    _, fixed = made(source, fix_label="421=420")
    assert next(case for case in fixed.cases if case.id == "ct_1002").class_voxels[2] > 0
    _, dropped = made(source, unknown_labels="background", overwrite=True)
    assert next(case for case in dropped.cases if case.id == "ct_1002").class_voxels[2] == 0
    assert any("421" in notice and "ct_1002" in notice for notice in dropped.notices)


def test_the_same_image_under_another_name_in_another_split(source: Path, tmp_path: Path) -> None:
    image, label = volume(1001, low=-1000.0)
    moved = np.diag([1.5, 1.5, 2.0, 1.0])
    moved[0, 3] = 7.0  # another header, the same voxels
    write(source / "ct_train_1006_image.nii.gz", image, moved)
    write(source / "ct_train_1006_label.nii.gz", label, moved)
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["ct_1001", "ct_1002"], "test": ["ct_1006"]}))
    (problem,) = refusal(source, split=str(split))
    assert problem == "ct: the same image under several names: ct_1006 (test), ct_1001 (train)"


def test_a_patient_by_pattern_may_not_be_split(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for seed, name in enumerate(("s1_a", "s1_b", "s2_a")):
        image, label = volume(seed)
        write(folder / f"{name}_image.nii.gz", image)
        write(folder / f"{name}_label.nii.gz", label)
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["s1_a", "s2_a"], "test": ["s1_b"]}))
    (problem,) = refusal(
        folder,
        layout="folder",
        modality="mr",
        image_pattern="{case}_image.nii.gz",
        label_pattern="{case}_label.nii.gz",
        labels="205=MYO,420=LAC,500=LVC,820=AA",
        patient_pattern=r"^(s\d)",
        split=str(split),
    )
    assert problem == "mr: patient s1 is in test and train"


def test_labels_that_are_mostly_empty(source: Path) -> None:
    for number in range(1001, 1007):
        write(source / f"ct_train_{number}_label.nii.gz", np.zeros((20, 24, 18), dtype=np.int16))
    (problem,) = refusal(source)
    assert problem.startswith("ct: the labels of 3 of 3 training cases are all background")
    assert "--unlabelled train" in problem


def test_a_class_that_no_training_case_shows(source: Path) -> None:
    for number in range(1001, 1007):
        _, label = volume(number)
        write(source / f"ct_train_{number}_label.nii.gz", np.where(label == 820, 0, label).astype(np.int16))
    (problem,) = refusal(source)
    assert problem.startswith("ct: no training case shows the class AA")
    _, manifest = made(source, allow_missing_classes=True)
    assert "no training case shows the class AA" in manifest.notices


def test_unusual_intensities_are_reported(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for number in range(1001, 1007):
        image, label = volume(number)
        change = {
            1001: lambda x: np.where(x < 215, -600, x),
            1002: lambda x: x / 2000,
            1003: np.rint,
            1004: lambda x: (x - x.mean()) / x.std(),
        }
        image = change.get(number, lambda x: x)(np.clip(image, 0, 255) if number == 1003 else image)
        write(folder / f"mr_train_{number}_image.nii.gz", image.astype(np.float32))
        write(folder / f"mr_train_{number}_label.nii.gz", label)
    _, manifest = made(folder, "mr")
    text = "\n".join(manifest.notices)
    for part in (
        "mr_1001: intensities from",
        "look like Hounsfield units: a CT image among the mr ones?",
        "mr_1002: intensities are within [0, 1]",
        "mr_1003: intensities are whole numbers within 0..255",
        "mr_1004: intensities have mean 0 and deviation 1",
    ):
        assert part in text
    assert not any(notice.startswith(("mr_1005", "mr_1006")) for notice in manifest.notices)


def test_a_ct_image_among_those_of_mr_is_refused_by_default(tmp_path: Path) -> None:
    folder = mmwhs(tmp_path / "in", "mr")
    image, _ = volume(1002, low=-1000.0)
    image[:5] = -1000.0  # air
    write(folder / "mr_train_1002_image.nii.gz", np.rint(image).astype(np.int16))
    (problem,) = refusal(folder)
    assert "mr_train_1002_image.nii.gz: the intensities, which begin at -1000, are Hounsfield units" in problem
    _, manifest = made(folder, "mr", any_modality=True)
    assert any(notice.startswith("mr_1002: intensities from -1000") for notice in manifest.notices)


def test_a_voxel_that_removes_all_contrast_is_refused(source: Path) -> None:
    image, _ = volume(1003)
    image[8, 12, 9] = -1e30
    write(source / "ct_train_1003_image.nii.gz", image)
    (problem,) = refusal(source, recipe=Recipe(crop=(16, 16)), any_modality=True)
    assert "ct_train_1003_image.nii.gz lies within 0.05 standard deviations" in problem
    assert "down to -1e+30" in problem


def test_names_that_are_no_text_are_escaped(source: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(source.parent) + b"/caf\xe9"))
    source.rename(folder)
    (folder / os.fsdecode(b"lis\xe9z")).touch()
    _, manifest = made(folder)
    assert "caf\\udce9" in manifest.command
    assert any("lis\\udce9z" in notice for notice in manifest.notices)


def test_volumes_of_different_sizes_need_a_crop(source: Path) -> None:
    image, label = volume(1001)
    write(source / "ct_train_1001_image.nii.gz", image[:, :, :-2])
    write(source / "ct_train_1001_label.nii.gz", label[:, :, :-2])
    (problem,) = refusal(source, recipe=Recipe(crop=None), any_modality=True)
    assert problem.startswith("ct: slices of different sizes: 16 x 20 (ct_1001); 18 x 20 (")
    assert problem.endswith("give --crop or --size")


def test_a_geometry_that_differs_is_refused_by_default(source: Path) -> None:
    _, label = volume(1002)
    affine = np.diag([1.5, 1.5, 2.0, 1.0])
    affine[1, 3] = 3.0
    write(source / "ct_train_1002_label.nii.gz", label, affine)
    (problem,) = refusal(source)
    assert "3 mm apart" in problem
    _, manifest = made(source, fix_geometry="copy-from-image")
    assert len(manifest.cases) == 6
    nib.save(nib.Nifti1Image(label, None), source / "ct_train_1002_label.nii.gz")  # nor need it have a geometry at all
    _, manifest = made(source, fix_geometry="copy-from-image", overwrite=True)
    assert len(manifest.cases) == 6


def test_a_label_alone_without_a_position_may_take_that_of_its_image(source: Path) -> None:
    path = source / "ct_train_1002_label.nii.gz"
    image = nib.Nifti1Image(volume(1002)[1], np.diag([1.5, 1.5, 2.0, 1.0]))
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nib.save(image, path)
    (problem,) = refusal(source)
    assert problem.endswith("or take the geometry of its image: --fix-geometry copy-from-image")
    made(source, fix_geometry="copy-from-image")


def test_names_in_another_case_are_said(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"c{number}_IMAGE.nii.gz").touch()
    options = LayoutOptions(modality="mr", image_pattern="{case}_image.nii.gz")
    with pytest.raises(DataError, match=r"no files that match .*; upper and lower case count: c0_IMAGE.nii.gz, c1_"):
        scan(tmp_path, "folder", options)
