"""A model file is opened safely: what is not one is refused in one sentence, before anything is allocated for it."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.export.command import main
from mpscl_ray.predict.predictor import load_segmenter
from mpscl_ray.runs import model_file
from mpscl_ray.runs.model_file import CARD, CARD_TEXT, MEMBERS, MODEL, SUMS, WEIGHTS, pack, unpack
from tests.untrained_run import save, segmenter, write_run

Members = dict[str, bytes]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Contents of a model file."""
    folder = tmp_path_factory.mktemp("model")
    save(write_run(folder / "run").path / "best", segmenter())
    assert main([str(folder / "run"), "--out", str(folder / "model.mpscl")]) == 0
    return (folder / "model.mpscl").read_bytes()


def zipped(members: Members, *more: tuple[str, bytes], compress: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compress) as archive:
        for name, data in (*members.items(), *more):
            archive.writestr(name, data)
    return buffer.getvalue()


def described(members: Members, **changes: Any) -> bytes:
    """The file with other entries in its description, and hashes that fit."""
    return pack({**members, MODEL: json.dumps({**json.loads(members[MODEL]), **changes}).encode()})


def network(members: Members, **changes: Any) -> bytes:
    return described(members, network={**json.loads(members[MODEL])["network"], **changes})


def larger_directory(data: bytes) -> bytes:
    """The end of the archive announces more members than there are."""
    end = list(struct.unpack("<4s4H2LH", data[-22:]))
    end[3] = end[4] = 60000
    return data[:-22] + struct.pack("<4s4H2LH", *end)


WRONG: list[tuple[Callable[[bytes, Members], bytes], str]] = [
    (lambda good, members: b"", "is no model file .first bytes b''"),
    (lambda good, members: b"<html>not found</html>", "is no model file .first bytes b'<htm'"),
    (lambda good, members: good[:-1000], "truncated or damaged"),
    (lambda good, members: good[:10], "truncated or damaged"),
    (lambda good, members: good + b"\0", "truncated or damaged"),
    (lambda good, members: b"\0" + good, "is no model file"),
    (lambda good, members: larger_directory(good), "it has 60000 members"),
    (lambda good, members: zipped(members, *((f"{n}.json", b"") for n in range(30))), "it has 36 members"),
    (lambda good, members: good[:-42] + b"PK\x06\x07" + good[-38:], "truncated or damaged"),
    (
        lambda good, members: zipped({WEIGHTS: bytes(10**6)}, compress=zipfile.ZIP_DEFLATED),
        "compressed .[0-9]+ bytes for 1000000",
    ),
    (lambda good, members: zipped(members, ("../run.py", b"")), "'../run.py', a path that leads out of it"),
    (lambda good, members: zipped(members, ("/etc/cron", b"")), "'/etc/cron', a path that leads out of it"),
    (lambda good, members: zipped(members, ("run.py", b"")), "'run.py', which no model file holds"),
    (lambda good, members: zipped({MODEL: members[MODEL]}), "has no SHA256SUMS"),
    (lambda good, members: zipped({**members, CARD_TEXT: bytes(2**20 + 1)}), "card.md of 1048577 bytes"),
    (
        lambda good, members: zipped({**members, CARD_TEXT: b"better"}),
        "card.md has the SHA-256 [0-9a-f]{64}, SHA256SUMS",
    ),
    (lambda good, members: zipped({**members, SUMS: b"\xff"}), "model.json has the SHA-256 .* says None"),
    (lambda good, members: zipped({**members, MODEL: b"["}), "model.json has the SHA-256"),
    (lambda good, members: described(members, format_version=2), "has version 2 .* reads 1; use a newer mpscl_ray"),
    (lambda good, members: zipped({**members, "new.json": b"", MODEL: b'{"format_version": 9}'}), "has version 9"),
    (lambda good, members: described(members, format="other"), "no model file that this version knows .format 'other'"),
    (lambda good, members: pack({**members, MODEL: b"[" * 10**5}), "no model file that this version knows"),
    (lambda good, members: described(members, source=None), "no model file that this version knows"),
    (lambda good, members: pack({**members, WEIGHTS: b"\xff" * 64}), "header of 18446744073709551615 bytes"),
    (lambda good, members: pack({**members, WEIGHTS: members[WEIGHTS][:-4]}), "no model file that this version knows"),
    (lambda good, members: network(members, base_channels=8), "another network .* tensors differ, such as bn1.bias"),
    (lambda good, members: network(members, kind="unet"), "another network .*no network is of the kind 'unet'"),
    (lambda good, members: network(members, base_channels=10**9), "cannot be of"),
    (lambda good, members: network(members, layers=[10**9, 1, 1, 1]), "cannot be of"),
    (lambda good, members: described(members, size=[10**9, 10**9]), "cannot be of"),
    (
        lambda good, members: described(members, weights={"phase": None, "step": 1, "selected_by": None}),
        "version knows",
    ),
    (lambda good, members: described(members, classes=["background", "LV"]), "names 2 classes for a network with 3"),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG, ids=[said for _, said in WRONG])
def test_what_is_no_model_file_is_refused(
    good: bytes, tmp_path: Path, wrong: Callable[[bytes, Members], bytes], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPSCL_RAY_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "bad.mpscl"
    file.write_bytes(wrong(good, unpack(good, "good")))
    with pytest.raises(DataError, match=rf"^{file}:? .*{said}") as refused:
        load_segmenter(file)
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 3


def test_a_flipped_bit_anywhere_is_found(good: bytes) -> None:
    """But for those of the archive's own fields that change nothing: dates, versions, permissions."""
    intact = unpack(good, "good")
    changed = 0
    for position in range(0, len(good), len(good) // 400):
        data = bytearray(good)
        data[position] ^= 1 << position % 8
        try:
            assert unpack(bytes(data), "bad") == intact
        except DataError:
            changed += 1
    assert changed > 390


def test_members_that_overlap_are_refused(good: bytes) -> None:
    """Two entries that share bytes would give more than the file has."""
    data = bytearray(good)
    start = struct.unpack("<L", data[-6:-2])[0]
    entries = [position for position in range(start, len(data) - 46) if data[position : position + 4] == b"PK\x01\x02"]
    assert len(entries) == len(MEMBERS)
    for entry in entries[:2]:
        for field in (20, 24):
            data[entry + field : entry + field + 4] = (2**20).to_bytes(4, "little")
    with pytest.raises(DataError, match=r"members are larger than the file|damaged"):
        unpack(bytes(data), "bad")


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large.mpscl").open("wb") as file:
        file.truncate(model_file.LARGEST_FILE + 1)
    with pytest.raises(DataError, match="has 1073741825 bytes, expected at most 1073741824"):
        load_segmenter(tmp_path / "large.mpscl")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for name in ("none.mpscl", "run/none.mpscl"):
        with pytest.raises(ConfigError, match=r"none\.mpscl: no such file, expected a model that .*export wrote"):
            load_segmenter(tmp_path / name)


def test_a_card_of_others_is_shown_with_care(good: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = unpack(good, "good")
    file = tmp_path / "model.mpscl"
    for card in (b"[]", b"{}", json.dumps({**json.loads(members[CARD]), "scores": {"split": "test"}}).encode()):
        file.write_bytes(pack({**members, CARD: card}))
        with pytest.raises(DataError, match="its card is not one that export writes"):
            main([str(file), "--show"])
    file.write_bytes(
        pack({**members, CARD: json.dumps({**json.loads(members[CARD]), "name": "\x1b[2Jhearts"}).encode()})
    )
    assert main([str(file), "--show"]) == 0
    assert "# Model card: ?[2Jhearts" in capsys.readouterr().out


def test_the_sums_are_those_of_sha256sum(good: bytes) -> None:
    members = unpack(good, "good")
    lines = members[SUMS].decode().splitlines()
    assert lines == [f"{hashlib.sha256(members[name]).hexdigest()}  {name}" for name in MEMBERS if name != SUMS]
    assert pack(members) == good
