"""A run directory in a bucket: a working copy on this node, and what keeps the bucket up to date with it.

Command and workers may be on different nodes, so each has its own copy (below the cache folder, see
:mod:`mpscl_ray.runs.storage`) and uploads what it writes: the command config, model, environment, status and results;
worker 0 metrics, checkpoints, TensorBoard events, curves and its log; every other worker its log. They share only the
bucket. Its layout is that of :mod:`mpscl_ray.runs.run_directory`, with ``.lease`` (:mod:`mpscl_ray.runs.lease`) for
``.lock``.

A checkpoint is in the bucket when :meth:`BucketStore.flush` returns, and worker 0 waits for that: as on a shared disk,
a killed run repeats at most the steps since its last checkpoint. While the storage does not answer, nothing waits, and
the bucket has the last checkpoint from before.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import platform
import re
import shutil
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpscl_ray.errors import DataError, StorageError
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.atomic_files import storage_errors, write_atomically
from mpscl_ray.runs.control_files import (
    FAILURE_FILE,
    PLACEMENT_GROUP_FILE,
    STOP_FILE,
    WARNINGS_FILE,
    WORKER_FAILURES_FILE,
    BucketControlFiles,
)
from mpscl_ray.runs.lease import Lease
from mpscl_ray.runs.local_store import CHECKPOINT_PARTS, PARTS
from mpscl_ray.runs.lock import process_alive
from mpscl_ray.runs.storage import S3Path, cache_folder, retry
from mpscl_ray.runs.sync import Synchronizer, download_checkpoint, upload_path

log = logging.getLogger(__name__)

LEASE = ".lease"
"""Name of the lease object in the folder of a run."""

_FINAL_UPLOAD_S = 60.0
"""Longest time that a command waits at its end for a storage that does not answer."""

_COMMAND_UPLOADS = (
    *("config.yaml", "model.json", "postprocessing.json", "quality.json", "environment.json"),
    *("status.json", "results", "trackers"),
    STOP_FILE,
)
_WORKER_0_UPLOADS = tuple(
    "checkpoints best phases metrics.jsonl features.jsonl pseudo_labels progress.png progress.html slices tensorboard "
    "profile".split()
)
_LARGE = (*CHECKPOINT_PARTS, "tensorboard", "trials", "shared", "cells")
"""Folders that are not downloaded as a whole; the last three hold the runs of a search or a comparison."""


class BucketStore:
    """Access to a run by its URL, with the methods of :class:`~mpscl_ray.runs.local_store.LocalStore`.

    Making the object does not access the bucket.

    Args:
        remote: URL of the run.
        role: Of this process: ``command``, ``worker-N``, ``reader`` or another name; part of the name of the copy.
        patience_s: How long the storage may fail to answer.
        uploads: Patterns of files that the command writes beside those of a training.
    """

    poll_interval_s = 2.0

    def __init__(self, remote: S3Path, role: str, patience_s: float, uploads: Sequence[str] = ()) -> None:
        self.path = _copy_folder(remote, role)
        self.name = remote.name
        self.control_files = BucketControlFiles(remote, patience_s)
        self._remote, self._role, self._patience_s, self._uploads = remote, role, patience_s, uploads
        self._lease = Lease(remote / LEASE)
        self._synchronizer: Synchronizer | None = None
        self._downloaded = False

    @property
    def display_path(self) -> str:
        return str(self._remote)

    uri = display_path

    @property
    def fencing_token(self) -> str:
        return self._lease.token

    @property
    def sync_error(self) -> Exception | None:
        return self._synchronizer.error if self._synchronizer else None

    def create(self, parts: Collection[str] = PARTS) -> None:
        """Make the copy, and check that objects can be written, read and deleted. Raises StorageError."""
        self.init_worker_dir()
        probe = self._remote / f".probe-{platform.node()}-{os.getpid()}"
        probe.write_bytes(b"written")
        try:
            if probe.read_bytes() != b"written":
                raise StorageError(f"{probe} does not read as it was written; check the storage")
        except FileNotFoundError:
            raise StorageError(f"{probe} was written and is not there; check the storage") from None
        finally:
            probe.delete()

    def init_worker_dir(self) -> None:
        """Make the copy; a worker downloads the small files too."""
        with storage_errors(self.path):
            for part in PARTS:
                (self.path / part).mkdir(parents=True, exist_ok=True)
        if self._role != "command":
            retry(self._download_small_files, self._patience_s)

    def neighbours(self) -> list[str]:
        parent = self._remote.parent
        parent.require_bucket()
        return [name for name in parent.folders() if (parent / name / "config.yaml").exists()]

    # ---- locks ----

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this command by its lease, and upload what the command writes inside the block.

        Raises:
            ConfigError: Another process holds it.
            StorageError: The storage does not answer, or did not until patience ended.
        """
        self._lease.acquire()
        for name in (STOP_FILE, FAILURE_FILE):
            self.control_files.clear(name)
        self._download_small_files()
        synchronizer = self._start(
            outgoing=(*_COMMAND_UPLOADS, f"logs/{WORKER_FAILURES_FILE}", "logs/environment-*.json", *self._uploads),
            incoming=("metrics.jsonl", FAILURE_FILE, PLACEMENT_GROUP_FILE, f"logs/{WARNINGS_FILE}"),
            check=self._lease.renew,
            patience_s=max(_FINAL_UPLOAD_S, self._patience_s),
            warn=lambda text: print(text, file=sys.stderr, flush=True),
        )
        try:
            yield
        finally:
            synchronizer.close()
            self._synchronizer = None
            self.control_files.clear(PLACEMENT_GROUP_FILE)
            self._lease.release()
            shutil.rmtree(self.path, ignore_errors=True)

    def lock_owner(self) -> int | None:
        """Pid of the owner of the lease on its own host; None where it has none."""
        return self._lease.owner()

    @contextmanager
    def worker_lock(self, token: str, rank: int) -> Iterator[None]:
        """Upload what this worker writes, as long as the command that started it holds the run."""
        self._lease.token = token
        uploads = [f"logs/{self._role}.log"]
        if rank == 0:
            retry(self._lease.check, self._patience_s)
            uploads = [*_WORKER_0_UPLOADS, f"logs/{WARNINGS_FILE}", *uploads]
            retry(self._download_checkpoints, self._patience_s)
        synchronizer = self._start(
            outgoing=uploads,
            incoming=(STOP_FILE,),
            check=self._lease.check,
            patience_s=self._patience_s,
            warn=log.warning,
        )
        try:
            yield
        finally:
            synchronizer.close()
        shutil.rmtree(self.path, ignore_errors=True)

    # ---- files ----

    def has(self, file: Path) -> bool:
        """Whether a file of the run exists; downloads the small files to see."""
        if not file.is_file() or (self._role == "reader" and not self._downloaded):
            self._download_small_files()
            self._downloaded = True
        return file.is_file()

    def write(self, file: Path, data: bytes) -> None:
        """Replace a file; a process that does not hold the run uploads it at once."""
        with storage_errors(file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, data)
        if self._synchronizer is None:
            self.upload(file)

    def refresh(self, file: Path) -> Path:
        """A file of the run, downloaded unless the synchronizer keeps it up to date."""
        if self._synchronizer is None:
            try:
                self._object(file).download(file)
            except FileNotFoundError:
                file.unlink(missing_ok=True)
        return file

    def upload(self, path: Path) -> None:
        """Upload a file, a checkpoint or a folder of files at once."""
        for file in sorted(path.rglob("*")) if path.is_dir() and not (path / checkpoint.SUMS).exists() else [path]:
            if file.is_file() or file == path:
                upload_path(file, self._object(file))

    def flush(self) -> bool:
        return self._synchronizer is None or self._synchronizer.flush()

    # ---- checkpoints ----

    def localize(self, path: Path) -> Path:
        """A checkpoint, given by its path or relative to the run, downloaded unless this node has it."""
        target = self.path / path
        if target.is_relative_to(self.path) and not download_checkpoint(self._object(target), target):
            raise DataError(f"{self._object(target)} is no complete checkpoint: it has no {checkpoint.SUMS}")
        return target

    def latest_checkpoint(self) -> tuple[Path | None, list[str]]:
        """The newest intact checkpoint, downloaded with the newer damaged ones, and a sentence for each of these."""
        for name in reversed(self.step_checkpoints()):
            target = self.path / "checkpoints" / name
            try:
                if download_checkpoint(self._object(target), target):
                    checkpoint.verify(target)
                    break
            except checkpoint.CheckpointDamaged:
                continue
        return checkpoint.latest(self.path / "checkpoints")

    def step_checkpoints(self) -> list[str]:
        return [name for name in self._complete("checkpoints") if re.fullmatch(r"step-\d{7,}", name)]

    def finished_phases(self) -> list[str]:
        return self._complete("phases")

    def checkpoint_names(self) -> list[str]:
        best = ["best"] if (self._remote / "best" / checkpoint.SUMS).exists() else []
        return [*self.step_checkpoints(), *self.finished_phases(), *best]

    def delete_checkpoints(self) -> None:
        for part in CHECKPOINT_PARTS:
            (self._remote / part).delete_folder()

    # ---- bucket and copy ----

    def _object(self, path: Path) -> S3Path:
        return self._remote / path.relative_to(self.path)

    def _complete(self, folder: str) -> list[str]:
        files = (name.split("/") for name in (self._remote / folder).files())
        return [parts[0] for parts in files if len(parts) == 2 and parts[1] == checkpoint.SUMS]

    def _download_small_files(self) -> None:
        for name in self._remote.files():
            if name.split("/")[0] not in _LARGE and (name == PLACEMENT_GROUP_FILE or not name.startswith(".")):
                (self._remote / name).download(self.path / name)

    def _download_checkpoints(self) -> None:
        """Download all complete checkpoints, so that old ones are pruned later; remove incomplete uploads."""
        complete = self.step_checkpoints()
        for name in (self._remote / "checkpoints").folders():
            remote = self._remote / "checkpoints" / name
            if name not in complete or not download_checkpoint(remote, self.path / "checkpoints" / name):
                remote.delete_folder()

    def _start(self, **options: Any) -> Synchronizer:
        self._synchronizer = Synchronizer(self.path, self._remote, **options)
        self._synchronizer.mark_synced()
        self._synchronizer.start()
        return self._synchronizer


def _copy_folder(remote: S3Path, role: str) -> Path:
    """Folder for this process's copy of a run; removes those that killed processes have left."""
    runs = cache_folder() / "runs"
    prefix = f"{remote.name}-{hashlib.sha256(str(remote).encode()).hexdigest()[:8]}-{platform.node()}-"
    if runs.is_dir():
        for left in runs.glob(f"{prefix}*"):
            if not process_alive(left.name.removeprefix(prefix).partition("-")[0]):
                shutil.rmtree(left, ignore_errors=True)
    folder = runs / f"{prefix}{os.getpid()}-{role}"
    if role == "reader":
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
