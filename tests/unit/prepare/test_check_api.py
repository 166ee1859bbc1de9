"""check_dataset, the check command from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpscl_ray import ConfigError, check_dataset, prepare_dataset
from tests.raw_volumes import mmwhs


def test_check_finds_what_prepare_refuses_and_writes_nothing(tmp_path: Path) -> None:
    folder = mmwhs(tmp_path / "scans")
    (folder / "ct_train_1003_label.nii.gz").unlink()
    before = sorted(tmp_path.rglob("*"))
    (found,) = check_dataset(folder, "mmwhs", workers=0)
    (problem,) = found.problems
    assert (problem.case, problem.modality, problem.level) == ("ct_1003", "ct", "problem")
    assert problem.file == str(folder / "ct_train_1003_image.nii.gz")
    assert check_dataset([folder], "mmwhs", workers=0, unlabelled=("train",))[0].problems == []
    assert sorted(tmp_path.rglob("*")) == before
    prepare_dataset(folder, tmp_path / "data", "mmwhs", workers=0, unlabelled=("train",), split="0.5,0.25,0.25")
    (found,) = check_dataset(tmp_path / "data")
    assert (found.problems, found.about) == ([], "dataset of ct, 6 cases")


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("s3://bucket/scans", {"layout": "mmwhs"}, "is in a bucket, and check reads from a disk"),
        ("", {}, "no prepared dataset"),
        ("", {"labels": "1=LV"}, "labels: describes images"),
        ("", {"layout": "mmwhs", "modalty": "ct"}, "did you mean 'modality'"),
    ],
)
def test_check_refuses_what_it_cannot_do(data: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        check_dataset(data or tmp_path, **options)
