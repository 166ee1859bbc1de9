"""Images to datasets: the results."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from mpscl_ray.data.dataset import load_manifest
from mpscl_ray.data.parquet_reader import read_case
from mpscl_ray.data.scaling import scale
from mpscl_ray.data.volumes.geometry import Geometry, restore_labels
from mpscl_ray.data.volumes.nifti import read_image
from mpscl_ray.data.volumes.preprocess import prepare_volume
from mpscl_ray.data.volumes.recipe import Recipe
from mpscl_ray.errors import ConfigError
from mpscl_ray.prepare.arguments import parse
from mpscl_ray.prepare.options import PrepareOptions
from mpscl_ray.prepare.run import prepare
from tests.raw_volumes import RAW_IDS, SMALL, made, mmwhs, options, refusal, volume, write


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return mmwhs(tmp_path / "in")


def test_two_modalities_become_two_datasets(source: Path) -> None:
    mmwhs(source, "mr", range(1001, 1005))
    folders = prepare(options(source), progress=False)
    assert set(folders) == {"ct", "mr"}
    assert sorted(path.name for path in (source.parent / "out").iterdir()) == ["ct", "mr"]
    manifest = load_manifest(folders["ct"])
    assert manifest.classes == ("background", "MYO", "LAC", "LVC", "AA")
    assert manifest.size == (12, 12)
    assert [len(manifest.split(split)) for split in ("train", "val", "test")] == [3, 2, 1]
    files = {path.relative_to(folders["ct"]).as_posix() for path in folders["ct"].rglob("*") if path.is_file()}
    maps = {case.label_map.file for case in manifest.cases if case.label_map is not None}
    names = {f"label_maps/{split}/labels.json" for split in ("train", "val", "test")}
    assert files == {"manifest.json", "pictures.html", *(case.file for case in manifest.cases), *maps, *names}
    for case in manifest.cases:
        arrays = read_case(folders["ct"], case)
        assert arrays["image"].shape == arrays["label"].shape == (case.slices, 12, 12)
        assert set(np.unique(arrays["label"])) == {0, 1, 2, 3, 4}
        assert case.spacing_mm == pytest.approx((1.5, 2.0 * 16 / 12, 1.5 * 16 / 12))


def test_a_dataset_is_synced_before_it_has_its_name(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a power cut: sync files, then their folders, then rename, then sync the parent folder."""
    synced: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
    folder, manifest = made(source)
    out, number = folder.parent, len(manifest.cases)
    assert synced.pop() == out, "when the dataset has its name"
    assert not any(path.is_relative_to(folder) for path in synced), "until then nothing is written where readers look"
    every = ["/".join(path.relative_to(out).parts[1:]) for path in synced]
    written = [path for path in every if not path.startswith("label_maps")]
    maps = {case.label_map.file for case in manifest.cases if case.label_map is not None}
    assert {
        path.replace(".partial", "").split(".nii.gz")[0].replace("/.", "/") + ".nii.gz"
        for path in every
        if ".nii.gz" in path
    } == maps
    assert {"label_maps/train", "label_maps/val", "label_maps/test"} <= set(every)
    assert sorted(written[:number]) == sorted(case.file for case in manifest.cases)
    assert sorted(written[number:-5]) == ["test", "train", "val"]
    assert written[-5:-3] == [f".pictures.html.partial-{os.getpid()}", ""]
    assert written[-3:] == [f".manifest.json.partial-{os.getpid()}", "", ""], "the folder with the manifest in it"


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


def test_the_range_is_that_of_the_training_cases(source: Path) -> None:
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


def test_the_manifest_lists_every_step_and_the_leak(source: Path) -> None:
    _, manifest = made(source, recipe=dataclasses.replace(SMALL, spacing_mm=(None, 2.0, 2.0)))
    text = "; ".join(manifest.steps)
    for part in ("205 MYO", "[550, 600, 850]", "fractions", "coronal", "2 mm", "16 x 16", "12 x 12", "98", "z-score"):
        assert part in text
    assert f"{manifest.scaling.low:g} to {manifest.scaling.high:g} mapped to [-1, 1]" in text
    assert not any(case.cropped_around_labels for case in manifest.cases)
    _, published = made(source, recipe=dataclasses.replace(SMALL, centre="labels"), overwrite=True)
    assert all(case.cropped_around_labels for case in published.cases)


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


def test_unlabelled_splits_get_no_labels_and_their_label_files_are_not_read(source: Path) -> None:
    _, labelled = made(source)
    for case in labelled.split("train"):
        (source / case.sources["label"]).write_bytes(b"this is no label map")
    folder, manifest = made(source, unlabelled=("train",), overwrite=True)
    assert [case.labelled for case in manifest.split("train")] == [False] * 3
    assert all(case.labelled for case in (*manifest.split("val"), *manifest.split("test")))
    assert "label" not in read_case(folder, manifest.split("train")[0])
    assert "labels left out of train" in manifest.steps
    # All crops are then placed without labels.
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
