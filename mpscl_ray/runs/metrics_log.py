"""metrics.jsonl: what was measured, one JSON record a line, appended so that a kill loses at most the line in writing.

A record is flat and has an int ``global_step``. JSON has no number that is not finite: such a value is written as
"nan", "inf" or "-inf" and read back as the float.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpscl_ray.errors import DataError, StorageError
from mpscl_ray.runs.atomic_files import storage_errors, write_atomically

_SPELT = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsLog:
    """The records of one run. One process appends at a time, any number read."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._whole = False
        """Whether the file is known to end with a whole line."""

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record; it is on the disk when this returns.

        Args:
            record: Flat; numbers may be numpy's or 0-dim tensors.

        Raises:
            StorageError: It cannot be written; the records before it are intact.
        """
        line = _line(record)
        if not self._whole:
            self._drop_torn_line()
        with storage_errors(self.file, len(line)), open(self.file, "ab", buffering=0) as file:
            self._whole = False
            written = 0
            while written < len(line):
                written += file.write(line[written:])
            os.fsync(file.fileno())
            self._whole = True

    def read(self) -> list[dict[str, Any]]:
        """All whole records; a last line that a kill has torn is left out.

        Raises:
            DataError: Another line is damaged; names it.
        """
        return self._parse()[0]

    def rewind(self, global_step: int) -> int:
        """Drop the records after a global step, which a resumed run makes again. Returns how many were dropped."""
        records, _ = self._parse()
        kept = [record for record in records if record["global_step"] <= global_step]
        if self.file.exists():
            write_atomically(self.file, b"".join(map(_line, kept)))
        return len(records) - len(kept)

    def _drop_torn_line(self) -> None:
        _, whole = self._parse()
        with storage_errors(self.file):
            if self.file.exists() and whole < self.file.stat().st_size:
                os.truncate(self.file, whole)

    def _parse(self) -> tuple[list[dict[str, Any]], int]:
        """The whole records, and the number of bytes that they take."""
        try:
            data = self.file.read_bytes()
        except FileNotFoundError:
            return [], 0
        except OSError as error:
            raise StorageError(f"cannot read {self.file}: {error.strerror}") from error
        records: list[dict[str, Any]] = []
        whole = 0
        for number, line in enumerate(data.splitlines(keepends=True), start=1):
            record = _record(line)
            if record is None:
                if whole + len(line) == len(data):
                    break
                raise DataError(f"{self.file} line {number} is damaged: expected a JSON record; remove that line")
            records.append(record)
            whole += len(line)
        return records, whole


def _line(record: Mapping[str, Any]) -> bytes:
    assert isinstance(record.get("global_step"), int), "a record of metrics needs its global_step"
    return json.dumps({key: _plain(value) for key, value in record.items()}, allow_nan=False).encode() + b"\n"


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _record(line: bytes) -> dict[str, Any] | None:
    """A line as a record; None where it is not a whole one."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("global_step"), int):
        return None
    return {key: _SPELT.get(value, value) if isinstance(value, str) else value for key, value in record.items()}
