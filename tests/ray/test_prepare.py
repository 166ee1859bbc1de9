"""Images to datasets: what comes out, what is refused and how, and that it is the same with and without Ray."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

import mpscl_ray.prepare as prepare_module
from mpscl_ray.cluster_session import connect
from mpscl_ray.data.geometry import Geometry, restore_labels
from mpscl_ray.data.nifti import read_image
from mpscl_ray.data.schema import Manifest, load_manifest, read_case, verify
from mpscl_ray.data.slices import Recipe, prepare_volume, scale
from mpscl_ray.errors import ClusterError, ConfigError, DataError, StorageError
from mpscl_ray.parallel import map_volumes
from mpscl_ray.prepare import main, prepare
from mpscl_ray.prepare_options import PrepareOptions, parse

RAW_IDS = (205, 420, 500, 820)
SMALL = Recipe(crop=(16, 16), size=(12, 12))


def volume(seed: int, low: float = 0.0, shape: tuple[int, int, int] = (20, 24, 18)) -> tuple[Any, Any]:
    """An image with four bright boxes, and their raw MM-WHS ids."""
    random = np.random.default_rng(seed)
    image = random.normal(300.0, 30.0, size=shape).astype(np.float32)
    label = np.zeros(shape, dtype=np.int16)
    for number, raw in enumerate(RAW_IDS):
        box = (slice(5 + 2 * number, 9 + 2 * number), slice(8, 14), slice(4 + 2 * number, 8 + 2 * number))
        image[box] += 200.0 * (number + 1)
        label[box] = raw
    return image + np.float32(low), label


def write(path: Path, array: NDArray[Any], affine: NDArray[Any] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([1.5, 1.5, 2.0, 1.0]) if affine is None else affine), path)


def mmwhs(folder: Path, modality: str = "ct", numbers: range = range(1001, 1007)) -> Path:
    for number in numbers:
        image, label = volume(number, low=-1000.0 if modality == "ct" else 0.0)
        write(folder / f"{modality}_train_{number}_image.nii.gz", image)
        write(folder / f"{modality}_train_{number}_label.nii.gz", label)
    return folder


def options(folder: Path, **changes: Any) -> PrepareOptions:
    values = {"layout": "mmwhs", "split": "0.5,0.25,0.25", "recipe": SMALL, "workers": 0, "out": folder.parent / "out"}
    return PrepareOptions(input=folder, **{**values, **changes})


def made(folder: Path, name: str = "ct", /, **changes: Any) -> tuple[Path, Manifest]:
    folders = prepare(options(folder, **changes), progress=False)
    return folders[name], load_manifest(folders[name])


def refusal(folder: Path, **changes: Any) -> list[str]:
    """Problems that a refused run lists; makes sure that nothing was left behind."""
    wanted = options(folder, **changes)
    before = set(wanted.out.iterdir()) if wanted.out.exists() else set()
    with pytest.raises(DataError) as caught:
        prepare(wanted, progress=False)
    assert (set(wanted.out.iterdir()) if wanted.out.exists() else set()) == before
    head, *lines = str(caught.value).split("\n")
    assert "nothing was written" in head
    return [line.removeprefix("  - ") for line in lines]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return mmwhs(tmp_path / "in")


# ------------------------------------------------------------------------------------------------- what comes out


def test_two_modalities_become_two_datasets(source: Path) -> None:
    mmwhs(source, "mr", range(1001, 1005))
    folders = prepare(options(source), progress=False)
    assert set(folders) == {"ct", "mr"}
    assert sorted(path.name for path in (source.parent / "out").iterdir()) == ["ct", "mr"]
    manifest = load_manifest(folders["ct"])
    assert manifest.classes == ("background", "MYO", "LAC", "LVC", "AA")
    assert manifest.size == (12, 12)
    assert [len(manifest.split(split)) for split in ("train", "val", "test")] == [3, 2, 1]
    assert set(verify(folders["ct"], manifest.cases)) == {case.file for case in manifest.cases}
    files = {path.relative_to(folders["ct"]).as_posix() for path in folders["ct"].rglob("*") if path.is_file()}
    assert files == {"manifest.json", *(case.file for case in manifest.cases)}
    for case in manifest.cases:
        arrays = read_case(folders["ct"], case)
        assert arrays["image"].shape == arrays["label"].shape == (case.slices, 12, 12)
        assert set(np.unique(arrays["label"])) == {0, 1, 2, 3, 4}
        assert case.spacing_mm == pytest.approx((1.5, 2.0 * 16 / 12, 1.5 * 16 / 12))


def test_recipe_and_range_are_enough_for_a_new_volume(source: Path) -> None:
    folder, manifest = made(source)
    recipe = Recipe.from_json(json.loads(json.dumps(manifest.recipe)))
    case = manifest.split("test")[0]
    image = read_image(source / case.sources["image"])
    label = np.asarray(nib.load(source / case.sources["label"]).dataobj)
    again = prepare_volume(image.array, image.affine, label, recipe)
    np.testing.assert_array_equal(
        scale(again.image, manifest.scaling.low, manifest.scaling.high), read_case(folder, case)["image"]
    )


def test_labels_go_back_into_the_original_image(source: Path) -> None:
    recipe = Recipe(crop=(24, 24))
    folder, manifest = made(source, recipe=recipe)
    for case in manifest.cases:
        restored = restore_labels(read_case(folder, case)["label"], Geometry.from_json(case.geometry))
        raw = np.asarray(nib.load(source / case.sources["label"]).dataobj)
        expected = np.select([raw == value for value in RAW_IDS], [1, 2, 3, 4], 0)
        np.testing.assert_array_equal(restored, expected)


def test_the_range_is_that_of_the_training_cases_alone(source: Path) -> None:
    _, before = made(source)
    case = before.split("test")[0]
    image, _ = volume(1, low=-1000.0)
    image[::2] *= 3
    write(source / case.sources["image"], image)
    _, after = made(source, overwrite=True)
    assert before.scaling == after.scaling
    assert before.scaling.origin == "estimated from 3 training cases"
    training = [read_case(source.parent / "out" / "ct", case)["image"] for case in after.split("train")]
    assert -1.6 < min(image.min() for image in training) < -0.9
    assert 0.9 < max(image.max() for image in training) < 1.6


@pytest.mark.parametrize(
    ("text", "expected"),
    [("-2.5,3.5", (-2.5, 3.5, "given")), ("sifa", (-2.8, 3.2, "published (SIFA, MPSCL)"))],
)
def test_a_given_range(source: Path, text: str, expected: tuple[float, float, str]) -> None:
    _, manifest = made(source, range=text)
    assert dataclasses.astuple(manifest.scaling) == expected


@pytest.mark.parametrize("text", ["3,2", "1", "a,b", "nan,1", "sifa2", "-inf,inf"])
def test_a_wrong_range(source: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="--range"):
        prepare(options(source, range=text), progress=False)


def test_the_manifest_tells_every_step_and_the_leak(source: Path) -> None:
    _, manifest = made(source, recipe=dataclasses.replace(SMALL, spacing_mm=(None, 2.0, 2.0)))
    text = "; ".join(manifest.steps)
    for part in ("205 MYO", "[550, 600, 850]", "fractions", "coronal", "2 mm", "16 x 16", "12 x 12", "98", "z-score"):
        assert part in text
    assert f"{manifest.scaling.low:g} to {manifest.scaling.high:g} mapped to [-1, 1]" in text
    assert any("cropped around their own labels, 3" in notice for notice in manifest.notices)
    assert all(case.cropped_around_labels for case in manifest.cases)
    _, without = made(source, recipe=dataclasses.replace(SMALL, centre="image"), overwrite=True)
    assert not any("own labels" in notice for notice in without.notices)


def test_the_command_of_the_manifest_makes_the_same_dataset(source: Path) -> None:
    wanted = options(source, range="-2.5,3", seed=3, recipe=dataclasses.replace(SMALL, spacing_mm=(None, 2.0, 2.0)))
    folder = prepare(wanted, progress=False)["ct"]
    manifest = load_manifest(folder)
    words = shlex.split(manifest.command)
    assert words[:3] == ["python", "-m", "mpscl_ray.prepare"]
    again = prepare(dataclasses.replace(parse(words[3:]), overwrite=True, workers=0), progress=False)["ct"]
    assert load_manifest(again) == manifest


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"recipe": Recipe(crop=None, orientation="stored", slice_axis="2", centre="image", clip_percentile=99.5)},
        {"recipe": Recipe(crop_depth=7, spacing_mm=(None, 1.5, 1.0)), "seed": 4, "modality": "mr"},
        {"labels": "1=a b,2=c", "ignore_labels": "5,6", "fix_label": "3=2", "unknown_labels": "background"},
        {"unlabelled": ("train", "test"), "transductive": True, "range": "-1,2", "assume_spacing": (1.0, 1.0, 2.5)},
        {"image_pattern": "{case} *.nii", "patient_pattern": r"^(p\d+)", "flip": "both", "group_slices": 600},
        {"fix_geometry": "copy-from-image", "allow_missing_classes": True, "channel": 2, "split": "a file.json"},
    ],
)
def test_options_and_command_line_are_the_same_thing(tmp_path: Path, changes: dict[str, Any]) -> None:
    wanted = PrepareOptions(input=tmp_path / "my data", out=tmp_path / "out", layout="folder", **changes)
    assert parse(shlex.split(wanted.command())[3:]) == wanted


def test_the_published_split_is_the_default_of_mmwhs(source: Path) -> None:
    _, manifest = made(source, split=None)
    assert [case.id for case in manifest.split("test")] == ["ct_1003"]
    assert [case.id for case in manifest.split("val")] == ["ct_1006"]
    assert manifest.notices[0] == "published test volumes that are not there: 1008, 1014, 1019"


def test_nnunet_and_a_number_of_classes_from_the_data(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "Dataset001"
    for number, split in ((1001, "Tr"), (1002, "Tr"), (1003, "Tr"), (1004, "Ts")):
        image, label = volume(number)
        write(folder / f"images{split}" / f"p_{number}_0000.nii.gz", image)
        write(
            folder / f"labels{split}" / f"p_{number}.nii.gz",
            np.select([label == 205, label > 205], [1, 2], 0).astype("u1"),
        )
    about = {"channel_names": {"0": "LGE"}, "labels": {"background": 0, "wall": 1, "rest": 2}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(about))
    _, manifest = made(folder, "lge", layout="nnunet", split=None)
    assert manifest.classes == ("background", "wall", "rest")
    assert [case.id for case in manifest.split("test")] == ["p_1004"]
    assert (len(manifest.split("train")), len(manifest.split("val"))) == (2, 1)


# ------------------------------------------------------------------------------------------------ target domains


def test_unlabelled_splits_get_no_labels_and_theirs_are_not_even_read(source: Path) -> None:
    _, labelled = made(source)
    for case in labelled.split("train"):
        (source / case.sources["label"]).write_bytes(b"this is no label map")
    folder, manifest = made(source, unlabelled=("train",), overwrite=True)
    assert [case.labelled for case in manifest.split("train")] == [False] * 3
    assert all(case.labelled for case in (*manifest.split("val"), *manifest.split("test")))
    assert "label" not in read_case(folder, manifest.split("train")[0])
    assert "labels left out of train" in manifest.steps
    # Crops are then placed alike for all, without labels.
    assert manifest.recipe["centre"] == "image"
    assert not any(case.cropped_around_labels for case in manifest.cases)


def test_images_without_any_label_file(source: Path) -> None:
    for path in source.glob("*_label.nii.gz"):
        path.unlink()
    problems = refusal(source)
    assert len(problems) == 7
    assert problems[0].startswith("ct: case ct_100")
    assert "(train) has no label (ct_train_100" in problems[0]
    assert "--unlabelled train" in problems[-1]
    _, manifest = made(source, unlabelled=("train", "val", "test"))
    assert not any(case.labelled for case in manifest.cases)


def test_a_target_without_labels_needs_no_label_table(source: Path) -> None:
    folder, manifest = made(
        source,
        "site_b",
        layout="folder",
        modality="site_b",
        image_pattern="ct_train_{case}_image.nii.gz",
        unlabelled=("train", "val", "test"),
    )
    assert manifest.classes == ()
    assert len(manifest.cases) == 6
    assert set(read_case(folder, manifest.cases[0])) == {"image"}
    with pytest.raises(ConfigError, match="give --labels"):
        made(
            source,
            layout="folder",
            modality="site_b",
            image_pattern="ct_train_{case}_image.nii.gz",
            label_pattern="ct_train_{case}_label.nii.gz",
            overwrite=True,
        )


def test_transductive(source: Path, tmp_path: Path) -> None:
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": [f"ct_{k}" for k in range(1001, 1007)], "val": ["ct_1001", "ct_1002"]}))
    problems = refusal(source, split=str(split))
    assert problems == ["ct: patient ct_1001 is in train and val", "ct: patient ct_1002 is in train and val"]
    for number in range(1003, 1007):
        (source / f"ct_train_{number}_label.nii.gz").unlink()
    folder, manifest = made(source, split=str(split), transductive=True)
    assert [case.labelled for case in manifest.split("train")] == [False] * 6
    assert [case.labelled for case in manifest.split("val")] == [True] * 2
    assert manifest.splitting["transductive"] is True
    one, other = manifest.split("train")[0], manifest.split("val")[0]
    np.testing.assert_array_equal(read_case(folder, one)["image"], read_case(folder, other)["image"])


# --------------------------------------------------------------------------------------------------- what is refused


def test_everything_that_is_wrong_is_told_at_once(source: Path) -> None:
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
        "ct_train_1006_image.nii.gz has 1 voxels that are NaN",
    ):
        assert part in text


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


def test_odd_intensities_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for number in range(1001, 1007):
        image, label = volume(number)
        change = {
            1001: lambda x: x - 1000,
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


def test_a_ct_image_among_those_of_mr_is_refused_unless_told_otherwise(tmp_path: Path) -> None:
    folder = mmwhs(tmp_path / "in", "mr")
    image, _ = volume(1002, low=-1000.0)
    image[:5] = -1000.0  # air
    write(folder / "mr_train_1002_image.nii.gz", np.rint(image).astype(np.int16))
    (problem,) = refusal(folder)
    assert "mr_train_1002_image.nii.gz: the intensities, from -1000 on, are Hounsfield units" in problem
    _, manifest = made(folder, "mr", any_modality=True)
    assert any(notice.startswith("mr_1002: intensities from -1000") for notice in manifest.notices)


def test_a_voxel_that_would_drown_all_others_is_refused(source: Path) -> None:
    image, _ = volume(1003)
    image[8, 12, 9] = -1e30
    write(source / "ct_train_1003_image.nii.gz", image)
    (problem,) = refusal(source, recipe=Recipe(crop=(16, 16)))
    assert "ct_train_1003_image.nii.gz lies within 0.05 standard deviations" in problem
    assert "down to -1e+30" in problem


def test_names_that_are_no_text_end_up_as_escapes(source: Path) -> None:
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
    (problem,) = refusal(source, recipe=Recipe(crop=None))
    assert problem.startswith("ct: slices of different sizes: 16 x 20 (ct_1001); 18 x 20 (")
    assert problem.endswith("give --crop or --size")


def test_a_geometry_that_differs_is_refused_unless_told_otherwise(source: Path) -> None:
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


# ------------------------------------------------------------------------------------- never half a dataset


def test_a_finished_dataset_is_not_replaced_unasked(source: Path) -> None:
    _, first = made(source)
    with pytest.raises(ConfigError, match="there is a finished dataset already; give --overwrite"):
        prepare(options(source), progress=False)
    _, second = made(source, overwrite=True, seed=1)
    assert first.fingerprint != second.fingerprint
    assert [path.name for path in (source.parent / "out").iterdir()] == ["ct"]


def test_something_else_in_the_place_is_never_touched(source: Path) -> None:
    precious = source.parent / "out" / "ct" / "thesis.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("years of work")
    with pytest.raises(StorageError, match="something else than a dataset"):
        prepare(options(source, overwrite=True), progress=False)
    assert precious.read_text() == "years of work"


def test_a_failure_while_writing_leaves_the_old_dataset(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, first = made(source)
    calls = []

    def fail(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return finish(*args, **kwargs)

    finish = prepare_module.finish_case
    monkeypatch.setattr(prepare_module, "finish_case", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(options(source, overwrite=True, seed=1), progress=False)
    assert len(calls) == 4
    assert [path.name for path in folder.parent.iterdir()] == ["ct"]
    assert load_manifest(folder) == first
    verify(folder, first.cases)


def test_a_killed_run_leaves_no_dataset_and_the_next_one_cleans_up(source: Path, tmp_path: Path) -> None:
    for number in range(1007, 1040):
        mmwhs(source, "ct", range(number, number + 1))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mpscl_ray.prepare", str(source), "--layout", "mmwhs", "--out", str(out)]
    process = subprocess.Popen([*command, "--workers", "0", "--crop", "16,16"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(out.glob(".ct.unfinished-*/.staged/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (left,) = out.iterdir()
    assert left.name.startswith(".ct.unfinished-")
    for folder in (out, out / "ct", left):
        with pytest.raises(DataError):
            load_manifest(folder)
    made(source)
    assert [path.name for path in out.iterdir()] == ["ct"]


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_output_that_cannot_be_written(source: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot write"):
        prepare(options(source, out=tmp_path / place), progress=False)


def test_a_full_disk_is_told_and_leaves_nothing(source: Path) -> None:
    script = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000)); "
        "sys.argv[0] = 'prepare'; runpy.run_module('mpscl_ray.prepare', run_name='__main__')"
    )
    out = source.parent / "out"
    command = [
        sys.executable,
        "-B",
        "-c",
        script,
        str(source),
        "--layout",
        "mmwhs",
        "--out",
        str(out),
        "--workers",
        "0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 5
    assert "no space left: needed" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(out.iterdir()) == []


# ------------------------------------------------------------------------------------------------ the command line


def test_the_command_prints_a_table_and_the_next_command(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = source.parent / "out"
    arguments = [str(source), "--layout", "mmwhs", "--out", str(out), "--crop", "16,16", "--workers", "0"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    rows = [line.split() for line in printed.out.splitlines()]
    assert ["split", "patients", "cases", "labelled", "slices", "background", "MYO", "LAC", "LVC", "AA"] in rows
    assert ["train", "4", "4", "4", "96"] in [row[:5] for row in rows]
    preset = rows[-1][rows[-1].index("mpscl_ray.train") + 1]
    assert rows[-1] == [
        "next:",
        "python",
        "-m",
        "mpscl_ray.train",
        preset,
        f"data.source={out}/ct",
        "data.target=OTHER",
    ]
    assert (Path(prepare_module.__file__).parent / "presets" / f"{preset}.yaml").is_file()
    assert "reading and normalising 6/6" in printed.err


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (["--layout", "mmwhs", "--split", "0.5,0.5"], 2, "three fractions"),
        (["--layout", "mmwhs", "--unlabelled", "trian"], 2, "'trian' is none of train, val, test"),
        (["--layout", "mmwhs", "--orientation", "stored"], 2, "slice_axis is 'coronal'"),
        (["--layout", "mmwhs", "--crop", "16"], 2, "expected 2 numbers"),
        (["--layout", "mmwhs", "--crop", "keep,16"], 2, "crop is (None, 16); expected rows and columns"),
        (["--layout", "mmwhs", "--assume-spacing", "0,1,1"], 2, "expected three sizes in mm above 0"),
        (["--layout", "mmwhs", "--split", "1,0,0", "--spacing-mm", "1e-9,1,1"], 3, "choose a larger spacing"),
        (["--layout", "tfrecord"], 3, "no *.tfrecords files"),
        (["--layout", "mmwhs", "--modality", "mr"], 3, "of the modality 'mr'"),
    ],
)
def test_exit_codes_and_plain_sentences(source: Path, change: list[str], code: int, words: str) -> None:
    command = [sys.executable, "-m", "mpscl_ray.prepare", str(source), "--out", str(source.parent / "out"), *change]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr


# --------------------------------------------------------------------------------------------------- with Ray


@pytest.fixture(scope="module")
def two_workers() -> Iterator[None]:
    with connect(2):
        yield


@pytest.mark.slow
def test_workers_make_the_same_files(source: Path, tmp_path: Path, two_workers: None) -> None:
    _, alone = made(source)
    folder, together = made(source, workers=2, out=tmp_path / "with ray")
    assert together.fingerprint == alone.fingerprint
    assert together.cases == alone.cases
    verify(folder, together.cases)


@pytest.mark.slow
def test_workers_name_every_bad_file(source: Path, two_workers: None) -> None:
    for number in (1002, 1005):
        path = source / f"ct_train_{number}_image.nii.gz"
        path.write_bytes(path.read_bytes()[:-1000])
    problems = refusal(source, workers=2)
    assert [problem.split(" ")[0] for problem in problems] == [
        str(source / "ct_train_1002_image.nii.gz"),
        str(source / "ct_train_1005_image.nii.gz"),
    ]


def _fail_on_three(item: int) -> int:
    if item == 3:
        raise StorageError("the disk is full")
    if item == 30:
        raise ZeroDivisionError("a defect")
    if item == 300:
        os._exit(1)
    return item * item


@pytest.mark.slow
def test_errors_of_workers_arrive_with_the_name_of_the_volume(two_workers: None) -> None:
    seen: list[int] = []
    arguments: dict[str, Any] = {"workers": 2, "name": lambda item: f"volume {item}", "done": seen.append}
    assert map_volumes(_fail_on_three, [1, 2, 4, 5], **arguments) == [1, 4, 16, 25]
    assert seen == [1, 2, 3, 4]
    assert map_volumes(_fail_on_three, list(range(1000, 1100)), **arguments) == [k * k for k in range(1000, 1100)]
    with pytest.raises(StorageError, match="the disk is full"):
        map_volumes(_fail_on_three, [1, 2, 3], **arguments)
    with pytest.raises(RuntimeError, match="volume 30"):
        map_volumes(_fail_on_three, [1, 30], **arguments)
    with pytest.raises(ClusterError, match="the worker that had volume 300 died"):
        map_volumes(_fail_on_three, [300], **arguments)


def test_errors_in_this_process_carry_the_name_too() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        map_volumes(_fail_on_three, [30], workers=0, name=lambda item: f"volume {item}", done=lambda count: None)
    assert caught.value.__notes__ == ["while working on volume 30"]


# ------------------------------------------------------------------------------------------------ released slices


def released(folder: Path) -> Path:
    """An npy release in small: two training slices in [-1, 1], and a test volume that is z-scored and turned."""
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
