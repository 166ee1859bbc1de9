"""A progress line, which shows how far a phase is."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Self, TextIO

_WINDOW_S = 30.0
_SHORTEST_S = 0.5
"""Shortest time to measure a speed over: updates of a short phase may come all at once."""
_REDRAW_S = 0.1
_BAR = 20


class ProgressLine:
    """One line that is redrawn on a terminal, a plain line now and then elsewhere.

    It has no colours and no escape codes, so that it reads the same in a log. It never ends a run: when the stream is
    closed, it prints nothing more.

    Args:
        total: Iterations of the phase.
        label: Name of the phase.
        images_per_iteration: Over all workers, for images/s.
        start: Iterations done before, by a run that is resumed; they do not count for the speed.
        stream: Standard error when not given.
        every_s: Seconds between plain lines.
        clock: Seconds, from any origin.
    """

    def __init__(
        self,
        total: int,
        label: str,
        *,
        images_per_iteration: int = 0,
        start: int = 0,
        stream: TextIO | None = None,
        every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._label = label
        self._images = images_per_iteration
        self._iteration = start
        self._loss: float | None = None
        self._stream: TextIO | None = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._every_s = every_s
        self._clock = clock
        self._window: deque[tuple[float, int]] = deque([(clock(), start)])
        self._last = clock()
        self._width = 0
        self._shown: tuple[int, float | None] | None = None

    def update(self, iteration: int, *, loss: float | None = None) -> None:
        """Set the number of iterations done, and a loss where one was read; the last loss stays in the line."""
        self._iteration = iteration
        self._loss = self._loss if loss is None else loss
        time_now = self._clock()
        self._window.append((time_now, iteration))
        while len(self._window) > 2 and self._window[0][0] < time_now - _WINDOW_S:
            self._window.popleft()
        if time_now - self._last >= (_REDRAW_S if self._terminal else self._every_s):
            self._show()

    def message(self, text: str) -> None:
        """Print a separate line above the progress line."""
        self._write(f"\r{' ' * self._width}\r{text}\n" if self._terminal and self._width else f"{text}\n")
        if self._terminal and self._width:
            self._show()

    def close(self) -> None:
        """Show the last state, unless there was nothing to do, and end the line."""
        if self._total and self._shown != (self._iteration, self._loss):
            self._show()
        if self._terminal and self._width:
            self._write("\n")
        self._width = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _rate(self) -> float:
        """Iterations per second over the last half minute; 0 before the second update."""
        (first, start), (last, end) = self._window[0], self._window[-1]
        return (end - start) / (last - first) if last - first >= _SHORTEST_S else 0.0

    def _show(self) -> None:
        self._last = self._clock()
        self._shown = (self._iteration, self._loss)
        if not self._terminal:
            self._write(", ".join(self._parts()) + "\n")
            return
        # One column less than the width: some terminals wrap when the last one is filled.
        room = max(self._columns() - 1, 1)
        parts = self._parts()
        done = round(_BAR * min(self._iteration / max(self._total, 1), 1.0))
        line = "  ".join([parts[0], f"[{'#' * done}{'-' * (_BAR - done)}]", *parts[1:]])
        if len(line) > room:
            while len(parts) > 1 and len("  ".join(parts)) > room:
                parts.pop()
            line = "  ".join(parts)[:room]
        self._write("\r" + line.ljust(min(self._width, room)))
        self._width = len(line)

    def _parts(self) -> list[str]:
        percent = 100 * self._iteration // max(self._total, 1)
        parts = [f"{self._label} {self._iteration}/{self._total} ({percent}%)"]
        rate = self._rate()
        if rate > 0:
            parts.append(f"ETA {duration((self._total - self._iteration) / rate)}")
            if self._images:
                parts.append(f"{rate * self._images:.1f} images/s")
        if self._loss is not None:
            parts.append(f"loss {self._loss:.4f}")
        return parts

    def _columns(self) -> int:
        try:
            assert self._stream is not None
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except (OSError, ValueError):
            return 80

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            # The terminal or the pipe is closed.
            self._stream = None


def duration(seconds: float) -> str:
    """``minutes:seconds``, with hours where there are any."""
    minutes, second = divmod(max(round(seconds), 0), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
