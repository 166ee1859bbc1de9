"""The check command: every problem of every case is listed, nothing is written, nothing good is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from mpscl_ray.data.dataset import load_manifest, save_manifest
from mpscl_ray.errors import ConfigError
from mpscl_ray.prepare.check_command import main
from tests.json_command import json_of
from tests.raw_volumes import made, mmwhs, volume, write

MMWHS = ("--layout", "mmwhs", "--workers", "0")
FOLDER = (
    *("--layout", "folder", "--modality", "mr", "--labels", "205=MYO,420=LAC,500=LVC,820=AA", "--workers", "0"),
    *("--image-pattern", "{case}_image.nii.gz", "--label-pattern", "{case}_label.nii.gz"),
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return mmwhs(tmp_path / "in")


def content(root: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file()}


def checked(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, list[str]]:
    """Exit code and the lines on standard output; makes sure that no file was made or changed."""
    root = Path(str(words[0])).parent
    before, folders = content(root), sorted(root.rglob("*"))
    code = main([str(word) for word in words])
    assert (content(root), sorted(root.rglob("*"))) == (before, folders)
    return code, capsys.readouterr().out.splitlines()


def problems(lines: list[str]) -> list[str]:
    return [line.removeprefix("  - ") for line in lines if line.startswith("  - ")]


def spoil(folder: Path) -> list[tuple[str, str]]:
    """Something else wrong with each of six cases; (file, part of the message) of each problem, both files of 1004."""
    files = {number: folder / f"ct_train_{number}_image.nii.gz" for number in range(1001, 1007)}
    files[1001].write_bytes(files[1001].read_bytes()[:-1000])
    write(files[1002], np.zeros((20, 24, 18), dtype=np.float32))
    (folder / "ct_train_1003_label.nii.gz").unlink()
    image, label = volume(1004, low=-1000.0)
    image[3, 3, 3] = np.nan
    label[0, 0, :3] = 421
    write(files[1004], image)
    write(folder / "ct_train_1004_label.nii.gz", label)
    write(folder / "ct_train_1005_label.nii.gz", np.zeros((5, 5, 5), dtype=np.int16))
    write(files[1006], volume(1006)[0])  # no air: not in Hounsfield units
    return [
        ("ct_train_1001_image.nii.gz", "is truncated"),
        ("ct_train_1002_image.nii.gz", "the intensity 0 in every voxel"),
        ("ct_train_1003_image.nii.gz", "case ct_1003 has no label (ct_train_1003_label.nii.gz)"),
        ("ct_train_1004_image.nii.gz", "beyond single precision in 1 voxel,"),
        ("ct_train_1004_label.nii.gz", "421 (3 voxels)"),
        ("ct_train_1005_label.nii.gz", "has shape (5, 5, 5)"),
        ("ct_train_1006_image.nii.gz", "--any-modality"),
    ]


def test_all_problems_of_all_cases(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = spoil(source)
    code, lines = checked(capsys, source, *MMWHS)
    assert code == 3
    for _, part in expected:
        assert sum(part in problem for problem in problems(lines)) == 1, part
    assert len(problems(lines)) == len(expected)
    assert lines[0] == f"{source}: layout mmwhs, 6 cases: 7 problems"
    assert lines[-1] == "7 problems to solve; nothing was written"


def test_json_names_the_file_of_each_problem(source: Path) -> None:
    expected = spoil(source)
    found = json_of(main, source, *MMWHS)
    (folder,) = found["data"]
    wrong = [one for one in folder["findings"] if one["level"] == "problem"]
    assert (found["exit_code"], found["problems"], folder["folder"]) == (3, 7, str(source))
    assert found["error"] == "7 problems to solve; nothing was written"
    assert sorted(Path(one["file"]).name for one in wrong) == [file for file, _ in expected]
    assert {one["modality"] for one in wrong} == {"ct"}
    assert {one["case"] for one in wrong} == {f"ct_{number}" for number in range(1001, 1007)}


def test_good_images(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ", ".join(f"ct_{number}" for number in range(1001, 1007))
    note = f"  note: ct: {names} have the same label map, though their images differ; give each its own"
    code, lines = checked(capsys, source, *MMWHS)
    assert (code, lines) == (0, [f"{source}: layout mmwhs, 6 cases: nothing is wrong", note])


def test_several_folders_and_none_ends_the_check(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = source.parent / "nothing"
    code, lines = checked(capsys, nothing, source, *MMWHS)
    assert (code, problems(lines)) == (3, [f"{nothing}: no such folder"])
    assert f"{source}: layout mmwhs, 6 cases: nothing is wrong" in lines


def test_copies_and_patients_of_which_the_split_decides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, name in enumerate(("p01_x", "p01_y", "p02_x", "p02_y", "p03_x")):
        image, label = volume(1 if name == "p03_x" else seed)
        write(tmp_path / "in" / f"{name}_image.nii.gz", image)
        write(tmp_path / "in" / f"{name}_label.nii.gz", label)
    code, lines = checked(capsys, tmp_path / "in", *FOLDER)
    assert code == 3
    names, copies = problems(lines)
    assert "may be of one patient by their names, 2 groups: p01_x, p01_y; p02_x, p02_y" in names
    assert copies.startswith("mr: the same image under several names: p01_y (undecided), p03_x (undecided); ")
    code, lines = checked(capsys, tmp_path / "in", *FOLDER, "--patient-pattern", "_(.)")
    assert (code, problems(lines)) == (3, [copies])
    code, lines = checked(capsys, tmp_path / "in", *FOLDER, "--patient-pattern", "^(p)")  # all of one patient
    assert (code, problems(lines)) == (0, [])
    assert any("note: mr: the same image under several names" in line for line in lines)


def test_a_class_that_no_case_shows_and_a_case_of_another_size(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(1001, 1007):
        image, label = volume(number, low=-1000.0)
        affine = np.diag([0.5, 0.5, 0.5, 1.0]) if number == 1006 else None
        write(source / f"ct_train_{number}_image.nii.gz", image, affine)
        write(source / f"ct_train_{number}_label.nii.gz", np.where(label == 820, 0, label).astype(np.int16), affine)
    code, lines = checked(capsys, source, *MMWHS)
    (missing,) = problems(lines)
    assert code == 3
    assert missing.startswith("ct: no training case shows the class AA")
    assert any("note: ct: the structures of ct_1006 are" in line for line in lines)
    assert checked(capsys, source, *MMWHS, "--allow-missing-classes")[0] == 0


@pytest.mark.parametrize(("unlabelled", "code"), [([], 3), (["--unlabelled", "train"], 0), (["--unlabelled"], 0)])
def test_cases_that_need_no_labels(
    source: Path, unlabelled: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "ct_train_1001_label.nii.gz").unlink()
    assert checked(capsys, source, *MMWHS, *unlabelled)[0] == code


def test_labels_that_are_there_are_read_if_a_split_may_need_them(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "ct_train_1001_label.nii.gz").unlink()
    write(source / "ct_train_1002_label.nii.gz", np.full((20, 24, 18), 7, dtype=np.int16))
    code, lines = checked(capsys, source, *MMWHS, "--unlabelled", "train")
    (problem,) = problems(lines)
    assert code == 3
    assert "ct_train_1002_label.nii.gz holds label ids" in problem
    assert checked(capsys, source, *MMWHS, "--unlabelled")[0] == 0


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "no prepared dataset, nor a folder of some .* for images give --layout"),
        (["--labels", "1=MYO"], "--labels: describes images, and without --layout"),
        ([word for word in FOLDER if word not in FOLDER[4:6]], "the meaning of the label values is not known"),
        ([*MMWHS, "--labels", "MYO"], "'MYO' is not ID=NAME"),
    ],
)
def test_wrong_options(source: Path, words: list[str], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        main([str(source), *words])


# ----------------------------------------------------------------------------------------------------- datasets


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A folder of two datasets."""
    mmwhs(tmp_path / "in")
    mmwhs(tmp_path / "in", "mr", range(1007, 1013))
    return made(tmp_path / "in")[0].parent


def test_good_datasets(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = checked(capsys, prepared)
    assert (code, problems(lines)) == (0, [])
    heads = [line for line in lines if not line.startswith(" ")]
    assert heads == [
        f"{prepared / 'ct'}: dataset of ct, 6 cases: nothing is wrong",
        f"{prepared / 'mr'}: dataset of mr, 6 cases: nothing is wrong",
        f"{prepared / 'ct'} and {prepared / 'mr'}: source ct, target mr: nothing is wrong",
    ]
    assert checked(capsys, prepared / "ct")[0] == 0


def test_damaged_datasets(prepared: Path) -> None:
    ct = load_manifest(prepared / "ct").cases
    flipped, missing = prepared / "ct" / ct[0].file, prepared / "ct" / ct[1].file
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    missing.unlink()
    (prepared / "mr" / "manifest.json").write_text("{")
    found = json_of(main, prepared)
    wrong = [one for folder in found["data"] for one in folder["findings"] if one["level"] == "problem"]
    assert (found["exit_code"], found["problems"]) == (3, 3)
    assert [one["file"] for one in wrong] == [str(flipped), str(missing), None]
    for one, part in zip(wrong, ("its SHA-256 is not", "missing, though", "no longer JSON"), strict=True):
        assert part in one["message"]


def test_damaged_label_maps(prepared: Path) -> None:
    maps = [prepared / "ct" / case.label_map.file for case in load_manifest(prepared / "ct").cases if case.label_map]
    write(maps[0], np.zeros((20, 24, 18), dtype=np.uint8))
    maps[1].write_bytes(maps[1].read_bytes()[:-30])
    maps[2].unlink()
    found = json_of(main, prepared / "ct")
    wrong = [one for one in found["data"][0]["findings"] if one["level"] == "problem"]
    assert found["exit_code"] == 3
    assert [one["file"] for one in wrong] == [str(path) for path in maps[:3]]
    for one, part in zip(wrong, ("its SHA-256 is not", "its SHA-256 is not", "missing, though"), strict=True):
        assert part in one["message"]


def test_what_only_the_manifest_can_tell(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = load_manifest(prepared / "ct")
    first, *others = manifest.cases
    voxels = tuple(count + 1 for count in first.class_voxels)
    changed = dataclasses.replace(first, class_voxels=voxels, patient=others[-1].patient)
    save_manifest(prepared / "ct", dataclasses.replace(manifest, cases=(changed, *others), size=(16, 16)))
    code, lines = checked(capsys, prepared / "ct", prepared / "mr")
    wrong = problems(lines)
    assert code == 3
    (sizes,) = [problem for problem in wrong if "slices of 12 x 12, the manifest says 16 x 16" in problem]
    assert "; the same of 5 more: " in sizes
    assert all(f"{case.id}.parquet" in sizes for case in manifest.cases)
    assert lines[-1] == "9 problems to solve; nothing was written"
    assert sum(f"the manifest says {voxels}" in problem for problem in wrong) == 1
    assert sum(f"patient {others[-1].patient} is in" in problem for problem in wrong) == 1
    assert sum("source 'ct' and target 'mr': slices of 16 x 16 and 12 x 12" in problem for problem in wrong) == 1
    assert len(wrong) == 4


def test_two_datasets_that_do_not_fit(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All reasons, where training names the first."""
    ct, mr = load_manifest(prepared / "ct"), load_manifest(prepared / "mr")
    classes = (*mr.classes[:2], "LV", *mr.classes[3:])
    save_manifest(prepared / "mr", dataclasses.replace(mr, classes=classes, cases=(*ct.cases[:1], *mr.cases)))
    code, lines = checked(capsys, prepared / "ct", prepared / "mr")
    pair = problems(lines)[2:]
    assert code == 3
    for file, problem in zip((ct.cases[0].file, ct.cases[0].label_map.file), problems(lines), strict=False):
        assert file in problem  # which the folder of mr does not hold
    assert ["the classes are" in pair[0], "the same images are in both, 1: " in pair[1], len(pair)] == [True, True, 2]
