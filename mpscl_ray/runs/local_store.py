"""A run directory on a file system that all nodes of the run share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.atomic_files import storage_errors, write_atomically
from mpscl_ray.runs.control_files import LocalControlFiles
from mpscl_ray.runs.lock import lock_owner, run_lock, worker_lock

PARTS = ("checkpoints", "phases", "results", "tensorboard", "logs")
"""Subdirectories of every training run."""

CHECKPOINT_PARTS = ("checkpoints", "phases", "best")
"""Subdirectories that hold checkpoints."""


class LocalStore:
    """Access to a run by its path. Making the object touches no file."""

    poll_interval_s = 0.0
    """Least time between two reads of what other processes write."""

    fencing_token = ""
    """Proves to the store that a worker belongs to the command that holds the lock; flock needs none."""

    sync_error: Exception | None = None
    """Why files that are written here no longer reach the store, so that the run should stop."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.control_files = LocalControlFiles(path)

    @property
    def display_path(self) -> str:
        """Where users find the run."""
        return str(self.path)

    @property
    def uri(self) -> str:
        """Where other processes and nodes find the run."""
        return str(self.path.absolute())

    def create(self, parts: Collection[str] = PARTS) -> None:
        """Make the directory and its parts, and check that it is writable. Raises StorageError."""
        with storage_errors(self.path):
            for part in parts:
                (self.path / part).mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe-{os.getpid()}"
            try:
                probe.write_bytes(b"written")
            finally:
                probe.unlink(missing_ok=True)

    def init_worker_dir(self) -> None:
        """Prepare the directory for a worker: the command has made it already."""

    def neighbours(self) -> list[str]:
        """Names of the runs in the same directory."""
        return sorted(file.parent.name for file in self.path.parent.glob("*/config.yaml"))

    # ---- locks ----

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process. The system frees the lock when the process ends, however it ends.

        Raises:
            ConfigError: Another process of this host holds it; names its pid.
            StorageError: The lock file cannot be written.
        """
        with run_lock(self.path):
            for file in self.path.glob(".*.partial-*"):  # left by a process that was killed
                if file.is_file():
                    file.unlink(missing_ok=True)
            yield

    def lock_owner(self) -> int | None:
        """Pid of the process that holds the run now; None when none does."""
        return lock_owner(self.path)

    @contextmanager
    def worker_lock(self, token: str, rank: int) -> Iterator[None]:
        """Hold the right to train for a worker; worker 0 alone writes checkpoints, metrics and TensorBoard events.

        Args:
            token: Fencing token of the command that started the worker.
            rank: Of the worker.

        Raises:
            ClusterError: Another worker 0 keeps holding it.
        """
        with worker_lock(self.path) if rank == 0 else nullcontext():
            yield

    # ---- files ----

    def has(self, file: Path) -> bool:
        """Whether a file of the run exists."""
        return file.is_file()

    def write(self, file: Path, data: bytes) -> None:
        """Replace a file as a whole. Raises StorageError."""
        write_atomically(file, data)

    def refresh(self, file: Path) -> Path:
        """A file of the run, up to date."""
        return file

    def upload(self, path: Path) -> None:
        """Store a file, a checkpoint or a folder of files: what is written here is stored already."""

    def flush(self) -> bool:
        """Wait until all that was written so far is stored; False where the storage fails. Nothing to wait for here."""
        return True

    # ---- checkpoints ----

    def localize(self, path: Path) -> Path:
        """A checkpoint, given by its path or relative to the run, as a path that can be read on this node."""
        return path if path.is_relative_to(self.path) else self.path / path

    def latest_checkpoint(self) -> tuple[Path | None, list[str]]:
        """The newest intact checkpoint, and a sentence for each newer damaged one (:func:`checkpoint.latest`)."""
        return checkpoint.latest(self.path / "checkpoints")

    def step_checkpoints(self) -> list[str]:
        """Names of the checkpoints to resume from, oldest first."""
        return [path.name for path in checkpoint.list_checkpoints(self.path / "checkpoints")]

    def finished_phases(self) -> list[str]:
        """Names of the phases whose last checkpoint is kept."""
        return sorted(path.name for path in (self.path / "phases").glob("[!.]*") if path.is_dir())

    def checkpoint_names(self) -> list[str]:
        """Names of all checkpoints: steps, oldest first, phases, and ``best``."""
        best = ["best"] if (self.path / "best").is_dir() else []
        return [*self.step_checkpoints(), *self.finished_phases(), *best]

    def delete_checkpoints(self) -> None:
        """Remove all checkpoints; config, metrics and results stay."""
        for part in CHECKPOINT_PARTS:
            shutil.rmtree(self.path / part, ignore_errors=True)
