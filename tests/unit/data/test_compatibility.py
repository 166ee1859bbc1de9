"""Do two domains fit together? Faults of real data are found before training starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mpscl_ray.data.compatibility import check_pair, label_statistics, orientation_notice, pair_notices, pair_problems
from mpscl_ray.data.dataset import Case, Manifest, Scaling
from mpscl_ray.errors import DataError

CLASSES = ("background", "MYO", "LAC", "AA")


def labels(scale: float = 1.0) -> NDArray[np.uint8]:
    """Three structures in an asymmetric arrangement, (2, 100, 100)."""
    label = np.zeros((2, 100, 100), dtype=np.uint8)
    for value, (row, column) in enumerate([(30, 40), (60, 45), (70, 75)], start=1):
        size = round(8 * scale)
        row, column = round(50 + (row - 50) * scale), round(50 + (column - 50) * scale)
        label[:, row - size : row + size, column - size : column + size] = value
    return label


def case(name: str, split: str = "train", label: NDArray[np.uint8] | None = None, mm: float = 1.0) -> Case:
    return Case(
        id=name,
        patient=name,
        split=split,
        file=f"{split}/{name}.parquet",
        slices=2,
        labelled=label is not None,
        sha256="",
        bytes=0,
        content_sha256=f"content of {name}",
        geometry={},
        spacing_mm=(1.0, mm, mm),
        **label_statistics(label, len(CLASSES)),
        cropped_around_labels=False,
        sources={},
        notices=(),
    )


def domain(name: str, *cases: Case, **changes: Any) -> Manifest:
    values = {
        "version": 1,
        "modality": name,
        "classes": CLASSES,
        "size": (100, 100),
        "scaling": Scaling(-1, 1, "given"),
        "recipe": {},
        "splitting": {},
        "labels": {},
        "steps": (),
        "notices": (),
        "command": "",
        "product_version": "",
        "cases": cases,
    }
    return Manifest(**{**values, **changes})


def test_label_statistics_by_hand() -> None:
    label = np.zeros((2, 4, 10), dtype=np.uint8)
    label[0, 1, 2:4] = 1
    label[1, 0:2, 5] = 3
    found = label_statistics(label, 4)
    assert found["class_voxels"] == (76, 2, 0, 2)
    # Sum of all row centres 160, without the four labelled voxels 155; of all column centres 400, without them 383.
    background = (pytest.approx(155 / 76 / 4), pytest.approx(383 / 76 / 10))
    assert found["class_centres"] == (background, (0.375, 0.3), None, (0.25, 0.55))
    assert found["structure_width"] == pytest.approx(2**0.5)


def test_a_pair_that_fits_is_silent() -> None:
    source = domain("mr", case("a", label=labels()))
    target = domain("ct", case("b"), case("c", "val", labels(1.1)))
    assert check_pair(source, target) == []


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (domain("ct", case("b"), size=(80, 80)), "100 x 100 and 80 x 80"),
        (domain("ct", case("b"), classes=("background", "AA", "LAC", "MYO")), "same class names in the same order"),
        (domain("ct", case("b", "test")), "there is no training case"),
        (
            domain("ct", dataclasses.replace(case("b"), content_sha256="content of a")),
            "the same images are in both, 1: .*a = b",
        ),
    ],
)
def test_a_pair_that_cannot_be_trained_is_refused(target: Manifest, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_pair(domain("mr", case("a", label=labels())), target)


def test_structures_of_other_classes_are_not_compared() -> None:
    other = dataclasses.replace(case("b", label=labels(1.4)), class_voxels=(1, 1), class_centres=(None, (0.5, 0.5)))
    pair = domain("mr", case("a", label=labels())), domain("ct", other, classes=("background", "MYO"))
    for source, target in (pair, pair[::-1]):
        (problem,) = pair_problems(source, target)
        assert "the classes are" in problem
        assert pair_notices(source, target) == []


def test_a_source_needs_labels_and_a_target_needs_none() -> None:
    with pytest.raises(DataError, match="no training case is labelled"):
        check_pair(domain("mr", case("a")), domain("ct", case("b")))
    assert check_pair(domain("mr", case("a", label=labels())), domain("ct", case("b"), classes=())) == []


def test_the_same_patients_are_reported() -> None:
    source = domain("mr", case("a", label=labels()))
    target = domain("ct", dataclasses.replace(case("a"), content_sha256="another image"))
    (notice,) = check_pair(source, target)
    assert notice.startswith("1 patient in source and target (a)")


CORONAL, AXIAL = ({"orientation": "canonical", "slice_axis": axis} for axis in ("coronal", "axial"))
STORED = {"orientation": "stored", "slice_axis": "2"}


@pytest.mark.parametrize(
    ("recipes", "words"),
    [
        ((CORONAL, CORONAL), None),
        ((STORED, STORED), None),
        ((CORONAL, AXIAL), "cut in two ways, coronal and axial: "),
        ((STORED, AXIAL), "cut in two ways, along array axis 2 as stored and axial: "),
    ],
)
def test_slices_in_other_planes_are_reported(recipes: tuple[dict[str, str], ...], words: str | None) -> None:
    volumes = [dataclasses.replace(case(name, label=labels()), geometry={"axes": []}) for name in "ab"]
    source, target = (domain(one.id, one, recipe=recipe) for one, recipe in zip(volumes, recipes, strict=True))
    notices = check_pair(source, target)
    assert len(notices) == (words is not None)
    assert words is None or (words in notices[0] and "--slice-axis" in notices[0])
    slices = domain("b", dataclasses.replace(volumes[1], geometry={}), recipe=recipes[1])
    assert check_pair(source, slices) == []


@pytest.mark.parametrize(
    ("flip", "words"),
    [
        ((slice(None), slice(None, None, -1)), "with the rows flipped"),
        ((slice(None), slice(None), slice(None, None, -1)), "with the columns flipped"),
        ((slice(None), slice(None, None, -1), slice(None, None, -1)), "with rows and columns flipped"),
    ],
)
def test_a_flipped_target_is_reported(flip: Any, words: str) -> None:
    source = domain("mr", case("a", label=labels()))
    target = domain("ct", case("b"), case("c", "test", np.ascontiguousarray(labels()[flip])))
    (notice,) = check_pair(source, target)
    assert words in notice


def test_another_crop_is_no_flip() -> None:
    moved = np.roll(labels(), (12, -9), axis=(1, 2))
    assert orientation_notice([case("a", label=labels())], [case("b", label=moved)], ("one", "two")) is None


def test_a_wrong_spacing_is_reported() -> None:
    source = domain("bssfp", case("a", label=labels(), mm=1.25))
    target = domain("lge", case("b"), case("c", "val", labels(), mm=0.75))
    (notice,) = check_pair(source, target)
    assert "the spacing of one domain is likely wrong" in notice


def test_another_scale_is_reported() -> None:
    source = domain("mr", case("a", label=labels(1.4)))
    target = domain("ct", case("b"), case("c", "val", labels(0.9)))
    (notice,) = check_pair(source, target)
    assert "give both the same --spacing-mm, --crop and --size" in notice


def test_the_real_pair_with_a_wrong_spacing(reference_data: Path) -> None:
    """MS-CMRSeg: in pixels the hearts of both domains have one size, by their headers they differ 1.6 times."""
    import nibabel as nib

    def load(name: str, split: str) -> Case:
        volume = nib.load(reference_data / "mscmrseg" / name)
        array = np.asarray(volume.dataobj)
        mapped = sum((array == raw) * value for value, raw in enumerate((200, 500, 600), start=1)).astype(np.uint8)
        mm = float(volume.header.get_zooms()[0])
        return case(name, split, np.ascontiguousarray(mapped.transpose(2, 0, 1)), mm)

    source = domain("bssfp", *(load(f"bssfp/patient{k}_C0_manual.nii.gz", "train") for k in (10, 11, 12)))
    target = domain("lge", case("x"), *(load(f"lge/patient{k}_LGE_manual.nii.gz", "val") for k in (1, 2, 3)))
    (notice,) = check_pair(source, target)
    assert "likely wrong" in notice
