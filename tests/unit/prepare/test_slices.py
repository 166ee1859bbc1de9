"""Released slices and real volumes as datasets."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mpscl_ray.data.dataset import load_manifest
from mpscl_ray.data.parquet_reader import read_case
from mpscl_ray.data.scaling import scale
from mpscl_ray.data.volumes.geometry import Geometry, restore_labels
from mpscl_ray.data.volumes.recipe import Recipe
from mpscl_ray.prepare.run import prepare
from tests.raw_volumes import made, mmwhs, options, refusal


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return mmwhs(tmp_path / "in")


def released(folder: Path) -> Path:
    """A small npy release: two training slices in [-1, 1], and a test volume that is z-scored and turned."""
    random = np.random.default_rng(0)
    for number in range(2):
        label = random.integers(0, 6, size=(10, 8)).astype(np.float64)
        for name, array in (
            (f"train_ct/ct_train_slice{number}.npy", random.uniform(-1, 1, size=(10, 8))),
            (f"gt_train_ct/ct_train_slice{number}_gt.npy", label),
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            np.save(folder / name, array)
    image, label = random.normal(size=(10, 8, 5)), random.integers(0, 5, size=(10, 8, 5))
    (folder / "test_ct").mkdir()
    np.savez(folder / "test_ct" / "image_ct_1003.nii.gz.npz", image.astype(np.float32), label.astype(np.float32))
    return folder


def test_npy_release(tmp_path: Path) -> None:
    source = released(tmp_path / "in")
    folder, manifest = made(source, layout="npy", split=None, recipe=Recipe())
    assert dataclasses.astuple(manifest.scaling) == (-2.8, 3.2, "published (SIFA, MPSCL)")
    train, test = manifest.split("train")[1], manifest.split("test")[0]
    slices = np.load(source / "train_ct" / "ct_train_slice1.npy").astype(np.float32)
    np.testing.assert_array_equal(read_case(folder, train)["image"], slices[None])
    raw = np.load(source / "gt_train_ct" / "ct_train_slice1_gt.npy")
    np.testing.assert_array_equal(read_case(folder, train)["label"][0], np.where(raw == 5, 0, raw))
    assert any("5 (" in notice for notice in manifest.notices)
    with np.load(source / "test_ct" / "image_ct_1003.nii.gz.npz") as arrays:
        turned = arrays["arr_0"][::-1, ::-1].transpose(2, 0, 1)
        np.testing.assert_allclose(read_case(folder, test)["image"], 2 * (turned + 2.8) / 6.0 - 1, atol=1e-6)
        np.testing.assert_array_equal(read_case(folder, test)["label"], arrays["arr_1"][::-1, ::-1].transpose(2, 0, 1))
    assert (test.id, test.slices) == ("ct_1003", 5)
    turned_label = read_case(folder, test)["label"]
    straight, manifest = made(source, layout="npy", split=None, recipe=Recipe(), flip="none", overwrite=True)
    np.testing.assert_array_equal(read_case(straight, manifest.split("test")[0])["label"], turned_label[:, ::-1, ::-1])


def test_npy_slices_on_another_range(tmp_path: Path) -> None:
    source = released(tmp_path / "in")
    folder, manifest = made(source, layout="npy", split=None, recipe=Recipe(), range="-2,2")
    slices = np.load(source / "train_ct" / "ct_train_slice0.npy")
    expected = 2 * (((slices + 1) * 3 - 2.8) + 2) / 4 - 1
    np.testing.assert_allclose(read_case(folder, manifest.split("train")[0])["image"][0], expected, atol=1e-5)


def test_damaged_and_foreign_arrays_are_refused(tmp_path: Path) -> None:
    source = released(tmp_path / "in")
    np.save(source / "train_ct" / "ct_train_slice0.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (source / "train_ct" / "ct_train_slice1.npy").write_bytes(b"\x93NUMPY")
    volume_path = source / "test_ct" / "image_ct_1003.nii.gz.npz"
    data = bytearray(volume_path.read_bytes())
    data[len(data) // 2] ^= 1
    volume_path.write_bytes(data)
    np.savez(source / "test_ct" / "image_ct_1008.nii.gz.npz", other=np.zeros(3))
    np.savez(source / "test_ct" / "image_ct_1014.nii.gz.npz", np.zeros((8, 8, 0)), np.zeros((8, 8, 0)))
    np.savez(source / "test_ct" / "image_ct_1019.nii.gz.npz", np.ones((8, 8, 2), complex))
    locked = source / "test_ct" / "image_ct_1020.nii.gz.npz"
    np.savez(locked, np.random.default_rng(0).normal(size=(8, 8, 2)))
    encrypted = bytearray(locked.read_bytes())
    encrypted[encrypted.find(b"PK\1\2") + 8] |= 1  # as the directory of the archive says
    encrypted[6] |= 1  # as the entry itself says
    locked.write_bytes(encrypted)
    for number, value in enumerate((np.nan, np.inf, 1e20)):
        np.save(source / "gt_train_ct" / f"ct_train_slice{2 + number}_gt.npy", np.full((8, 8), value))
        np.save(source / "train_ct" / f"ct_train_slice{2 + number}.npy", np.linspace(-1, 1, 64).reshape(8, 8))
    text = "\n".join(refusal(source, layout="npy", split=None, recipe=Recipe()))
    for part in (
        "ct_train_slice0.npy: not a readable npy array",
        "ct_train_slice1.npy: not a readable npy array",
        "image_ct_1003.nii.gz.npz: not a readable npz volume (wrong checksum",
        "image_ct_1008.nii.gz.npz: not a readable npz volume (it holds other, expected arr_0",
        "image_ct_1014.nii.gz.npz: image (8, 8, 0), label (8, 8, 0)",
        "image_ct_1019.nii.gz.npz: not a readable npz volume (arr_0 holds values of type complex128",
        "image_ct_1020.nii.gz.npz: not a readable npz volume (File 'arr_0.npy' is encrypted",
        "ct_train_slice2_gt.npy: label values that are no whole numbers of 32 bits, e.g. nan",
        "ct_train_slice3_gt.npy: label values that are no whole numbers of 32 bits, e.g. inf",
        "ct_train_slice4_gt.npy: label values that are no whole numbers of 32 bits, e.g. 1e+20",
    ):
        assert part in text


def test_the_real_records(reference_data: Path, tmp_path: Path) -> None:
    folders = prepare(
        options(reference_data / "mmwhs_records", layout="tfrecord", split=None, recipe=Recipe(), out=tmp_path / "out"),
        progress=False,
    )
    ct, mr = load_manifest(folders["ct"]), load_manifest(folders["mr"])
    assert [case.id for case in ct.split("train")] == ["ct_train_slice0", "sifa_training_ct_01"]
    assert [case.id for case in mr.split("val")] == ["sifa_validation_mr_01"]
    assert ct.cases[1].class_voxels == (47269 + 2484, 4038, 0, 4112, 7633)
    assert any(notice.startswith("sifa_training_ct_01: ") and "5 (2484 voxels)" in notice for notice in ct.notices)
    assert "labelled cases that show no structure, 1: mr_train_slice0" in mr.notices
    assert any("MR validation slices come from the MR test patients" in notice for notice in mr.notices)
    assert not any("MR validation slices" in notice for notice in ct.notices)
    # Published: 0 after z-scoring becomes -0.067 in CT and -0.419 in MR.
    assert scale(np.zeros(1, np.float32), ct.scaling.low, ct.scaling.high)[0] == pytest.approx(-0.0667, abs=1e-4)
    assert scale(np.zeros(1, np.float32), mr.scaling.low, mr.scaling.high)[0] == pytest.approx(-0.419, abs=1e-3)


def test_the_real_npz_and_slices_on_a_smaller_grid(reference_data: Path, tmp_path: Path) -> None:
    wanted = options(
        reference_data / "mmwhs_records" / "mr", layout="npy", split=None, recipe=Recipe(size=(64, 64)), out=tmp_path
    )
    folder = prepare(wanted, progress=False)["mr"]
    (case,) = load_manifest(folder).cases
    assert (case.id, case.split, case.slices) == ("sifa_example_mr_01", "test", 3)
    arrays = read_case(folder, case)
    assert arrays["image"].shape == (3, 64, 64)
    with np.load(reference_data / "mmwhs_records" / "mr" / "sifa_example_mr_01.npz") as found:
        full = 2 * (found["arr_0"].transpose(2, 0, 1) + 1.8) / 6.2 - 1
        blocks = full.reshape(3, 64, 4, 64, 4).mean(axis=(2, 4))
        share = [(found["arr_1"] == value).mean() for value in range(1, 5)]
    assert np.abs(arrays["image"] - blocks).mean() < 0.03
    assert [(arrays["label"] == value).mean() for value in range(1, 5)] == pytest.approx(share, abs=2e-3)


def test_real_oblique_stacks(reference_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lge"
    folder.mkdir()
    for number in (1, 2, 10):
        for suffix in ("", "_manual"):
            path = reference_data / "mscmrseg" / "lge" / f"patient{number}_LGE{suffix}.nii.gz"
            if path.exists():
                (folder / path.name).symlink_to(path)
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": [f"patient{k}" for k in (1, 2, 10)], "val": ["patient1", "patient2"]}))
    out, manifest = made(
        folder,
        "lge",
        layout="folder",
        modality="lge",
        image_pattern="{case}_LGE.nii.gz",
        label_pattern="{case}_LGE_manual.nii.gz",
        labels="200=MYO,500=LV,600=RV",
        split=str(split),
        transductive=True,
        recipe=Recipe(orientation="stored", slice_axis="2", crop=(144, 144), size=(80, 80)),
    )
    assert manifest.classes == ("background", "MYO", "LV", "RV")
    assert [case.labelled for case in manifest.cases] == [False, False, False, True, True]
    assert [case.slices for case in manifest.split("val")] == [15, 16]
    for case in manifest.split("val"):
        label = read_case(out, case)["label"]
        restored = restore_labels(label, Geometry.from_json(case.geometry))
        raw = np.asarray(nib.load(folder / case.sources["label"]).dataobj)
        expected = np.select([raw == 200, raw == 500, raw == 600], [1, 2, 3], 0)
        overlap = 2 * np.sum((restored > 0) & (expected > 0)) / (np.sum(restored > 0) + np.sum(expected > 0))
        assert overlap > 0.95
