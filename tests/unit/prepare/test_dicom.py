"""DICOM series as cases of a dataset: called by folders, chosen by patterns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpscl_ray.data.parquet_reader import read_case
from mpscl_ray.prepare.check_command import main
from tests.dicom_files import series, with_identifier
from tests.json_command import json_of
from tests.raw_volumes import made, refusal, volume, write

AFFINE = np.array([[-1.5, 0, 0, -5], [0, -1.25, 0, -6], [0, 0, 3, 10], [0, 0, 0, 1.0]])
OPTIONS: dict[str, Any] = {
    "layout": "folder",
    "modality": "mr",
    "labels": "205=MYO,420=LAC,500=LVC,820=AA",
    "image_pattern": "{case}",
    "label_pattern": "{case}/seg.nii.gz",
}


def cohort(folder: Path, path: str = "p{}") -> Path:
    for number in range(4):
        image, label = volume(number)
        case = series(folder / path.format(number), image.astype(np.int16))
        write(case / "seg.nii.gz", label, AFFINE)
    return folder


def test_a_series_gives_the_same_data_as_its_nifti_file(tmp_path: Path) -> None:
    cohort(tmp_path / "in")
    for number in range(4):
        image, label = volume(number)
        write(tmp_path / "nifti" / f"p{number}.nii.gz", image.astype(np.int16), AFFINE)
        write(tmp_path / "nifti" / f"p{number}_seg.nii.gz", label, AFFINE)
    first, manifest = made(tmp_path / "in", "mr", **OPTIONS)
    patterns = {"image_pattern": "{case}.nii.gz", "label_pattern": "{case}_seg.nii.gz"}
    second, other = made(tmp_path / "nifti", "mr", **{**OPTIONS, **patterns, "out": tmp_path / "other"})
    assert [case.id for case in manifest.cases] == [case.id for case in other.cases]
    for case, same in zip(manifest.cases, other.cases, strict=True):
        for part, values in read_case(first, case).items():
            np.testing.assert_array_equal(values, read_case(second, same)[part])
        assert case.spacing_mm == pytest.approx(same.spacing_mm)
    written = "".join(path.read_text(encoding="utf-8") for path in first.rglob("*.json"))
    assert not any(text in written for text in ("DOE", "ID7719", "1951"))


@pytest.mark.parametrize(
    ("path", "patterns"),
    [
        ("site/p{}/MR", ("site/{case}/MR", "site/{case}/MR/seg.nii.gz")),
        ("p{}/2011/MR", ("{case}/**/MR", "{case}/**/seg.nii.gz")),
        ("p{}", ("{case}/series3", "{case}/seg.nii.gz")),
    ],
)
def test_folders_of_any_depth(tmp_path: Path, path: str, patterns: tuple[str, str]) -> None:
    image_pattern, label_pattern = patterns
    options = {**OPTIONS, "image_pattern": image_pattern, "label_pattern": label_pattern}
    _, manifest = made(cohort(tmp_path / "in", path), "mr", **options)
    assert {case.id for case in manifest.cases} == {"p0", "p1", "p2", "p3"}


def test_a_folder_of_several_series(tmp_path: Path) -> None:
    folder = cohort(tmp_path / "in")
    image, _ = volume(9)
    series(folder / "p1", image.astype(np.int16)[:, :, :6], number=7, name="B{}")
    said = refusal(folder, **OPTIONS)
    assert said[0] == (
        "p1: holds 2 DICOM series: series3 (18 slices), series7 (6 slices); choose one by --image-pattern, e.g. "
        "'{case}/series3', or take the others out"
    )
    _, manifest = made(folder, "mr", **{**OPTIONS, "image_pattern": "{case}/series3"})
    assert len(manifest.cases) == 4
    assert any("not part of the layout, 1: p1/series7" in notice for notice in manifest.notices)


def test_check_lists_what_is_wrong_with_series(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = cohort(tmp_path / "in")
    (folder / "p0" / "IM0005.dcm").unlink()
    with_identifier(folder / "p1" / "IM0005.dcm", 16, b"1.2.840.10008.1.2.4.201")
    write(folder / "p2" / "seg.nii.gz", np.full((20, 24, 17), 205, np.int16), AFFINE)
    words = [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", value)]
    document = json_of(main, folder, *words, "--workers", "0")
    assert document["exit_code"] == 3
    (found,) = document["data"]
    wrong = {one["case"]: one["message"] for one in found["findings"] if one["level"] == "problem"}
    assert set(wrong) == {"p0", "p1", "p2"}
    for case, part in (("p0", "1 slice missing, it seems"), ("p1", "is compressed"), ("p2", "has shape")):
        assert part in wrong[case]
    words[words.index("mr")] = "ct"
    assert main([str(folder), *words, "--workers", "0"]) == 3
    assert f"{folder / 'p3'}: its DICOM header says MR, not CT" in capsys.readouterr().out
