"""Checkpoints on disks that fill up or fail, and in processes that are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mpscl_ray.errors import StorageError
from mpscl_ray.runs import atomic_files, checkpoint
from mpscl_ray.runs.checkpoint import checkpoint_name
from tests.checkpoints import assert_same, small_state

# ---- storage ----


def test_full_disk_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path / checkpoint_name(100), small_state(100))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(checkpoint, "free_bytes", lambda folder: 31_000_000)
    with pytest.raises(StorageError, match=r"needed 40\.\d MB \(\d+ bytes\), free 31\.0 MB \(31000000 bytes\)"):
        checkpoint.save(tmp_path / checkpoint_name(200), {"big": torch.zeros(10_000_000)})
    assert sorted(tmp_path.rglob("*")) == before


def test_disk_that_fills_while_writing(tmp_path: Path) -> None:
    """A limit on the size of files makes the system itself refuse the bytes, in its own process."""
    old = checkpoint.save(tmp_path / checkpoint_name(100), small_state(100))
    script = """
import resource, sys, torch
from pathlib import Path
from mpscl_ray.runs import checkpoint
from mpscl_ray.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
for step in (100, 200):
    try:
        checkpoint.save(Path(sys.argv[1]) / checkpoint.checkpoint_name(step), {"big": torch.zeros(1_000_000)})
    except StorageError as error:
        print(error)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert len(done.stdout.splitlines()) == 2
    for line, step in zip(done.stdout.splitlines(), (100, 200), strict=True):
        assert f"cannot write {tmp_path}/step-0000{step}: no space left: needed 4.1 MB" in line
    assert os.listdir(tmp_path) == [old.name]
    assert_same(checkpoint.load(old), small_state(100))


def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"file is a file where a folder is needed"):
        checkpoint.save(tmp_path / "file" / "step-0000100", small_state(100))
    with pytest.raises(StorageError, match=r"file of that name is in the way"):
        checkpoint.save(tmp_path / "file", small_state(100))
    with pytest.raises(StorageError, match="cannot read the folder"):
        checkpoint.latest(tmp_path / "file")

    # Permissions do not bind the superuser that tests may run as, so the refusal is staged.
    def refuse(self: Path, *arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StorageError, match=r"Permission denied .*choose another folder"):
        checkpoint.save(tmp_path / "closed" / "step-0000100", small_state(100))


def test_everything_is_synced_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a power cut: files and their folder are synced before the rename, the folder above after it."""
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def record_rename(source: Path, target: Path) -> None:
        events.append(f"rename {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    checkpoint.save(tmp_path / "run" / "step-0000100", small_state(100))
    partial = f".step-0000100.partial-{os.getpid()}"
    assert sorted(events[:2]) == ["sync state.json", "sync tensors.safetensors"]
    assert events[2:] == ["sync SHA256SUMS", f"sync {partial}", "rename step-0000100", "sync run"]


def test_failed_sync_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint.save(tmp_path / checkpoint_name(100), small_state(100))
    fsync = os.fsync
    for call in range(1, 5):
        calls = 0

        def fail(descriptor: int, call: int = call) -> None:
            nonlocal calls
            calls += 1
            if calls == call:
                raise OSError(5, "Input/output error")
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(StorageError, match="Input/output error"):
            checkpoint.save(path, small_state(101))
        assert_same(checkpoint.load(path), small_state(100))
        assert os.listdir(tmp_path) == [path.name]


def test_reader_between_the_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that finds the old checkpoint set aside puts it back; the writer then starts over."""
    path = checkpoint.save(tmp_path / "best", small_state(1))
    rename = os.rename
    seen: list[int] = []

    def rename_with_reader(source: Path, target: Path) -> None:
        rename(source, target)
        if ".replaced-" in target.name and not seen:
            seen.append(0)
            seen[0] = checkpoint.load(path)["step"]

    monkeypatch.setattr(os, "rename", rename_with_reader)
    checkpoint.save(path, small_state(2))
    assert seen == [1]
    assert checkpoint.load(path)["step"] == 2
    assert os.listdir(tmp_path) == ["best"]


def test_folders_without_fsync_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(atomic_files.os, "fsync", refuse)
    atomic_files.fsync_directory(tmp_path)


# ---- kills ----


def test_kills_while_writing_lose_nothing(tmp_path: Path) -> None:
    """Processes killed with SIGKILL while they write: at random moments, and before each system call that matters."""
    script = Path(__file__).with_name("checkpoint_kills.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["kills"] == 100
    assert report["half_way"] >= 40, "the kills have to hit the writing itself"
    assert report["lost"] == []
