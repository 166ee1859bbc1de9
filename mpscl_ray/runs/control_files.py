"""Control files: small files in a run directory by which processes on any node signal each other.

They need no lock: each is written as a whole by one process and read by any other.
"""

from __future__ import annotations

from pathlib import Path

from mpscl_ray.errors import StorageError
from mpscl_ray.runs.atomic_files import storage_errors, write_atomically
from mpscl_ray.runs.storage import S3Path, retry

STOP_FILE = "stop-requested"
"""Asks the workers to write a checkpoint and end."""

FAILURE_FILE = "failure.json"
"""Error of a worker that no restart can fix."""

PLACEMENT_GROUP_FILE = ".placement-group"
"""Name of the placement group of the workers, while they have one."""

ACTIVE_JOBS_FILE = ".active-jobs"
"""Session and job, one pair a line, of the running command and of those that were killed before it."""

VALIDATION_GATE_FILE = ".validation-gate"
"""Global step up to which another process allows training, followed by ``stop`` where the run must end there. Training
waits for it after each validation, if it exists."""

WARNINGS_FILE = "warnings.log"
"""File in ``logs`` with the warnings of the workers, one a line, which the command prints."""

WORKER_FAILURES_FILE = "worker_failures.log"
"""The same for worker failures. It is written on the node of the command."""


class LocalControlFiles:
    """Control files in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def write(self, name: str, text: str) -> None:
        """Make or replace a file. Raises StorageError."""
        with storage_errors(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
        write_atomically(self._directory / name, text.encode())

    def read(self, name: str) -> str | None:
        """Contents of a file; None where it does not exist. Raises StorageError."""
        try:
            return (self._directory / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"cannot read {self._directory / name}: {error.strerror}") from error

    def clear(self, name: str) -> None:
        """Remove a file if it exists. Raises StorageError."""
        with storage_errors(self._directory / name):
            (self._directory / name).unlink(missing_ok=True)


class BucketControlFiles:
    """Control files in a folder of a bucket, with the methods of :class:`LocalControlFiles`."""

    def __init__(self, remote: S3Path, patience_s: float) -> None:
        self._remote, self._patience_s = remote, patience_s

    def write(self, name: str, text: str) -> None:
        """Make or replace an object; retried for ``patience_s``. Raises StorageError."""
        retry(lambda: (self._remote / name).write_bytes(text.encode()), self._patience_s)

    def read(self, name: str) -> str | None:
        try:
            return (self._remote / name).read_bytes().decode("utf-8", "replace")
        except FileNotFoundError:
            return None

    def clear(self, name: str) -> None:
        (self._remote / name).delete()
