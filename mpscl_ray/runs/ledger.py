"""The file in which a command records what it has done: after a kill, the same command resumes from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mpscl_ray.runs.atomic_files import write_atomically
from mpscl_ray.runs.environment import now
from mpscl_ray.runs.json_lines import JsonLines


class LedgerFile:
    """A file of records. One process writes it, any number read it.

    A write returns when it is on the disk and, for a run in a bucket, uploaded: nothing is decided by a record that a
    kill could lose. A ledger either grows by JSON lines (:meth:`append`) or is one JSON object that each write replaces
    (:meth:`replace`).

    Args:
        file: location of the records.
        flush: called after each write; waits for the upload where the file belongs to a bucket.
        expected: what a line should be, for the message of a damaged one.
        is_valid: whether an object is a record of this ledger.
    """

    def __init__(
        self,
        file: Path,
        flush: Callable[[], None] = lambda: None,
        expected: str = "a JSON record",
        is_valid: Callable[[Mapping[str, Any]], bool] = lambda _: True,
    ) -> None:
        self.file, self._flush = file, flush
        self._lines = JsonLines(file, expected, is_valid)

    def read_lines(self) -> list[dict[str, Any]]:
        """The records of a ledger that grows; a torn last line is left out. Raises DataError and StorageError."""
        return self._lines.read()

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record as a line, with the time. Raises StorageError."""
        self._lines.append({**record, "time": now()})
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
