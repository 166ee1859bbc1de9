"""Voxels that nobody annotated, from label maps to the dataset and what is said of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.data.dataset import Manifest
from mpscl_ray.data.parquet_reader import read_case
from mpscl_ray.errors import ConfigError
from mpscl_ray.prepare.check_run import check_datasets
from mpscl_ray.prepare.summary import summary
from tests.raw_volumes import RAW_IDS, SMALL, made, options, volume, write

IGNORE = 5
NNUNET: dict[str, Any] = {"layout": "nnunet", "modality": "ct"}
NAMES = ("MYO", "LAC", "LVC", "AA")
HIDDEN = (slice(None, 7), slice(None), slice(None))
"""Part of a volume that is not annotated; structures reach into it, and so does the crop."""
CASES = 5


def nnunet(folder: Path, hidden: int | None, number: int | None = 1) -> Path:
    """A dataset in nnU-Net's layout; a part of each volume has the id ``hidden``, that of ``number`` alone if given."""
    for index in range(CASES):
        image, raw = volume(index, low=-1000.0)
        label = np.zeros(raw.shape, np.uint8)
        for value, own in enumerate(RAW_IDS, start=1):
            label[raw == own] = value
        if hidden is not None and number in (None, index):
            label[HIDDEN] = hidden
        write(folder / f"imagesTr/p{index}_0000.nii.gz", image)
        write(folder / f"labelsTr/p{index}.nii.gz", label)
    labels = {"background": 0} | {name: value for value, name in enumerate(NAMES, start=1)} | {"ignore": IGNORE}
    about = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": CASES, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(about))
    return folder


def arrays(made_dataset: tuple[Path, Manifest]) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    folder, manifest = made_dataset
    return {case.id: read_case(folder, case) for case in manifest.cases}


def test_an_ignore_label_becomes_a_value_of_its_own(tmp_path: Path) -> None:
    around_labels = replace(SMALL, centre="labels")
    background = made(nnunet(tmp_path / "background/in", 0), **NNUNET, recipe=around_labels)
    ignored = made(nnunet(tmp_path / "ignored/in", IGNORE), **NNUNET, recipe=around_labels)
    assert ignored[1].classes == ("background", *NAMES)
    for name, expected in arrays(background).items():
        found = arrays(ignored)[name]
        np.testing.assert_array_equal(found["image"], expected["image"])  # the crop is where it was
        hidden = found["label"] == NOT_ANNOTATED
        assert hidden.any() == (name == "p1")
        np.testing.assert_array_equal(np.where(hidden, 0, found["label"]), expected["label"])
    for one, other in zip(ignored[1].cases, background[1].cases, strict=True):
        assert one.class_voxels is not None
        assert other.class_voxels is not None
        assert one.class_centres is not None
        assert other.class_centres is not None
        assert one.class_voxels[1:] == other.class_voxels[1:]
        assert one.class_centres[1:] == other.class_centres[1:]
        assert one.structure_width == other.structure_width
        hidden = int((arrays(ignored)[one.id]["label"] == NOT_ANNOTATED).sum())
        assert one.class_voxels[0] == other.class_voxels[0] - hidden
        assert (one.sha256 == other.sha256) == (one.id != "p1")
    assert ignored[1].labels["not_annotated"] == [IGNORE]
    assert f"not annotated: label value {NOT_ANNOTATED}, which counts in no loss and no score" in ignored[1].steps
    assert "p1: 35.0 % of the voxels have the ignore label (not annotated) and count nowhere" in summary(ignored[0])
    assert [one.messages("problem") for one in check_datasets([ignored[0]], 0)] == [[]]


def test_an_option_names_such_ids_or_makes_them_background(tmp_path: Path) -> None:
    expected = made(nnunet(tmp_path / "ignored/in", IGNORE), **NNUNET)
    table = ",".join(f"{value}={name}" for value, name in enumerate(NAMES, start=1))
    folder = nnunet(tmp_path / "in", IGNORE)
    patterns = {"image_pattern": "imagesTr/{case}_0000.nii.gz", "label_pattern": "labelsTr/{case}.nii.gz"}
    plain = {"layout": "folder", "modality": "ct", **patterns}
    for number, labels in enumerate(
        ({"labels": table, "not_annotated_labels": "5"}, {"labels": f"{table},5=void"}), start=1
    ):
        found = made(folder, **plain, **labels, out=tmp_path / f"out{number}")
        assert [case.sha256 for case in found[1].cases] == [case.sha256 for case in expected[1].cases]
        assert found[1].labels["not_annotated"] == [IGNORE]
    background = made(nnunet(tmp_path / "background/in", 0), **NNUNET)
    found = made(folder, **NNUNET, ignore_labels="5", out=tmp_path / "out3")
    assert [case.sha256 for case in found[1].cases] == [case.sha256 for case in background[1].cases]
    assert found[1].labels["background"] == [IGNORE]
    assert "not_annotated" not in found[1].labels
    assert "--not-annotated-labels 5" in options(folder, **plain, not_annotated_labels="5").command()


def test_zero_may_mean_not_annotated(tmp_path: Path) -> None:
    """As in label maps with few annotated slices, in which the background has an id of its own."""
    folder = nnunet(tmp_path / "in", IGNORE, number=None)
    plain = {
        "layout": "folder",
        "modality": "ct",
        "image_pattern": "imagesTr/{case}_0000.nii.gz",
        "label_pattern": "labelsTr/{case}.nii.gz",
        "labels": "5=background,1=MYO,2=LAC,3=LVC,4=AA",
    }
    found = arrays(made(folder, **plain, not_annotated_labels="0"))
    assert {*np.unique(found["p0"]["label"])} == {0, 1, 2, 3, 4, NOT_ANNOTATED}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ignore_labels": "6,5", "not_annotated_labels": "5"}, "5 is in --ignore-labels, by which it is background"),
        ({"not_annotated_labels": "2"}, "--not-annotated-labels 2: 2 means LAC"),
        ({"not_annotated_labels": "x"}, "--not-annotated-labels 'x': expected comma-separated whole numbers"),
    ],
)
def test_ids_with_two_meanings_are_refused(given: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        made(nnunet(tmp_path / "in", IGNORE), **NNUNET, **given)


def test_a_volume_without_annotation_is_said(tmp_path: Path) -> None:
    folder = nnunet(tmp_path / "in", IGNORE)
    write(folder / "labelsTr/p1.nii.gz", np.full((20, 24, 18), IGNORE, np.uint8))
    _, manifest = made(folder, **NNUNET)
    (case,) = (case for case in manifest.cases if case.id == "p1")
    assert (case.class_voxels, case.structure_width) == ((0, 0, 0, 0, 0), None)
    assert any("labelled cases that show no structure, 1: p1" in notice for notice in manifest.notices)
