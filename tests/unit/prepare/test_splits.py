"""Splits are by patient, reproducible, and have no patient twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.prepare.splits import (
    PUBLISHED_TEST,
    Member,
    overlaps,
    read_split_file,
    split_fractions,
    split_listed,
    split_published,
)


def members(count: int, scans: int = 1) -> list[Member]:
    return [Member(f"p{k:02d}_{scan}", f"p{k:02d}") for k in range(count) for scan in range(scans)]


@pytest.mark.parametrize(("modality", "test"), [("ct", (1003, 1008, 1014, 1019)), ("mr", (1007, 1009, 1018, 1019))])
def test_the_published_split(modality: str, test: tuple[int, ...]) -> None:
    cases = [Member(f"{modality}_{number}", f"{modality}_{number}") for number in range(1001, 1021)]
    found = split_published(cases, modality)
    assert found.cases["test"] == tuple(f"{modality}_{number}" for number in test)
    assert {name: len(names) for name, names in found.cases.items()} == {"train": 14, "val": 2, "test": 4}
    assert len({name for names in found.cases.values() for name in names}) == 20
    assert split_published(cases[::-1], modality).cases == found.cases
    assert found.notices == ()


def test_the_published_split_of_a_part() -> None:
    cases = [Member(f"ct_{number}", f"ct_{number}") for number in range(1001, 1009)]
    found = split_published(cases, "ct")
    assert found.cases["test"] == ("ct_1003", "ct_1008")
    assert found.cases["val"] == ("ct_1007",)
    assert found.notices == ("published test volumes that are not there: 1014, 1019",)


def test_the_published_split_needs_its_volumes() -> None:
    with pytest.raises(DataError, match="none of the published test volumes 1003, 1008, 1014, 1019"):
        split_published(members(5), "ct")
    with pytest.raises(DataError, match="knows ct and mr, not 'lge'"):
        split_published(members(5), "lge")
    assert set(PUBLISHED_TEST) == {"ct", "mr"}


@given(
    patients=st.integers(3, 40),
    scans=st.integers(1, 3),
    seed=st.integers(0, 5),
    weights=st.tuples(*[st.integers(1, 20)] * 3),
)
def test_fractions_keep_patients_together(patients: int, scans: int, seed: int, weights: tuple[int, int, int]) -> None:
    fractions = [weight / sum(weights) for weight in weights]
    cases = members(patients, scans)
    found = split_fractions(cases, fractions, seed).cases
    owner = {member.case: member.patient for member in cases}
    sets = {split: {owner[name] for name in names} for split, names in found.items()}
    assert sum(map(len, found.values())) == len(cases)
    assert sum(map(len, sets.values())) == patients
    for split, fraction in zip(("train", "val", "test"), fractions, strict=True):
        assert len(sets[split]) >= 1
        # Rounding moves a split by less than one; so does the one patient that every split gets.
        assert abs(len(sets[split]) - fraction * patients) < 3


def test_fractions_by_hand_and_by_seed() -> None:
    found = split_fractions(members(20), [0.7, 0.1, 0.2], 0)
    assert [len(found.cases[split]) for split in ("train", "val", "test")] == [14, 2, 4]
    assert split_fractions(members(20)[::-1], [0.7, 0.1, 0.2], 0).cases == found.cases
    assert split_fractions(members(20), [0.7, 0.1, 0.2], 1).cases != found.cases
    assert split_fractions(members(3), [1.0, 0.0, 0.0], 0).cases["train"] == ("p00_0", "p01_0", "p02_0")


@pytest.mark.parametrize("fractions", [[0.7, 0.3], [0.7, 0.2, 0.2], [1.2, -0.2, 0.0], [float("nan"), 0.5, 0.5]])
def test_wrong_fractions(fractions: list[float]) -> None:
    with pytest.raises(ConfigError, match="three fractions"):
        split_fractions(members(10), fractions, 0)


def test_too_few_patients_for_the_splits() -> None:
    with pytest.raises(DataError, match="2 patients cannot fill 3 splits"):
        split_fractions(members(2, scans=5), [0.6, 0.2, 0.2], 0)


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_a_split_file_for_one_or_more_modalities(tmp_path: Path) -> None:
    one = write(tmp_path / "one.json", {"train": ["p00", 7], "test": ["p01"]})
    assert read_split_file(one, "mr") == {"train": ["p00", "7"], "val": [], "test": ["p01"]}
    two = write(tmp_path / "two.json", {"mr": {"train": ["a"]}, "ct": {"test": ["b"]}})
    assert read_split_file(two, "ct") == {"train": [], "val": [], "test": ["b"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ('{"train": ["a"], "train": ["b"]}', "'train' is there twice"),
        ([], "found list"),
        ({}, "expected lists under train, val and test"),
        ({"training": ["a"]}, "found 'training'"),
        ({"train": "a"}, "'train' must be a list"),
        ({"train": ["a", "b", "a"]}, "listed twice under 'train': a"),
    ],
)
def test_wrong_split_files(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_split_file(write(tmp_path / "split.json", content), "mr")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_split_file(tmp_path / "nowhere.json", "mr")


def test_lists_name_patients_or_cases() -> None:
    found = split_listed(members(4, scans=2), {"train": ["p00", "p01_1"], "test": ["p03"]}, "a file")
    assert found.cases == {"train": ("p00_0", "p00_1", "p01_1"), "val": (), "test": ("p03_0", "p03_1")}
    assert found.notices == ("cases in no split, left out, 3: p01_0, p02_0, p02_1",)
    with pytest.raises(DataError, match="ids that no case has: train: p09, test: p10; known patients: p00, p01"):
        split_listed(members(2), {"train": ["p09"], "test": ["p10"]}, "a file")


def test_a_patient_in_two_splits_is_named() -> None:
    entries = [("train", "a_1", "a", "h1"), ("test", "a_2", "a", "h2"), ("val", "b_1", "b", "h3")]
    forbidden, copies = overlaps(entries)
    assert forbidden == ["patient a is in test and train"]
    assert copies == []


def test_the_same_image_under_two_names_is_found() -> None:
    entries = [
        ("train", "a", "a", "same"),
        ("test", "b", "b", "same"),
        ("train", "c", "c", "x"),
        ("train", "d", "d", "x"),
    ]
    forbidden, copies = overlaps(entries)
    assert forbidden == ["the same image under several names: b (test), a (train)"]
    assert copies == ["the same image under several names: c (train), d (train)"]


def test_transductive_allows_train_with_one_held_out_split() -> None:
    allowed = [("train", "a", "a", "h"), ("val", "a", "a", "h"), ("train", "b", "b", "i"), ("test", "b", "b", "i")]
    assert overlaps(allowed)[0] != []
    assert overlaps(allowed, transductive=True) == ([], [])
    forbidden, _ = overlaps([*allowed, ("test", "a", "a", "h")], transductive=True)
    assert forbidden == ["patient a is in test, train and val"]
