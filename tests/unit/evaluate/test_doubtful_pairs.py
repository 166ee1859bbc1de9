"""Scores of predictions with other ids, of copies of the labels, and of one file for several cases, are doubted."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.scored_maps import NAMES, hearts, run, save, swap


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    for seed in range(3):
        label = hearts(seed)[1]
        save(tmp_path / f"truth/c{seed}.nii.gz", label)
        save(tmp_path / f"pred/c{seed}.nii.gz", np.roll(label, 1, axis=0))
    return tmp_path


def said(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert run(folder, *NAMES, *words) == 0
    return "".join(line for line in capsys.readouterr().out.splitlines(True) if line.startswith("note: "))


def edit(folder: Path, change: object) -> None:
    for path in folder.glob("*.nii.gz"):
        save(path, change(np.asanyarray(nib.load(path).dataobj)))  # type: ignore[operator]


def test_predictions_with_the_ids_of_the_labels_are_not_doubted(
    cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(cohort, capsys) == ""


def test_ids_that_are_exchanged(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(cohort / "pred", swap)
    found = said(cohort, capsys)
    assert "predictions seem to have other ids: 2 fits MYO" in found
    assert "--prediction-labels 1=LV,2=MYO" in found
    assert said(cohort, capsys, "--prediction-labels", "1=LV,2=MYO") == ""


def test_ids_that_are_shifted(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(cohort / "pred", lambda label: label + np.uint8(1))
    assert "--prediction-labels 2=MYO,3=LV" in said(cohort, capsys)


def test_copies_of_labels_and_one_prediction_for_all(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(cohort / "truth/c0.nii.gz", cohort / "pred/c0.nii.gz")
    assert "equal their label in every voxel, as copies of it do, 1: c0\n" in said(cohort, capsys)
    shutil.copy(cohort / "pred/c1.nii.gz", cohort / "pred/c2.nii.gz")
    assert "the same file is the prediction of c1, c2" in said(cohort, capsys)
    edit(cohort / "pred", lambda label: label * np.uint8(0))
    assert "prediction of" not in said(cohort, capsys)
