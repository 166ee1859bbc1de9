"""Files that are no label maps, or whose header is wrong, in folders to score."""

from __future__ import annotations

import shutil
import unicodedata
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mpscl_ray.data.volumes.nifti import read_label
from mpscl_ray.errors import DataError
from mpscl_ray.evaluate.file_pairs import find_pairs
from tests.scored_maps import AFFINE, NAMES, SHAPE, hearts, run, save, scored


def refused(folder: Path, *words: str) -> str:
    with pytest.raises(DataError) as caught:
        run(folder, *NAMES, *words)
    return str(caught.value)


@pytest.mark.parametrize("side", ["pred", "truth"])
def test_an_image_is_refused(side: str, cohort: Path) -> None:
    image = np.random.default_rng(0).integers(0, 200, SHAPE, np.int16)
    save(cohort / side / "c0.nii.gz", image)
    said = refused(cohort)
    assert "1 of 3 pairs" in said
    assert f"{cohort / side / 'c0.nii.gz'} looks like an image, not a label map: 197 values from 3 to 199" in said


def test_an_atlas_of_many_structures_is_none(tmp_path: Path) -> None:
    atlas, label = hearts(0)
    save(tmp_path / "truth/a.nii.gz", label)
    save(tmp_path / "pred/a.nii.gz", atlas)
    before = scored(tmp_path, *NAMES)
    blocks = np.arange(100).reshape(4, 5, 5).repeat(6, 0).repeat(4, 1).repeat(3, 2)[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    save(tmp_path / "pred/a.nii.gz", np.where(atlas == 0, blocks + 10, atlas).astype(np.uint8))
    assert scored(tmp_path, *NAMES) == before


@pytest.mark.parametrize("side", ["pred", "truth"])
@pytest.mark.parametrize("words", [(), ("--resample", "nearest")])
def test_a_lost_header_is_not_resampled(side: str, words: tuple[str, ...], cohort: Path) -> None:
    path = cohort / side / "c0.nii.gz"
    save(path, read_label(path).array.astype(np.uint8), np.eye(4))
    said = refused(cohort, *words)
    assert f"the header of {path} was probably lost" in said
    assert "--resample" not in said


def test_grids_that_do_not_overlap_are_not_resampled(cohort: Path) -> None:
    far = AFFINE.copy()
    far[0, 3] += 4000
    save(cohort / "pred/c0.nii.gz", hearts(0)[0], far)
    assert "they do not overlap" in refused(cohort, "--resample", "nearest")


def test_headers_that_contradict_themselves_are_scored_by_the_part_named(cohort: Path) -> None:
    before = scored(cohort, *NAMES)
    path = cohort / "truth/c0.nii.gz"
    image = nib.Nifti1Image(hearts(0)[1], AFFINE)
    image.set_sform(AFFINE, 2)
    image.set_qform(AFFINE @ np.diag([0.5, 0.5, 0.5, 1]), 1)
    nib.save(image, path)
    assert "--geometry sform or --geometry qform" in refused(cohort)
    assert scored(cohort, *NAMES, "--geometry", "sform") == before


def test_files_without_a_position_are_scored_with_an_assumed_spacing(tmp_path: Path) -> None:
    prediction, label = hearts(0)
    for side, array in (("pred", prediction), ("truth", label)):
        save(tmp_path / side / "a.nii.gz", array, np.diag([1.25, 1.5, 4.0, 1.0]))
    before = scored(tmp_path, *NAMES)
    for side in ("pred", "truth"):
        image = nib.load(tmp_path / side / "a.nii.gz")
        image.set_sform(None, 0)
        image.set_qform(None, 0)
        nib.save(image, tmp_path / side / "b.nii.gz")
        (tmp_path / side / "a.nii.gz").unlink()
        (tmp_path / side / "b.nii.gz").rename(tmp_path / side / "a.nii.gz")
    assert "--assume-spacing X,Y,Z" in refused(tmp_path)
    assert scored(tmp_path, *NAMES, "--assume-spacing", "1.25,1.5,4") == before
    assert scored(tmp_path, *NAMES, "--geometry", "pixdim") == before


def test_files_that_are_not_read_are_said(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = cohort / "pred"
    (folder / "c9.mgz").touch()
    (folder / "volumes.json").touch()
    (folder / "fold").mkdir()
    shutil.copy(folder / "c0.nii.gz", folder / "fold")
    assert run(cohort, *NAMES) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: not read")]
    assert f"not read in {folder}, 2: c9.mgz, fold/c0.nii.gz (only files in" in note
    assert "for those in folders give --prediction-pattern" in note
    (folder / "c0.nii.gz").rename(folder / "C0.NII.GZ")
    said = refused(cohort)
    assert "labels without a prediction, 1: c0.nii.gz" in said
    assert "C0.NII.GZ" in said


def test_endings_in_upper_case_are_read(cohort: Path) -> None:
    for path in (cohort / "pred").iterdir():
        path.rename(path.with_name(path.name.replace(".nii.gz", ".NII.GZ")))
    found = find_pairs(cohort / "pred", cohort / "truth").pairs
    assert [pair.case for pair in found] == ["c0", "c1", "c2"]
    assert found == find_pairs(cohort / "pred", cohort / "truth", "{case}.nii.gz", "{case}.NII.GZ").pairs
    assert run(cohort, *NAMES) == 0


def test_names_whose_accents_are_stored_apart_are_the_same(cohort: Path) -> None:
    before = scored(cohort, *NAMES)
    for side, form in (("pred", "NFD"), ("truth", "NFC")):
        (cohort / side / "c0.nii.gz").rename(cohort / side / unicodedata.normalize(form, "é0.nii.gz"))
    assert len(scored(cohort, *NAMES)) == len(before)
    patterns = (
        "--prediction-pattern",
        "{case}.nii.gz",
        "--label-pattern",
        unicodedata.normalize("NFD", "{case}.nii.gz"),
    )
    assert len(find_pairs(cohort / "pred", cohort / "truth", *patterns[1::2]).pairs) == 3


@pytest.mark.parametrize("side", ["pred", "truth"])
def test_segments_that_slicer_numbered_otherwise(side: str, cohort: Path) -> None:
    path = cohort / side / "c0.nii.gz"
    label = np.asanyarray(nib.load(path).dataobj).astype(np.uint8)
    path.unlink()
    header = (
        f"NRRD0004\ntype: uchar\ndimension: 3\nsizes: {' '.join(map(str, label.shape))}\n"
        "space: left-posterior-superior\nspace directions: (1,0,0) (0,1,0) (0,0,1)\nencoding: raw\n"
        "space origin: (0,0,0)\nSegment0_LabelValue:=1\nSegment0_Name:=LV\n\n"
    )
    (cohort / side / "c0.seg.nrrd").write_bytes(header.encode() + label.tobytes("F"))
    assert "c0.seg.nrrd calls its label 1 'LV', but by the label table 'LV' is 2" in refused(cohort)
