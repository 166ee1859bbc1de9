"""The table of trials on a terminal, redrawn in its own lines; elsewhere a line for each event."""

from __future__ import annotations

import math
import shutil
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

from mpscl_ray.tune.study import Study

_REDRAW_S = 1.0
_RECENT = 5
"""Events below the table."""


class TrialTable:
    """Shows a search while it runs.

    Args:
        rows: returns the current lines of the table.
        stream: where to; other than a terminal gets events only.
    """

    def __init__(self, rows: Callable[[], list[str]], stream: TextIO | None = None) -> None:
        self._rows = rows
        self._stream = sys.stdout if stream is None else stream
        self._live = self._stream.isatty()
        self._drawn = 0
        self._last = 0.0
        self._recent: list[str] = []
        self._lock = threading.Lock()

    def log(self, sentence: str) -> None:
        """Show an event; may be called from any thread."""
        with self._lock:
            if self._live:
                self._recent = [*self._recent, sentence][-_RECENT:]
            else:
                print(sentence, file=self._stream, flush=True)

    def redraw(self) -> None:
        """Draw the table again, at most once a second."""
        if self._live and time.monotonic() - self._last >= _REDRAW_S:
            self._draw()

    def close(self) -> None:
        """Draw the last state, which stays on the screen."""
        if self._live:
            self._draw()
        self._live = False

    def _draw(self) -> None:
        with self._lock:
            columns, height = shutil.get_terminal_size()
            lines = [*self._rows(), "", *self._recent]
            lines = [line[: columns - 1] for line in lines[: height - 2]]
            up = f"\x1b[{self._drawn}A" if self._drawn else ""
            print(up + "\x1b[J" + "\n".join(lines), file=self._stream, flush=True)
            self._drawn, self._last = len(lines), time.monotonic()


def short_value(value: Any) -> str:
    """A setting's value in a cell."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def short_key(key: str) -> str:
    """A setting's name at the head of a column: without its section."""
    return key.rpartition(".")[2]


def trial_cells(study: Study) -> list[list[str]]:
    """The table of the trials that have started: its header, and a row for each."""
    keys = study.space.keys
    cells = [["trial", "state", "iteration", study.metric.replace("_", " "), *map(short_key, keys)]]
    for trial in list(study.ledger.trials.values()):  # another thread adds some
        value = study.score(trial)
        cells.append(
            [
                f"{trial.number:03d}",
                trial.state or ("running" if trial.number in study.started else "waiting"),
                f"{trial.iteration}/{study.iterations}",
                "" if value is None or math.isnan(value) else f"{value:.4f}",
                *(short_value(trial.settings[key]) for key in keys),
            ]
        )
    return cells


def trial_rows(study: Study) -> list[str]:
    """The table of the trials that have started as text."""
    cells = trial_cells(study)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    waiting = study.sampler.total - (len(cells) - 1)
    return lines + ([f"{waiting} more to come"] if waiting > 0 else [])
