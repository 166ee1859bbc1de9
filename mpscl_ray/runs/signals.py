"""Ctrl-C and SIGTERM: the first asks the loop to stop after its step, the second ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

from mpscl_ray.errors import Interrupted

EXIT_CODE = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """While the block runs, a signal only sets a flag::

        with Interruption() as interruption:
            for iteration in ...:
                step()
                if interruption.requested:
                    save_checkpoint()
                    raise Interrupted(...)      # exit code 130

    The second signal ends the process at once with exit code 130, without a checkpoint and without clean-up. Python
    allows handlers in the main thread only; elsewhere entering the block raises, and :meth:`request` sets the flag.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self._previous: dict[signal.Signals, object] = {}
        self.signal_name = ""
        """What asked for the stop: SIGINT, SIGTERM or the name given to :meth:`request`; empty before."""

    @property
    def requested(self) -> bool:
        """Whether the loop should stop after the step it is in."""
        return self._event.is_set()

    def request(self, name: str) -> None:
        """Ask for the stop without a signal, from any thread."""
        self.signal_name = self.signal_name or name
        self._event.set()

    def wait(self, seconds: float) -> bool:
        """Sleep until a request, at most so many seconds; returns :attr:`requested`."""
        return self._event.wait(seconds)

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            # None means a handler that was not set from Python and cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested:
            _say(f"\n{name} again: leaving at once; the last complete checkpoint stays\n")
            os._exit(EXIT_CODE)
        self.request(name)
        _say(f"\n{name}: finishing this step and writing a checkpoint; once more to leave at once\n")


@contextmanager
def signals_end(when: str) -> Iterator[None]:
    """Inside the block Ctrl-C and SIGTERM raise an error at once: there is nothing to save.

    Raises:
        Interrupted: on a signal; says ``when``.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name} {when}")

    previous = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    """Write to standard error from a handler, where buffered streams are not safe to use."""
    try:
        os.write(2, text.encode())
    except OSError:
        return
