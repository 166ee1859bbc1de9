"""Ctrl-C, SIGTERM and SIGHUP: the first asks the loop to stop after its step, the second ends the process at once.

SIGHUP means that the terminal was closed; under ``nohup`` nothing changes.
"""

from __future__ import annotations

import math
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Self

from mpscl_ray.errors import Interrupted

_TWICE_S = 0.1
"""Time within which two SIGTERM are one."""


class Interruption:
    """While the block runs, a signal only sets a flag::

        with Interruption() as interruption:
            for iteration in ...:
                step()
                if interruption.requested:
                    save_checkpoint()
                    raise Interrupted(...)      # exit code 130

    The second signal ends the process at once with exit code 130, without a checkpoint and without clean-up; but not
    SIGHUP, which shells send after the terminal did, and not SIGTERM right after the first, as ``timeout`` sends it to
    the process and to its group. Python allows handlers in the main thread only; elsewhere entering the block raises,
    and :meth:`request` sets the flag.
    """

    def __init__(self) -> None:
        self.requested = False
        """Whether the loop should stop after the step it is in."""
        self.signal_name = ""
        """What asked for the stop: a signal or the name given to :meth:`request`; empty before."""
        self._handlers = ExitStack()
        self._last = -math.inf

    def request(self, name: str) -> None:
        """Ask for the stop without a signal, from any thread."""
        self.signal_name = self.signal_name or name
        self.requested = True

    def __enter__(self) -> Self:
        self._handlers.enter_context(_handlers(self._handle))
        return self

    def __exit__(self, *exception: object) -> None:
        self._handlers.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name, before, self._last = signal.Signals(number).name, self._last, time.monotonic()
        if self.requested:
            if number == signal.SIGHUP or (number == signal.SIGTERM and self._last - before < _TWICE_S):
                return
            _say(f"\n{name} again: leaving at once; the last complete checkpoint stays\n")
            os._exit(Interrupted.exit_code)
        self.request(name)
        _say(f"\n{name}: finishing this step and writing a checkpoint; once more to leave at once\n")


@contextmanager
def signals_end(when: str) -> Iterator[None]:
    """Inside the block Ctrl-C, SIGTERM and SIGHUP raise an error at once: there is nothing to save.

    Raises:
        Interrupted: on a signal; says ``when``.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name} {when}")

    with _handlers(end):
        yield


@contextmanager
def first_signal_ends(when: str) -> Iterator[None]:
    """As :func:`signals_end`, so that files are cleaned up; further signals do nothing.

    In another thread than the main one, which alone may handle signals, nothing changes.

    Raises:
        Interrupted: on the first signal; says ``when``.
    """

    def end(number: int, frame: FrameType | None) -> None:
        for one in _numbers():
            signal.signal(one, signal.SIG_IGN)  # removing the files is not interrupted
        raise Interrupted(f"stopped by {signal.Signals(number).name} {when}")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _handlers(end):
        yield


@contextmanager
def _handlers(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the signals inside the block."""

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _leave_terminal()
        handler(number, frame)

    previous = {number: signal.signal(number, handle) for number in _numbers()}
    try:
        yield
    finally:
        for number, before in previous.items():
            # None means a handler that was not set from Python and cannot be restored.
            signal.signal(number, signal.SIG_DFL if before is None else before)


def _numbers() -> list[signal.Signals]:
    """The signals that stop a command."""
    stops = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    return [number for number in stops if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


def _leave_terminal() -> None:
    """Drop what is printed from now on: writing to a terminal that was closed raises an error."""
    for stream in (1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode):  # no file and no pipe; a closed terminal is not one to isatty
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), stream)


def _say(text: str) -> None:
    """Write to standard error from a handler, where buffered streams are not safe to use."""
    with suppress(OSError):
        os.write(2, text.encode())
