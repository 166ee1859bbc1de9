"""Hashes instead of names: no name of a case, a patient or a file is anywhere in a dataset that was prepared so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mpscl_ray.data.dataset import load_manifest
from mpscl_ray.errors import ConfigError
from mpscl_ray.prepare.command import main
from tests.raw_volumes import mmwhs

WORDS = ("--layout", "mmwhs", "--workers", "0", "--crop", "none", "--range", "estimate")


def prepare(source: Path, out: Path, *words: str) -> int:
    return main([str(source), "--out", str(out), *WORDS, *words])


def test_no_name_is_left(tmp_path: Path) -> None:
    source = mmwhs(tmp_path / "in")
    (source / "DOE_JANE_19510203.txt").write_text("a stray file")
    assert prepare(source, tmp_path / "plain") == 0
    assert prepare(source, tmp_path / "hashed", "--hash-ids", str(tmp_path / "ids.json")) == 0
    names = {case.id for case in load_manifest(tmp_path / "plain" / "ct").cases}
    patients = {case.patient for case in load_manifest(tmp_path / "plain" / "ct").cases}
    plain = (tmp_path / "plain" / "ct" / "manifest.json").read_bytes()
    looked_for = re.compile("|".join([*names, *patients, "DOE", r"train_\d+_image"]).encode())
    assert len(looked_for.findall(plain)) > 3 * len(names)
    files = [path for path in (tmp_path / "hashed" / "ct").rglob("*") if path.is_file()]
    assert len(files) > len(names)
    for path in files:
        assert not looked_for.search(str(path.relative_to(tmp_path / "hashed")).encode()), path
        text = path.read_bytes()
        if path.suffix == ".html":
            text = re.sub(rb"base64,[\w+/=]+", b"", text)
        assert not looked_for.search(text), (path, looked_for.search(text))
    kept = json.loads((tmp_path / "ids.json").read_text(encoding="utf-8"))
    found = load_manifest(tmp_path / "hashed" / "ct").cases
    assert {kept["names"][case.id] for case in found} == names
    assert {kept["names"][case.patient] for case in found} == patients
    assert (tmp_path / "ids.json").stat().st_mode & 0o077 == 0


def test_the_same_file_gives_the_same_hashes_and_a_new_one_others(tmp_path: Path) -> None:
    source = mmwhs(tmp_path / "in")
    for out, file in (("a", "ids"), ("b", "ids"), ("c", "other")):
        assert prepare(source, tmp_path / out, "--no-pictures", "--hash-ids", str(tmp_path / f"{file}.json")) == 0
    one, same, other = ({case.id for case in load_manifest(tmp_path / out / "ct").cases} for out in "abc")
    assert one == same
    assert not one & other


def test_a_file_that_is_something_else_is_refused(tmp_path: Path) -> None:
    source = mmwhs(tmp_path / "in")
    (tmp_path / "ids.json").write_text('{"train": []}')
    with pytest.raises(ConfigError, match=r"ids\.json: holds no salt"):
        prepare(source, tmp_path / "out", "--hash-ids", str(tmp_path / "ids.json"))
    assert not (tmp_path / "out" / "ct").exists()
