"""Folds: each patient is for test once, each fold is a dataset like any other, and nothing of its test trains it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpscl_ray import prepare_dataset
from mpscl_ray.data.dataset import Manifest, fold_numbers, load_manifest, save_manifest
from mpscl_ray.data.label_map_files import read_label_map
from mpscl_ray.data.parquet_reader import SplitFiles, read_case
from mpscl_ray.errors import ConfigError, DataError, StorageError
from mpscl_ray.prepare import check_command, command
from mpscl_ray.prepare.arguments import parse
from mpscl_ray.prepare.run import prepare
from mpscl_ray.prepare.splits import Member, split_folds
from tests.json_command import json_of
from tests.raw_volumes import made, mmwhs, options, refusal, volume, write

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven patients; the intensities of each have another spread, so that ranges of training cases differ."""
    folder = tmp_path_factory.mktemp("folds") / "in"
    for number in range(1001, 1008):
        image, label = volume(number, low=-1000.0)
        image[8:10, 8:10, 8:10] -= 40 * (number - 1000)
        write(folder / f"ct_train_{number}_image.nii.gz", image)
        write(folder / f"ct_train_{number}_label.nii.gz", label)
    return folder


@pytest.fixture(scope="module")
def folds(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Manifest]]:
    out = tmp_path_factory.mktemp("out")
    folder = Path(str(prepare(options(source, folds=3, split=None, out=out), progress=False)["ct"]))
    return folder, [load_manifest(folder / f"fold{number}") for number in range(3)]


# -------------------------------------------------------------------------------------------------------- splits


@given(patients=st.integers(5, 30), scans=st.integers(1, 3), count=st.integers(2, 5), seed=st.integers(0, 5))
def test_every_patient_is_for_test_once(patients: int, scans: int, count: int, seed: int) -> None:
    members = [Member(f"p{k:02d}_{scan}", f"p{k:02d}") for k in range(patients) for scan in range(scans)]
    owner = {member.case: member.patient for member in members}
    found = split_folds(members, count, (0.8, 0.2, 0), seed)
    tested = [sorted({owner[case] for case in splitting.cases["test"]}) for splitting in found]
    assert sorted(itertools.chain(*tested)) == sorted(set(owner.values()))
    assert max(map(len, tested)) - min(map(len, tested)) <= 1
    for splitting in found:
        sets = [{owner[case] for case in splitting.cases[split]} for split in SPLITS]
        assert sum(map(len, sets)) == patients == len(set.union(*sets))
        assert sum(map(len, splitting.cases.values())) == len(members)
        assert splitting.drawn
    assert split_folds(members[::-1], count, (0.8, 0.2, 0), seed) == found


def test_too_few_patients() -> None:
    members = [Member(f"p{k}", f"p{k}") for k in range(4)]
    with pytest.raises(DataError, match=r"^--folds 5: there are 4 patients.* give --folds 4 or less$"):
        split_folds(members, 5, (0.8, 0.2, 0), 0)


# ------------------------------------------------------------------------------------------------------- dataset


def test_files_are_shared_and_each_fold_is_recorded(folds: tuple[Path, list[Manifest]]) -> None:
    folder, manifests = folds
    names = [f"ct_{number}" for number in range(1001, 1008)]
    assert sorted(path.name for path in folder.iterdir()) == [
        *("cases", "fold0", "fold1", "fold2", "label_maps", "pictures.html")
    ]
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet")) == [
        f"cases/{name}.parquet" for name in names
    ]
    assert [[path.name for path in (folder / f"fold{number}").iterdir()] for number in range(3)] == [
        ["manifest.json"]
    ] * 3
    for number, manifest in enumerate(manifests):
        assert sorted(case.id for case in manifest.cases) == names
        about = {key: manifest.splitting[key] for key in ("method", "fold", "folds", "seed")}
        assert about == {"method": "folds", "fold": number, "folds": 3, "seed": 0}
        assert f"split by patient: fold {number} of 3" in manifest.steps
        assert parse(manifest.command.split()[3:]).folds == 3
    assert len({manifest.fingerprint for manifest in manifests}) == 3
    page = (folder / "pictures.html").read_text(encoding="utf-8")
    assert "fold2" in page
    assert "undecided" not in page


def test_a_fold_reads_as_a_plain_preparation_with_the_same_split_bit_for_bit(
    folds: tuple[Path, list[Manifest]], source: Path, tmp_path: Path
) -> None:
    folder, manifests = folds
    for number, manifest in enumerate(manifests):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps({split: [case.id for case in manifest.split(split)] for split in SPLITS}))
        plain, expected = made(source, split=str(file), out=tmp_path / f"plain{number}")
        fold = folder / f"fold{number}"
        assert manifest.scaling == expected.scaling
        assert manifest.notices == expected.notices
        for one, other in zip(manifest.cases, expected.cases, strict=True):
            arrays, wanted = read_case(fold, one), read_case(plain, other)
            for name, array in wanted.items():
                assert arrays[name].dtype == array.dtype
                assert np.array_equal(arrays[name], array)
            assert np.array_equal(read_label_map(fold, one), read_label_map(plain, other))
            place = {"file": "", "sha256": "", "bytes": 0, "label_map": None, "scale_by": None}
            assert dataclasses.replace(one, **place) == dataclasses.replace(other, **place)
        for split in SPLITS:
            files, other_files = (SplitFiles.find(at, split, labels=True) for at in (fold, plain))
            rows = np.arange(files.rows)[::-3]
            for name, array in other_files.read(rows).items():
                assert np.array_equal(files.read(rows)[name], array)
            assert np.array_equal(files.foreground_rows(), other_files.foreground_rows())


def test_the_range_of_a_fold_is_that_of_its_training_cases(source: Path, tmp_path: Path) -> None:
    """The darkest patient alone is changed: ranges move in the folds that train on it, and in no other."""
    changed = tmp_path / "in"
    shutil.copytree(source, changed)
    image, _ = volume(1007, low=-1000.0)
    image[8:11, 8:12, 8:12] -= 1500
    write(changed / "ct_train_1007_image.nii.gz", image)
    ranges = []
    for number, folder in enumerate((source, changed)):
        out = prepare(
            options(folder, folds=3, split=None, out=tmp_path / str(number), any_modality=True), progress=False
        )["ct"]
        ranges.append([load_manifest(out / f"fold{fold}") for fold in range(3)])
    for before, after in zip(*ranges, strict=True):
        trains = "ct_1007" in {case.id for case in after.split("train")}
        assert (before.scaling != after.scaling) == trains
    assert len({manifest.scaling for manifest in ranges[1]}) > 1


def test_released_slices_in_folds_are_those_of_their_files(tmp_path: Path) -> None:
    """They are scaled already; in a file of folds they are not, which costs a rounding."""
    random = np.random.default_rng(0)
    slices = random.uniform(-1, 1, size=(8, 10, 8))
    for number, array in enumerate(slices):
        for name, content in (
            (f"train_ct/ct_train_slice{number}.npy", array),
            (f"gt_train_ct/ct_train_slice{number}_gt.npy", random.integers(0, 5, size=(10, 8)).astype(np.float64)),
        ):
            (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            np.save(tmp_path / "in" / name, content)
    out = prepare_dataset(tmp_path / "in", tmp_path / "out", "npy", folds=2, group_slices=2, patient_pattern="(.+)")[
        "ct"
    ]
    for fold in fold_numbers(out):
        manifest = load_manifest(out / f"fold{fold}")
        assert dataclasses.astuple(manifest.scaling) == (-2.8, 3.2, "published (SIFA, MPSCL)")
        found = {case.id: read_case(out / f"fold{fold}", case)["image"] for case in manifest.cases}
        together = np.concatenate([found[name] for name in sorted(found)])
        np.testing.assert_allclose(together, slices, atol=1e-6)


def test_hashed_names(source: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.json"
    folder = Path(str(prepare(options(source, folds=2, split=None, hash_ids=ids), progress=False)["ct"]))
    text = (folder / "fold0" / "manifest.json").read_text(encoding="utf-8")
    names = json.loads(ids.read_text(encoding="utf-8"))["names"]
    assert "ct_100" not in text
    patients = json.loads(text)["splitting"]["patients"]
    assert {names[one] for split in patients.values() for one in split} == {f"ct_{k}" for k in range(1001, 1008)}
    shutil.rmtree(folder)


# ------------------------------------------------------------------------------------------------------ commands


def words(source: Path, out: Path, *more: str) -> list[str]:
    return [
        *(str(source), "--layout", "mmwhs", "--crop", "16,16", "--size", "12,12", "--workers", "0"),
        *("--no-pictures", "--out", str(out), *more),
    ]


def test_the_command_says_the_folds_and_replaces_them_only_when_told(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command.main(words(source, out, "--folds", "3", "--seed", "4")) == 0
    text = capsys.readouterr().out
    assert f"ct: {out / 'ct'}, 3 folds that share the files of 7 cases" in text
    assert f"next: python -m mpscl_ray.compare --folds --data {out / 'ct'} OTHER" in text
    assert load_manifest(out / "ct" / "fold1").splitting["seed"] == 4
    with pytest.raises(ConfigError, match="there is a finished dataset already; give --overwrite"):
        command.main(words(source, out, "--folds", "3"))
    assert command.main(words(source, out, "--folds", "2", "--overwrite")) == 0
    assert fold_numbers(out / "ct") == [0, 1]
    assert command.main(words(source, out, "--overwrite", "--split", "0.6,0.2,0.2")) == 0
    assert fold_numbers(out / "ct") == []
    assert command.main(words(source, out, "--folds", "2", "--overwrite")) == 0
    with pytest.raises(DataError, match=r"ct: holds the datasets fold0, fold1; give one of them, e\.g\. .*fold0$"):
        load_manifest(out / "ct")
    (out / "other").mkdir()
    (out / "other" / "cases").mkdir()
    with pytest.raises(StorageError, match="something else than a dataset"):
        prepare(options(source, folds=2, split=None, out=out, layout="folder", modality="other", **FOLDER))


FOLDER: dict[str, Any] = {
    "image_pattern": "{case}_image.nii.gz",
    "label_pattern": "{case}_label.nii.gz",
    "labels": "205=MYO,420=LAC,500=LVC,820=AA",
}


def test_json_lists_each_fold_as_a_dataset(source: Path, tmp_path: Path) -> None:
    document = json_of(command.main, *words(source, tmp_path / "out", "--folds", "3"))
    assert [one["folder"] for one in document["datasets"]] == [str(tmp_path / "out/ct" / f"fold{k}") for k in range(3)]
    tested = [case for one in document["datasets"] for case in one["splits"]["test"]["cases"]]
    assert sorted(tested) == [f"ct_{number}" for number in range(1001, 1008)]


def test_check_finds_what_is_wrong_with_a_fold(
    folds: tuple[Path, list[Manifest]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data" / "ct"
    shutil.copytree(folds[0], folder)
    assert check_command.main([str(folder / "fold1")]) == 0
    assert check_command.main([str(tmp_path / "data")]) == 0
    assert "fold2: dataset of ct, 7 cases: nothing is wrong" in capsys.readouterr().out
    file = folder / "cases" / "ct_1003.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert check_command.main([str(folder / "fold1")]) == 3
    assert "cases/ct_1003.parquet: damaged or replaced: its SHA-256" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folds": 1}, r"^--folds 1: expected 2 or more, usually 5"),
        ({"split": "splits.json"}, r"^--folds 3 draws the patients .* leave out --split splits\.json$"),
        ({"split": "mmwhs"}, r"leave out --split mmwhs$"),
        ({"fold": 0}, r"leave out --fold 0$"),
        ({"split": "0.7,0.1,0.2"}, r"^--split 0\.7,0\.1,0\.2: with --folds 3 .* e\.g\. --split 0\.9,0\.1,0$"),
        ({"transductive": True}, r"^--folds 3 with --transductive: the test patients .* leave out one"),
        ({"unlabelled": ("train",)}, r"^--unlabelled train: with --folds 3 a case is in another split of each"),
    ],
)
def test_what_contradicts_folds(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        options(tmp_path, **{"folds": 3, "split": None, **changes})


def test_data_that_cannot_be_folded(tmp_path: Path) -> None:
    few = mmwhs(tmp_path / "few", numbers=range(1001, 1004))
    (problem,) = refusal(few, folds=5, split=None)
    assert problem.startswith("ct: --folds 5: there are 3 patients")
    (few / "ct_train_1002_label.nii.gz").unlink()
    problems = refusal(few, folds=3, split="1,0,0")
    assert problems[0] == "ct: case ct_1002 has no label (ct_train_1002_label.nii.gz)"
    assert "all labels with --unlabelled" in problems[1]
    folder = prepare(options(few, folds=3, split="1,0,0", unlabelled=SPLITS), progress=False)["ct"]
    assert not any(case.labelled for case in load_manifest(folder / "fold0").cases)


def test_the_test_cases_of_an_nnunet_folder_are_in_no_fold(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for number in range(5):
        image, label = volume(number)
        part = "Tr" if number < 4 else "Ts"
        write(folder / f"images{part}" / f"heart_{number}_0000.nii.gz", image)
        write(folder / f"labels{part}" / f"heart_{number}.nii.gz", label)
    labels = {"background": 0, "MYO": 205, "LAC": 420, "LVC": 500, "AA": 820}
    (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "MRI"}, "labels": labels}))
    out = prepare(options(folder, layout="nnunet", folds=2, split="1,0,0"), progress=False)["mr"]
    manifest = load_manifest(out / "fold0")
    assert {case.id for case in manifest.cases} == {f"heart_{number}" for number in range(4)}
    assert "test cases of imagesTs, in no fold, 1: heart_4" in manifest.notices


def test_two_names_of_a_scan_are_one_problem(tmp_path: Path) -> None:
    source = mmwhs(tmp_path / "in", numbers=range(1001, 1006))
    for kind in ("image", "label"):
        shutil.copy(source / f"ct_train_1002_{kind}.nii.gz", source / f"ct_train_1005_{kind}.nii.gz")
    (problem,) = refusal(source, folds=5, split=None)
    assert "the same image under several names: ct_1002 (undecided), ct_1005 (undecided)" in problem


def test_a_class_that_one_fold_never_trains_on(tmp_path: Path) -> None:
    source = mmwhs(tmp_path / "in", numbers=range(1001, 1006))
    for number in range(1001, 1005):
        _, label = volume(number)
        write(source / f"ct_train_{number}_label.nii.gz", np.where(label == 820, 0, label).astype(np.int16))
    problems = refusal(source, folds=5, split="1,0,0")
    assert len(problems) == 1
    assert "fold" in problems[0]
    assert "no training case shows the class AA; check" in problems[0]


# ---------------------------------------------------------------------------------------------------- safe paths


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"file": "../../cases/ct_1001.parquet"},
            r"names the file '\.\./\.\./cases/ct_1001\.parquet', expected '\.\./c",
        ),
        ({"file": "../cases/ct_1002.parquet"}, r"expected '\.\./cases/ct_1001\.parquet'"),
        ({"file": "/etc/passwd"}, r"names the file '/etc/passwd'"),
        ({"scale_by": None}, r"names the file '\.\./cases/ct_1001\.parquet', expected '(train|val|test)/ct_1001"),
        ({"scale_by": (0.0, 1.0)}, r"'ct_1001' is scaled by \(0\.0, 1\.0\), not as the manifest says"),
        ({"id": "../ct_1001"}, r"String should match pattern"),
        (
            {"label_map": "../../x.nii.gz"},
            r"names the file '\.\./\.\./x\.nii\.gz', expected '\.\./label_maps/cases/ct_1",
        ),
    ],
)
def test_a_manifest_names_only_files_of_its_folds(
    change: dict[str, Any], message: str, folds: tuple[Path, list[Manifest]], tmp_path: Path
) -> None:
    manifest = folds[1][0]
    (case,) = (case for case in manifest.cases if case.id == "ct_1001")
    assert case.label_map is not None
    if "label_map" in change:
        change = {"label_map": dataclasses.replace(case.label_map, file=change["label_map"])}
    cases = tuple(dataclasses.replace(one, **change) if one is case else one for one in manifest.cases)
    save_manifest(tmp_path, dataclasses.replace(manifest, cases=cases))
    with pytest.raises(DataError, match=message):
        load_manifest(tmp_path)
