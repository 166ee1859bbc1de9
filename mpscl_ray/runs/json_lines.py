"""Files of JSON records, one a line. A kill loses at most the line that is being written.

JSON has no number that is not finite: such a value is written as "nan", "inf" or "-inf" and read back as the float.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mpscl_ray.errors import DataError, StorageError
from mpscl_ray.runs import safe_json
from mpscl_ray.runs.atomic_files import storage_errors, write_atomically
from mpscl_ray.runs.storage import read_limited

MAX_BYTES = 1 << 30
"""Of a whole file: a million records."""
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class JsonLines:
    """One file. One process appends at a time, any number read.

    Args:
        file: The file; it need not exist.
        expected: What a line should be, for the message of a damaged one.
        is_valid: Whether an object is a record of this file.
    """

    def __init__(
        self,
        file: Path,
        expected: str = "a JSON record",
        is_valid: Callable[[Mapping[str, Any]], bool] = lambda _: True,
    ) -> None:
        self.file = file
        self._expected, self._is_valid = expected, is_valid
        self._is_whole = False
        """Whether the file is known to end with a whole line."""

    def read(self) -> list[dict[str, Any]]:
        """All whole records; a torn last line is left out.

        Raises:
            DataError: Another line is damaged; names it.
            StorageError: The file cannot be read.
        """
        return self._parse()[0]

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record, whose numbers may be numpy's or 0-dim tensors; it is on the disk when this returns.

        A torn last line is dropped first.

        Raises:
            StorageError: It cannot be written; the records before it are intact.
        """
        assert self._is_valid(record), f"this is not {self._expected}: {record}"
        line = _line(record)
        if not self._is_whole:
            self._drop_torn_line()
        with storage_errors(self.file, len(line)), open(self.file, "ab", buffering=0) as file:
            self._is_whole = False
            written = 0
            while written < len(line):
                written += file.write(line[written:])
            os.fsync(file.fileno())
            self._is_whole = True

    def replace(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Replace the whole file by these records. Raises StorageError."""
        write_atomically(self.file, b"".join(map(_line, records)))

    def _drop_torn_line(self) -> None:
        _, whole = self._parse()
        with storage_errors(self.file):
            if self.file.exists() and whole < self.file.stat().st_size:
                os.truncate(self.file, whole)

    def _parse(self) -> tuple[list[dict[str, Any]], int]:
        """The whole records, and the number of bytes that they take."""
        try:
            data = read_limited(self.file, MAX_BYTES)
        except FileNotFoundError:
            return [], 0
        except OSError as error:
            raise StorageError(f"cannot read {self.file}: {error.strerror}") from error
        except ValueError as error:
            raise DataError(f"{self.file} is damaged: {error}; move it away") from error
        records: list[dict[str, Any]] = []
        whole = 0
        for number, line in enumerate(data.splitlines(keepends=True), start=1):
            record = self._record(line)
            if record is None:
                if whole + len(line) == len(data):
                    break
                raise DataError(f"{self.file} line {number} is damaged: expected {self._expected}; remove that line")
            records.append(record)
            whole += len(line)
        return records, whole

    def _record(self, line: bytes) -> dict[str, Any] | None:
        """A line as a record; None where it is torn or damaged."""
        if not line.endswith(b"\n"):
            return None
        try:
            record = safe_json.loads(line)
        except ValueError:
            return None
        return _decode(record) if isinstance(record, dict) and self._is_valid(record) else None


class MetricsLog(JsonLines):
    """What was measured in one run. A record is flat and has an int ``global_step``."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, is_valid=lambda record: isinstance(record.get("global_step"), int))

    def rewind(self, global_step: int, phase: str | None = None) -> None:
        """Drop the records after a global step, which a resumed run writes again; and those at it of another phase."""
        if not self.file.exists():
            return

        def stays(record: Mapping[str, Any]) -> bool:
            step = record["global_step"]
            return step < global_step or (step == global_step and phase in (None, record.get("phase")))

        self.replace([record for record in self.read() if stays(record)])


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(_encode(record), allow_nan=False).encode() + b"\n"


def _encode(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    if hasattr(value, "item"):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
