"""The file in which a command records what it has done: after a kill, the same command resumes from it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mpscl_ray.errors import DataError, StorageError
from mpscl_ray.runs.atomic_files import storage_errors, write_atomically
from mpscl_ray.runs.environment import now


class LedgerFile:
    """A file of records. One process writes it, any number read it.

    A write returns when it is on the disk and, for a run in a bucket, uploaded: nothing is decided by a record that a
    kill could lose. A ledger either grows by JSON lines (:meth:`append`) or is one JSON object that each write replaces
    (:meth:`replace`).

    Args:
        file: location of the records.
        flush: called after each write; waits for the upload where the file belongs to a bucket.
    """

    def __init__(self, file: Path, flush: Callable[[], None] = lambda: None) -> None:
        self.file, self._flush = file, flush

    def read_lines(self, apply: Callable[[dict[str, Any]], None], expected: str) -> None:
        """Pass each JSON line to ``apply``, and cut off a last line that a kill has torn.

        Args:
            apply: raises KeyError, TypeError or ValueError for a record that it cannot use.
            expected: what a line should hold, for the error.

        Raises:
            DataError: a line other than the last is damaged; names it.
            StorageError: the file cannot be read.
        """
        try:
            data = self.file.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(f"cannot read {self.file}: {error.strerror}") from error
        whole = 0
        for number, line in enumerate(data.splitlines(keepends=True), start=1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("torn")
                apply(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                if whole + len(line) == len(data):
                    break
                raise DataError(f"{self.file} line {number} is damaged: expected {expected}") from error
            whole += len(line)
        if whole < len(data):
            with storage_errors(self.file):
                os.truncate(self.file, whole)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line, with the time. Raises StorageError."""
        line = json.dumps(_plain({**record, "time": now()}), allow_nan=False).encode() + b"\n"
        with storage_errors(self.file, len(line)), open(self.file, "ab", buffering=0) as file:
            written = 0
            while written < len(line):
                written += file.write(line[written:])
            os.fsync(file.fileno())
        self._flush()

    def read_object(self) -> dict[str, Any]:
        """The JSON object; {} where there is no file yet. Raises OSError and ValueError."""
        try:
            content: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return content

    def replace(self, content: Mapping[str, Any]) -> None:
        """Replace the whole file, with the time. Raises StorageError."""
        text = json.dumps({"updated": now(), **content}, indent=1, allow_nan=False)
        write_atomically(self.file, text.encode() + b"\n")
        self._flush()


def _plain(value: Any) -> Any:
    """JSON has no number that is not finite; such a number is written as a word that float() reads back."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
