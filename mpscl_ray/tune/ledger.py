"""The ledger of a search: what happened to each trial, one JSON record a line. A search needs no other state.

A search that was killed resumes from it: trials that ended are not run again, and early stopping decides by the reports
that trials have made.

Records: ``trial``, ``report`` and ``end``, with the fields of ``_FIELDS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mpscl_ray.errors import DataError
from mpscl_ray.runs.environment import now
from mpscl_ray.runs.json_lines import JsonLines

End = Literal["finished", "stopped", "failed"]
"""How a trial may end: trained in full, stopped early, or failed."""


@dataclass
class Trial:
    """One trial as the ledger knows it."""

    number: int
    """From 1."""
    settings: dict[str, Any]
    """Values of the searched keys."""
    reports: dict[int, dict[str, float]] = field(default_factory=dict)
    """Metrics by iteration of the last phase, in order."""
    state: End | None = None
    """How it ended; None while it has not."""
    reason: str = ""
    """Why it failed or was stopped."""
    seconds: float = 0.0
    """In which its processes ran, over all starts; the time after its last report is lost if the search is killed."""

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


_FIELDS = {
    "trial": ("number", "settings"),
    "report": ("number", "iteration", "values"),
    "end": ("number", "state", "reason", "seconds"),
}


def _is_record(record: Mapping[str, Any]) -> bool:
    fields = _FIELDS.get(str(record.get("event")))
    return fields is not None and all(field in record for field in fields)


class Ledger(JsonLines):
    """The records of one search, read when opened and kept in step with the file.

    A write returns when it is on the disk and, for a search in a bucket, uploaded by ``flush``: nothing is decided by a
    record that a kill could lose.

    Raises:
        DataError: a line other than the last is damaged; names it.
        StorageError: the file cannot be read.
    """

    def __init__(self, file: Path, flush: Callable[[], object] = lambda: None) -> None:
        super().__init__(file, "a record of a trial", _is_record)
        self._flush = flush
        self.trials: dict[int, Trial] = {}
        self.order: list[tuple[int, int]] = []
        """(number, iteration) of every report, in the order in which they came."""
        for record in self.read():
            if record["event"] != "trial" and record["number"] not in self.trials:
                raise DataError(f"{file} is damaged: expected settings of trial {record['number']} before its reports")
            self._apply(record)

    def add(self, number: int, settings: dict[str, Any]) -> Trial:
        """A new trial."""
        assert number not in self.trials
        self._write({"event": "trial", "number": number, "settings": settings})
        return self.trials[number]

    def report(self, number: int, iteration: int, values: dict[str, float], seconds: float = 0.0) -> bool:
        """Metrics of a trial; False where they are known, as after a trial has resumed from an older checkpoint."""
        if iteration <= self.trials[number].iteration:
            return False
        record = {"event": "report", "number": number, "iteration": iteration, "values": values}
        self._write({**record, "seconds": round(seconds, 1)})
        return True

    def end(self, number: int, state: End, reason: str = "", seconds: float = 0.0) -> None:
        """The end of a trial, once."""
        assert not self.trials[number].ended, f"trial {number} ended twice"
        self._write({"event": "end", "number": number, "state": state, "reason": reason, "seconds": round(seconds, 1)})

    def _write(self, record: dict[str, Any]) -> None:
        self.append({**record, "time": now()})
        self._flush()
        self._apply(record)

    def _apply(self, record: dict[str, Any]) -> None:
        number = record["number"]
        if record["event"] == "trial":
            self.trials[number] = Trial(number, record["settings"])
            return
        trial = self.trials[number]
        if record["event"] == "report":
            trial.reports[record["iteration"]] = {key: float(value) for key, value in record["values"].items()}
            trial.seconds = record.get("seconds", 0.0)  # earlier ledgers have none
            self.order.append((number, record["iteration"]))
        else:
            trial.state, trial.reason, trial.seconds = record["state"], record["reason"], record["seconds"]
