"""Files that are damaged or hostile are refused before they are used: a short form of the runs in docs/trust.md."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch

from mpscl_ray.data.dataset import MANIFEST, load_manifest
from mpscl_ray.data.label_map_files import read_label_map, write_label_map_file
from mpscl_ray.data.parquet_reader import read_case
from mpscl_ray.data.volumes.nifti import read_image
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.networks.pretrained import load_pretrained, load_prototypes
from mpscl_ray.prepare.splits import read_split_file
from mpscl_ray.runs import checkpoint, safe_json, safe_npz
from mpscl_ray.runs.run_directory import RunDirectory
from tests.checkpoints import small_state
from tests.nifti_files import ramp
from tests.trust import flips
from tests.trust.inputs import CLASSES, IMAGE, KINDS, LABEL, ROOT, write_dataset
from tests.written_dataset import save_plain_manifest, write_plain_case

# ----------------------------------------------------------------------------------------- short forms of long runs


def test_changed_files_are_read_or_refused_with_little_memory() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.trust.fuzz", *KINDS, "--runs", "120"],
        capture_output=True, text=True, timeout=600, check=False, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"kind"')]
    assert [report["kind"] for report in reports] == list(KINDS)
    assert all(report["inputs"] >= 120 for report in reports)
    assert all(report["refused"] > 20 for report in reports if report["kind"] != "npz"), reports


def test_the_limit_of_memory_and_other_errors_would_be_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the fuzzer counts as a crash: an error of another kind, and a message of several lines."""
    from tests.trust import fuzz, inputs

    def read(_: Path, data: bytes) -> None:
        if len(data) == 1:
            raise MemoryError
        if len(data) == 2:
            raise DataError("two\nlines")

    monkeypatch.setitem(inputs.KINDS, "odd", inputs.Kind(lambda _: [b""], read))
    judge = fuzz.Judge("odd", tmp_path)
    for data in (b"a", b"ab", b"abc"):
        judge.judge(data)
    assert sorted(judge.crashes.values()) == [1, 1]
    assert judge.read == 1
    assert judge.refused == 1


@pytest.mark.parametrize("kind", sorted(flips.KINDS))
def test_flipped_bits_are_found_where_there_is_a_checksum(kind: str, tmp_path: Path) -> None:
    found = flips.flip(kind, 25, 3, tmp_path / "files")
    if kind in flips.WITHOUT_CHECKSUM:
        assert found["unnoticed"]
    else:
        assert not found["unnoticed"]
        assert found["detected"] > 15


# ------------------------------------------------------------------------------------------------------- JSON

JSON = [
    (b"[" * 100_000, "more than 64 objects and lists"),
    (b"[" * 70 + b"]" * 70, "more than 64 objects and lists"),
    (b'{"a":' * 70 + b"1" + b"}" * 70, "more than 64 objects and lists"),
    (b"9" * 100_000, "an integer of 100000 digits"),
    (b"[-" + b"9" * 200 + b"]", "an integer of 201 digits"),
    (b'["\\ud800"]', "surrogates not allowed"),
    (b'"\xed\xa0\x80"', "can't decode"),
    (b"\xff\xfe{\x00}\x00", "can't decode"),
    (b"", "Expecting value"),
]


@pytest.mark.parametrize(("text", "reason"), JSON)
def test_json_beyond_the_limits_is_a_value_error(text: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refused:
        safe_json.loads(text)
    assert "\n" not in str(refused.value)


def test_plain_json_is_read_as_ever(tmp_path: Path) -> None:
    text = '\ufeff{"a": [1, -2.5e3, true, null, "\u00e4 \\ud83d\\ude00"], "b": {"c": 12345678901234567890}}'
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    found = safe_json.read(tmp_path / "a.json")
    assert found == {"a": [1, -2500.0, True, None, "\u00e4 \U0001f600"], "b": {"c": 12345678901234567890}}


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "status.json"
    with file.open("wb") as stream:
        stream.truncate(1 << 40)  # no disk has it, nor any memory
    with pytest.raises(ValueError, match="larger than 67108864 bytes"):
        safe_json.read(file)
    folder = RunDirectory(tmp_path)
    with pytest.raises(DataError, match=r"status\.json is damaged: .*larger than"):
        folder.read_status()
    with pytest.raises(ConfigError, match=r"--split .*status\.json: .*larger than"):
        read_split_file(file, "ct")
    with (tmp_path / MANIFEST).open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(DataError, match=r"manifest\.json: damaged.*larger than"):
        load_manifest(tmp_path)
    with (tmp_path / "metrics.jsonl").open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(DataError, match=r"metrics\.jsonl is damaged: it is larger than"):
        folder.read_metrics()


@pytest.mark.parametrize("name", [checkpoint.STATE, checkpoint.SUMS, checkpoint.TENSORS])
def test_a_checkpoint_of_huge_files_is_refused(tmp_path: Path, name: str) -> None:
    path = checkpoint.save(tmp_path / "step-0000001", small_state(1))
    with (path / name).open("wb") as stream:
        stream.truncate(1 << 40)
    tracemalloc.start()
    try:
        with pytest.raises(checkpoint.CheckpointDamaged, match=f"{name} cannot be read: it is larger than"):
            checkpoint.load(path)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


# --------------------------------------------------------------------------------------------------- volumes


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("v.nrrd", "NRRD0004\ntype: short\ndimension: 3\nsizes: 2 2 2\nencoding: raw\ndata file: {other}\n\n"),
        ("v.nrrd", "NRRD0004\ntype: short\ndimension: 3\nsizes: 2 2 2\nencoding: raw\ndatafile: {other}\n\n"),
        ("v.nrrd", "NRRD0004\ntype: short\ndimension: 3\nsizes: 2 2 2\nencoding: raw\nDATA FILE: LIST\n{other}\n\n"),
        ("v.mha", "NDims = 3\nDimSize = 2 2 2\nElementType = MET_SHORT\nElementDataFile = {other}\n"),
        ("v.mha", "NDims = 3\nDimSize = 2 2 2\nElementType = MET_SHORT\nElementDataFile = LIST\n{other}\n"),
    ],
)
def test_a_header_may_not_name_another_file(tmp_path: Path, name: str, text: str) -> None:
    other = tmp_path / "secret.raw"
    other.write_bytes(ramp("i2", (2, 2, 2)).tobytes())
    (tmp_path / name).write_text(text.format(other=other))
    with pytest.raises(DataError, match=f"{name} keeps its voxels in another file"):
        read_image(tmp_path / name)


@pytest.mark.parametrize("ending", ["nrrd", "mha"])
def test_a_header_of_itk_with_absurd_sizes_is_refused(tmp_path: Path, ending: str) -> None:
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(ramp()), str(tmp_path / f"v.{ending}"))
    content = (tmp_path / f"v.{ending}").read_bytes()
    for sizes, reason in ((b"30000 30000 2", "cannot hold"), (b"32767 32767 32767", "more than the limit")):
        (tmp_path / f"w.{ending}").write_bytes(content.replace(b"3 4 5", sizes))
        with pytest.raises(DataError, match=reason):
            read_image(tmp_path / f"w.{ending}")


def test_a_label_map_that_unpacks_to_much_more_is_refused(tmp_path: Path) -> None:
    case = write_plain_case(tmp_path, "p1", "train", IMAGE, LABEL, CLASSES)
    header = bytearray(348)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, 30000, 30000, 2, 1, 1, 1, 1)
    struct.pack_into("<2h", header, 70, 2, 8)
    struct.pack_into("<f", header, 108, 352)
    header[344:348] = b"n+1\0"
    stored = write_label_map_file(tmp_path, "train", "p1", gzip.compress(bytes(header) + bytes(100)))
    import dataclasses

    with pytest.raises(DataError, match=r"no label map that prepare wrote .*\(30000, 30000, 2\)"):
        read_label_map(tmp_path, dataclasses.replace(case, label_map=stored))


# ---------------------------------------------------------------------------------------------------- arrays


def npy(shape: str, data: bytes = b"") -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


@pytest.mark.parametrize("shape", ["(1099511627776,)", "(2, 2, 1)", "(", "(1,", "'a'"])
def test_arrays_that_are_not_what_their_header_says(tmp_path: Path, shape: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", npy(shape))
    with pytest.raises(ValueError, match=r".") as refused:
        safe_npz.read(tmp_path / "a.npz")
    assert "Cannot allocate" not in str(refused.value)
    (tmp_path / "p.npy").write_bytes(npy(shape))
    with pytest.raises(DataError, match=r"p\.npy"):
        load_prototypes(tmp_path / "p.npy", 2, 4)


def test_an_archive_that_unpacks_to_much_more_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", npy("(1000000,)", bytes(4_000_000)))
    assert safe_npz.read(tmp_path / "a.npz")["arr_0"].shape == (1_000_000,)
    with pytest.raises(ValueError, match="it unpacks to 4000128 bytes, expected at most 1000000"):
        safe_npz.read(tmp_path / "a.npz", 1_000_000)


def test_weights_that_are_compressed_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(100_000)}, tmp_path / "stored.pth")
    with (
        zipfile.ZipFile(tmp_path / "stored.pth") as stored,
        zipfile.ZipFile(tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in stored.namelist():
            archive.writestr(name, stored.read(name))
    with pytest.raises(DataError, match=r"w\.pth cannot be read .*unpacks to [0-9]+ bytes, more than it has"):
        load_pretrained(torch.nn.Linear(1, 1), tmp_path / "w.pth")


# --------------------------------------------------------------------------------------------------- datasets


def test_a_manifest_of_more_slices_than_its_file_can_hold(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    case = load_manifest(tmp_path).cases[0]
    import dataclasses

    with pytest.raises(DataError, match=r"3 slices, the manifest says 900000"):
        read_case(tmp_path, dataclasses.replace(case, slices=900_000))
    large = dataclasses.replace(case, slices=1 << 20)
    save_plain_manifest(tmp_path, "mr", CLASSES, (64, 64), [large])
    with pytest.raises(DataError, match=r"has 1048576 slices of 64 x 64 pixels, more than 2147483648 voxels"):
        load_manifest(tmp_path)


def test_zeros_that_lz4_makes_small_are_read(tmp_path: Path) -> None:
    """The limit of what a Parquet file can hold is above what LZ4 does with an empty volume."""
    image = np.zeros((40, 64, 64), np.float32)
    case = write_plain_case(tmp_path, "p1", "train", image, np.zeros(image.shape, np.uint8), CLASSES)
    np.testing.assert_array_equal(read_case(tmp_path, case)["image"], image)
