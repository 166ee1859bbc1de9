"""The ledger of a search: what happened to each trial, one JSON record a line. It is all that a search has to know.

One process appends, any number read. A record is on the disk before anything is decided by it, so that a search which
was killed goes on as if it had not been: trials that ended are not run again, and reports that trials made are the
ones that early stopping goes by.

Records: ``trial`` (number, settings), ``report`` (number, iteration, values), ``end`` (number, state, reason, seconds).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mpscl_ray.errors import DataError, StorageError
from mpscl_ray.runs.atomic_files import storage_errors
from mpscl_ray.runs.environment import now

End = Literal["finished", "stopped", "failed"]
"""How a trial may end: trained in full, stopped early, or unable to go on."""


@dataclass
class Trial:
    """One trial as the ledger knows it.

    Attributes:
        number: from 1.
        settings: values of the searched keys.
        reports: metrics by iteration of the last phase, in order.
        state: how it ended; None while it has not.
        reason: why it failed or was stopped.
        seconds: from its first start to its end, pauses of the whole search left out.
    """

    number: int
    settings: dict[str, Any]
    reports: dict[int, dict[str, float]] = field(default_factory=dict)
    state: End | None = None
    reason: str = ""
    seconds: float = 0.0

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self.state is not None

    @property
    def iteration(self) -> int:
        """The last iteration that it reported."""
        return max(self.reports, default=0)

    @property
    def last(self) -> dict[str, float]:
        """Metrics of its last report; {} before the first."""
        return self.reports.get(self.iteration, {})


class Ledger:
    """The records of one search, read when opened and kept in step with the file.

    Args:
        file: where they are.
        settle: called after each record, to wait until the file is in its place where that is a bucket.
    """

    def __init__(self, file: Path, settle: Callable[[], None] = lambda: None) -> None:
        """Read the file, if there is one; a last line that a kill has torn is dropped.

        Raises:
            DataError: another line is damaged; names it.
            StorageError: it cannot be read.
        """
        self.file, self._settle = file, settle
        self.trials: dict[int, Trial] = {}
        self.order: list[tuple[int, int]] = []
        """(number, iteration) of every report, in the order in which they came."""
        whole = 0
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(f"cannot read {file}: {error.strerror}") from error
        for line_number, line in enumerate(data.splitlines(keepends=True), start=1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("torn")
                self._apply(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                if whole + len(line) == len(data):
                    break
                raise DataError(f"{file} line {line_number} is damaged: expected a record of a trial") from error
            whole += len(line)
        if whole < len(data):
            with storage_errors(file):
                os.truncate(file, whole)

    def add(self, number: int, settings: dict[str, Any]) -> Trial:
        """A new trial."""
        assert number not in self.trials
        self._append({"event": "trial", "number": number, "settings": settings})
        return self.trials[number]

    def report(self, number: int, iteration: int, values: dict[str, float]) -> bool:
        """Metrics of a trial; False where they are known already, as when it went back to a checkpoint."""
        if iteration <= self.trials[number].iteration:
            return False
        self._append({"event": "report", "number": number, "iteration": iteration, "values": values})
        return True

    def end(self, number: int, state: End, reason: str = "", seconds: float = 0.0) -> None:
        """The end of a trial, once."""
        assert not self.trials[number].ended, f"trial {number} ended twice"
        self._append({"event": "end", "number": number, "state": state, "reason": reason, "seconds": round(seconds, 1)})

    def _append(self, record: dict[str, Any]) -> None:
        record["time"] = now()
        line = json.dumps(_spelt(record), allow_nan=False).encode() + b"\n"
        with storage_errors(self.file, len(line)), open(self.file, "ab", buffering=0) as file:
            file.write(line)
            os.fsync(file.fileno())
        self._settle()
        self._apply(record)

    def _apply(self, record: dict[str, Any]) -> None:
        number = record["number"]
        if record["event"] == "trial":
            self.trials[number] = Trial(number, record["settings"])
            return
        trial = self.trials[number]
        if record["event"] == "report":
            trial.reports[record["iteration"]] = {key: float(value) for key, value in record["values"].items()}
            self.order.append((number, record["iteration"]))
        else:
            trial.state, trial.reason, trial.seconds = record["state"], record["reason"], record["seconds"]


def _spelt(value: Any) -> Any:
    """JSON has no number that is not finite; float() reads these words back."""
    if isinstance(value, dict):
        return {key: _spelt(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
