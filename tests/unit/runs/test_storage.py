"""Datasets and checkpoints in a bucket, on an S3-speaking server that refuses, is cut off and comes back."""

from __future__ import annotations

import io
import itertools
import os
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from pyarrow import NativeFile

from mpscl_ray.data.dataset import fold_numbers, load_manifest
from mpscl_ray.data.label_map_files import read_label_map
from mpscl_ray.data.parquet_reader import SplitFiles, read_case
from mpscl_ray.errors import ConfigError, DataError, StorageError
from mpscl_ray.prepare.run import prepare
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.run_directory import open_run
from mpscl_ray.runs.storage import S3Path, cache_folder
from mpscl_ray.runs.sync import LARGE_BYTES, Synchronizer, delete_path, download_checkpoint, upload_path
from tests.raw_volumes import mmwhs, options
from tests.s3 import PATIENCE_S, Server, serve, state, upload_folder, wait_until
from tests.tiny import make_dataset

# ------------------------------------------------------------------------------------------------------- URLs


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("abfs://bucket/a", "abfs:// is not a storage that can be used directly, expected s3://BUCKET/FOLDER"),
        ("gs://bucket/a?token=hidden", "a URL of a bucket has the option token, expected gs://BUCKET/FOLDER with at"),
        ("s3:///a", "names no bucket"),
        ("s3://KEYID:hidden@bucket/a", "a URL of a bucket has a key in front of the bucket"),
        ("s3://bucket/a?secret_key=hidden", "a URL of a bucket has the option secret_key"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_its_secret(url: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence.replace("?", r"\?")) as refused:
        open_run(url)
    assert "hidden" not in str(refused.value)
    assert "KEYID" not in str(refused.value)


def test_a_url_survives_pathlib_and_names_below_it_keep_its_options() -> None:
    remote = S3Path.parse(str(Path("s3://bucket/runs?endpoint_override=host:1")))
    assert str(remote / "a" / "b") == "s3://bucket/runs/a/b?endpoint_override=host:1"
    assert (remote / "a").parent == remote


# ----------------------------------------------------------------------------------------------------- errors


def test_a_bucket_that_is_not_there(server: Server) -> None:
    run = open_run(server.url("runs/a", bucket="none"), "command")
    for action in (run.create, run.require):
        with pytest.raises(StorageError, match=r"there is no bucket none at http://127.*; make it, or correct the URL"):
            action()


def test_a_server_that_does_not_run(server: Server) -> None:
    with (
        server.door.shut(),
        pytest.raises(StorageError, match=r"cannot write (s3|gs)://bucket/runs/a/\S+: no answer from"),
    ):
        open_run(server.url("runs/a"), "command").create()


def test_refused_credentials_are_an_error_without_the_secret(tmp_path: Path) -> None:
    """The server allows one action without credentials: making the bucket. Those of the tests belong to no user."""
    with serve(tmp_path, INITIAL_NO_AUTH_ACTION_COUNT="2") as guarded:
        run = open_run(guarded.url("runs/a"), "command")
        with pytest.raises(StorageError) as refused:
            run.create()
    assert "refuses (" in str(refused.value)
    assert "give credentials that may write in the bucket bucket" in str(refused.value)
    assert os.environ.get("AWS_SECRET_ACCESS_KEY", "secret-of-the-tests") not in str(refused.value)


# --------------------------------------------------------------------------------------------------- datasets


def test_a_dataset_reads_as_on_disk_and_is_downloaded_once(remote: S3Path, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "mr", "mr")
    upload_folder(folder, remote)
    manifest = load_manifest(str(remote))
    assert manifest == load_manifest(folder)
    case = manifest.split("train")[1]
    for name, array in read_case(remote, case).items():
        np.testing.assert_array_equal(array, read_case(folder, case)[name])
    (remote / case.file).delete()
    rows = np.array([7, 0, 11])
    here, there = (SplitFiles.find(where, "train", labels=True) for where in (folder, str(remote)))
    for name in ("image", "label"):
        first = np.array([6, 7])  # of the case that is gone in the bucket
        np.testing.assert_array_equal(there.read(first)[name], here.read(first)[name])
        np.testing.assert_array_equal(there.read(rows)[name], here.read(rows)[name])


def test_folds_in_a_bucket_share_their_files(remote: S3Path, tmp_path: Path) -> None:
    source = mmwhs(tmp_path / "in", numbers=range(1001, 1005))
    folder, bucket = (
        prepare(options(source, folds=2, split="1,0,0", out=out), progress=False)["ct"]
        for out in (tmp_path / "out", remote)
    )
    assert fold_numbers(bucket) == [0, 1]
    for number in (0, 1):
        here, there = folder / f"fold{number}", bucket / f"fold{number}"
        one, other = (SplitFiles.find(where, "train", labels=True) for where in (here, str(there)))
        rows = np.arange(one.rows)[::-1]
        for name, array in one.read(rows).items():
            np.testing.assert_array_equal(other.read(rows)[name], array)
        case = load_manifest(there).split("test")[0]
        np.testing.assert_array_equal(read_case(there, case)["image"], read_case(here, case)["image"])
        assert np.array_equal(read_label_map(there, case), read_label_map(here, case))
    with pytest.raises(DataError, match=r"it holds the datasets fold0, fold1, give one of them"):
        load_manifest(bucket)
    (bucket / "cases" / f"{case.id}.parquet").delete()
    shutil.rmtree(cache_folder() / "cases")
    with pytest.raises(DataError, match=rf"ct/cases/{case.id}.parquet.*: missing, though the manifest lists it"):
        read_case(bucket / "fold0", case)
    with pytest.raises(ConfigError, match="there is a finished dataset already"):
        prepare(options(source, split="1,0,0", out=remote), progress=False)
    prepare(options(source, split="1,0,0", out=remote, overwrite=True), progress=False)
    assert fold_numbers(bucket) == []
    assert len(load_manifest(bucket).cases) == 4


def test_a_dataset_that_is_damaged_or_missing(remote: S3Path, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "mr", "mr", seed=5)
    upload_folder(folder, remote)
    missing, damaged, _ = load_manifest(remote).split("train")
    (remote / missing.file).delete()
    data = bytearray((remote / damaged.file).read_bytes())
    data[len(data) // 2] ^= 1
    (remote / damaged.file).write_bytes(bytes(data))
    with pytest.raises(DataError, match=rf"{missing.file}\?.*: missing, though the manifest lists it"):
        read_case(remote, missing)
    with pytest.raises(DataError, match=rf"{damaged.file}\?.*: damaged or replaced: its SHA-256"):
        SplitFiles.find(remote, "train", labels=False).read(np.array([6]))
    with pytest.raises(DataError, match=r"it has no manifest.json\); it holds the datasets .*give one of them"):
        load_manifest(remote.parent)


# ------------------------------------------------------------------------------------------------ checkpoints


def test_a_checkpoint_is_incomplete_until_its_upload_ends(server: Server, remote: S3Path, tmp_path: Path) -> None:
    old, new = (checkpoint.save(tmp_path / name, state(step, 3_000_000)) for step, name in ((1, "a"), (2, "b")))
    assert upload_path(old, remote / "best")
    assert download_checkpoint(remote / "best", tmp_path / "got")

    def cut() -> None:
        wait_until(lambda: not (remote / "best" / checkpoint.SUMS).exists())
        with server.door.shut():
            broken.wait(PATIENCE_S)

    broken = threading.Event()
    cutter = threading.Thread(target=cut)
    cutter.start()
    with pytest.raises(StorageError):
        _send_while(cutter, new, remote / "best")
    broken.set()
    cutter.join()
    assert not download_checkpoint(remote / "best", tmp_path / "got"), "not complete"
    assert checkpoint.load(tmp_path / "got")["step"] == 1, "the local checkpoint is untouched"
    assert upload_path(new, remote / "best")
    assert download_checkpoint(remote / "best", tmp_path / "got")
    assert checkpoint.load(tmp_path / "got")["step"] == 2


def _send_while(cutter: threading.Thread, path: Path, remote: S3Path) -> None:
    """Until the cut falls into an upload."""
    while cutter.is_alive():
        upload_path(path, remote)


@dataclass(frozen=True)
class Recorded(S3Path):
    """Records the requests to a bucket."""

    requests: list[str] = field(default_factory=list)

    def upload(self, source: IO[bytes]) -> None:
        self.requests.append(f"put {self.name}")

    def delete(self) -> None:
        self.requests.append(f"delete {self.name}")

    def delete_folder(self) -> None:
        self.requests.append(f"delete all of {self.name}")

    def files(self) -> list[str]:
        return [checkpoint.STATE, checkpoint.SUMS, checkpoint.TENSORS]


def test_the_sums_of_a_checkpoint_are_uploaded_last_and_deleted_first(tmp_path: Path) -> None:
    remote = Recorded("bucket/best")
    assert upload_path(checkpoint.save(tmp_path / "best", state(1)), remote)
    assert remote.requests == ["delete SHA256SUMS", "put state.json", "put tensors.safetensors", "put SHA256SUMS"]
    del remote.requests[:]
    delete_path(remote)
    assert remote.requests == ["delete SHA256SUMS", "delete all of best"]


# ----------------------------------------------------------------------------------------------- synchronizer


def test_after_an_outage_everything_is_uploaded(server: Server, remote: S3Path, tmp_path: Path) -> None:
    said: list[str] = []
    synchronizer = Synchronizer(
        tmp_path,
        remote,
        outgoing=("checkpoints", "*.jsonl"),
        incoming=("word",),
        check=lambda: None,
        patience_s=PATIENCE_S,
        warn=said.append,
    )
    synchronizer.start()
    log = tmp_path / "metrics.jsonl"
    log.write_text("1\n")
    checkpoint.save(tmp_path / "checkpoints" / "step-0000001", state(1))
    assert synchronizer.flush()
    assert (remote / "metrics.jsonl").read_bytes() == b"1\n"
    with server.door.shut():
        log.write_text("1\n2\n")
        checkpoint.save(tmp_path / "checkpoints" / "step-0000002", state(2))
        checkpoint.prune(tmp_path / "checkpoints", 1)
        assert not synchronizer.flush(), "flush does not wait for a failing storage"
        wait_until(lambda: len(said) == 1)
        assert not synchronizer.flush()
    (remote / "word").write_bytes(b"hello")
    wait_until((tmp_path / "word").exists)
    wait_until(lambda: len(said) == 2)
    assert synchronizer.flush()
    synchronizer.close()
    assert "no answer from" in said[0]
    assert "answers again" in said[1]
    assert (remote / "metrics.jsonl").read_bytes() == b"1\n2\n"
    assert {name.split("/")[1] for name in remote.files() if "checkpoints" in name} == {"step-0000002"}
    assert download_checkpoint(remote / "checkpoints" / "step-0000002", tmp_path / "back")
    assert checkpoint.load(tmp_path / "back")["step"] == 2


def test_flush_uploads_large_files_too(remote: S3Path, tmp_path: Path) -> None:
    synchronizer = Synchronizer(
        tmp_path,
        remote,
        outgoing=("*",),
        incoming=(),
        check=lambda: None,
        patience_s=PATIENCE_S,
        warn=lambda text: None,
    )
    synchronizer.start()
    for size in (LARGE_BYTES + 1, LARGE_BYTES + 2):
        (tmp_path / "events").write_bytes(bytes(size))
        assert synchronizer.flush()
        assert len((remote / "events").read_bytes()) == size
    synchronizer.close()


def test_an_outage_longer_than_patience_is_an_error(server: Server, remote: S3Path, tmp_path: Path) -> None:
    with server.door.shut():
        synchronizer = Synchronizer(
            tmp_path, remote, outgoing=("*",), incoming=(), check=lambda: None, patience_s=0.5, warn=lambda text: None
        )
        (tmp_path / "file").write_text("x")
        synchronizer.start()
        wait_until(lambda: synchronizer.error is not None)
        with pytest.raises(StorageError, match="the storage of the run has failed for"):
            synchronizer.close()


def test_a_name_that_ends_in_gz_keeps_its_contents(remote: S3Path) -> None:
    (remote / "a.nii.gz").write_bytes(b"as it was written")
    (remote / "b.nii.gz").upload(io.BytesIO(b"as it was written"))
    assert {(remote / name).read_bytes() for name in remote.files()} == {b"as it was written"}


def test_an_object_that_is_replaced_while_it_is_read(remote: S3Path, tmp_path: Path) -> None:
    """Another process writes a longer version between the question for the size and that for the bytes."""
    versions = [b"{'cells': {}}", b"{'cells': {'one': 'running'}}", b"{'cells': {'one': 'finished', 'two': 'running'}}"]
    waiting = list(versions)

    def read(stream: NativeFile) -> bytes:
        if waiting:
            remote.write_bytes(waiting.pop(0))
        return bytes(stream.read())

    remote.write_bytes(b"{}")
    assert remote._read_one_version(read) in (b"{}", versions[-1]), "a whole version: the first, or the last"
    remote.write_bytes(versions[-1])
    assert remote.read_bytes() == versions[-1]
    remote.download(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == versions[-1]


@pytest.mark.parametrize("server", ["s3"], indirect=True)
def test_an_object_that_is_always_replaced(remote: S3Path) -> None:
    sizes = itertools.count(1)

    def read(stream: NativeFile) -> bytes:
        remote.write_bytes(b" " * next(sizes))
        return bytes(stream.read())

    remote.write_bytes(b"")
    with pytest.raises(StorageError, match="it was replaced 20 times meanwhile"):
        remote._read_one_version(read)
