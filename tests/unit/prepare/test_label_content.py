"""Label maps that do not belong to their image, which no header tells: refused, or said."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from mpscl_ray.errors import DataError
from mpscl_ray.prepare.label_content import better_placed, blank_slices, check_background
from tests.heart_scans import change, cohort, prepared, problems, scan

NAMES = ("background", "MYO", "LV")


def off_centre(seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    image, label = (np.roll(array, (3, 5), (0, 1))[:26, :26] for array in scan(seed))
    return image.astype(np.float32), label


def notices(folder: Path, **changes: object) -> str:
    return "\n".join(prepared(folder, **changes)[1].notices)


def test_ids_that_begin_with_1_for_background(tmp_path: Path) -> None:
    folder = cohort(tmp_path / "in")
    expected = [case.class_voxels for case in prepared(folder)[1].cases]
    for path in folder.glob("*_label.nii.gz"):
        change(path, lambda label: label + np.uint8(1))
    said = problems(folder, labels="1=MYO,2=LV,3=RV")
    assert "c0_label.nii.gz has no background: MYO covers 100 % of the border" in said
    assert "1=background" in said
    found = prepared(folder, labels="1=background,2=MYO,3=LV")[1]
    assert [case.class_voxels for case in found.cases] == expected


def test_an_inverted_label_map_is_said(tmp_path: Path) -> None:
    folder = cohort(tmp_path / "in")
    change(folder / "c3_label.nii.gz", lambda label: (label == 0).astype(np.uint8))
    assert "c3: MYO covers 100 % of the border of the volume" in notices(folder)


def test_a_structure_at_the_border_is_none(tmp_path: Path) -> None:
    _, label = scan(0)
    label[:8] = 1
    assert not check_background(label, NAMES, tmp_path)
    label[:] = 255
    assert not check_background(label, NAMES, tmp_path)


@pytest.mark.parametrize(
    ("axes", "signs", "how"),
    [
        ((0, 1, 2), (-1, 1, 1), "axis 0 mirrored"),
        ((0, 1, 2), (-1, -1, 1), "axis 0 and 1 mirrored"),
        ((1, 0, 2), (1, 1, 1), "its axes in the order 1, 0, 2"),
    ],
)
def test_a_turned_label_map_is_said(axes: tuple[int, ...], signs: tuple[int, ...], how: str) -> None:
    """With headers that agree, only the intensities tell; the turn that is named brings the map back."""
    image, label = off_centre()
    assert not better_placed(image, label)
    turned = label.transpose(axes)[tuple(slice(None, None, sign) for sign in signs)]
    assert how in better_placed(image, np.ascontiguousarray(turned))[0]


@pytest.mark.parametrize(("axis", "shift"), [(0, 3), (1, -6)])
def test_a_shifted_label_map_is_said(axis: int, shift: int) -> None:
    image, label = off_centre()
    said = better_placed(image, np.roll(label, shift, axis))
    assert "a shift by about" in said[0]
    assert f"along axis {axis}" in said[0]
    assert ("about -" in said[0]) == (shift > 0)


def test_maps_without_content_are_not_judged() -> None:
    image, label = off_centre()
    assert not better_placed(image, label * 0)
    assert not better_placed(image, np.full_like(label, 255))
    assert not better_placed(np.zeros_like(image), label)
    assert not better_placed(image[:1], label[:1])


def test_an_image_that_is_empty_where_it_is_labelled_is_said() -> None:
    image, label = off_centre()
    assert not blank_slices(image, label)
    image[:, :, 6:] = 0
    assert f"in {int(label[:, :, 6:].any((0, 1)).sum())} of its slices" in blank_slices(image, label)[0]


def test_a_class_that_few_cases_lack_is_said(tmp_path: Path) -> None:
    folder = cohort(tmp_path / "in")
    change(folder / "c2_label.nii.gz", lambda label: label * (label != 2))
    assert "c2: the class LV, which all others show, is absent" in notices(folder)
    for name in ("c3", "c4"):
        change(folder / f"{name}_label.nii.gz", lambda label: label * (label != 2))
    assert "which all others show" not in notices(folder, allow_missing_classes=True)


def segmentation(path: Path, label: NDArray[np.uint8], names: tuple[str, ...]) -> None:
    """Segments 1, 2, ... of 3D Slicer on the grid of the scans."""
    fields = "".join(
        f"Segment{number}_LabelValue:={number + 1}\nSegment{number}_Name:={name}\n" for number, name in enumerate(names)
    )
    header = (
        f"NRRD0004\ntype: uchar\ndimension: 3\nsizes: {' '.join(map(str, label.shape))}\n"
        "space: right-anterior-superior\nspace directions: (2,0,0) (0,2,0) (0,0,4)\nencoding: raw\n"
        f"space origin: (0,0,0)\n{fields}\n"
    )
    path.write_bytes(header.encode() + label.tobytes("F"))


def test_segments_that_slicer_numbered_otherwise(tmp_path: Path) -> None:
    folder = cohort(tmp_path / "in")
    for path in sorted(folder.glob("*_label.nii.gz")):
        label = np.asanyarray(nib.load(path).dataobj)
        path.unlink()
        swapped = path.name.startswith("c3")
        names = ("LV", "MYO") if swapped else ("myo", "LV")
        label = np.array([0, 2, 1], np.uint8)[label] if swapped else label
        segmentation(folder / path.name.replace(".nii.gz", ".seg.nrrd"), label, names)
    said = problems(folder, label_pattern="{case}_label.seg.nrrd")
    assert "c3_label.seg.nrrd calls its label 1 'LV', but by the label table 'LV' is 2" in said
    assert "c2_label" not in said
    (folder / "c3_label.seg.nrrd").unlink()
    (folder / "c3_image.nii.gz").unlink()
    assert len(prepared(folder, label_pattern="{case}_label.seg.nrrd")[1].cases) == 4


def test_names_whose_accents_are_stored_apart(tmp_path: Path) -> None:
    """macOS writes e and its accent as two characters, others as one."""
    folder = cohort(tmp_path / "in", tuple(f"Renée{number}" for number in range(5)))
    for path in folder.glob("*_label.nii.gz"):
        path.rename(path.with_name(unicodedata.normalize("NFD", path.name)))
    apart = unicodedata.normalize("NFD", "Renée0")
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": [apart, "Renée1"], "val": ["Renée2"], "test": ["Renée3", "Renée4"]}))
    found = prepared(folder, split=str(split))[1]
    assert [case.id for case in found.cases if case.split == "train"] == ["Renée0", "Renée1"]
    assert all(case.class_voxels for case in found.cases)


def test_a_label_map_without_background_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"heart\.nii has no background: LV covers 100 %"):
        check_background(np.full((4, 4, 4), 2, np.uint8), NAMES, tmp_path / "heart.nii")
