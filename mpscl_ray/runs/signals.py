"""Ctrl-C and SIGTERM: the first asks the loop to stop after its step, the second ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Self

from mpscl_ray.errors import Interrupted


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
        self.requested = False
        """Whether the loop should stop after the step it is in."""
        self.signal_name = ""
        """What asked for the stop: SIGINT, SIGTERM or the name given to :meth:`request`; empty before."""
        self._handlers = ExitStack()

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
        name = signal.Signals(number).name
        if self.requested:
            _say(f"\n{name} again: leaving at once; the last complete checkpoint stays\n")
            os._exit(Interrupted.exit_code)
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

    with _handlers(end):
        yield


@contextmanager
def first_signal_ends(when: str) -> Iterator[None]:
    """Inside the block SIGTERM, SIGHUP and Ctrl-C raise an error, so that files are cleaned up; further ones do
    nothing.

    In another thread than the main one, which alone may handle signals, nothing changes.

    Raises:
        Interrupted: on the first signal; says ``when``.
    """

    def end(number: int, frame: FrameType | None) -> None:
        for one in previous:
            signal.signal(one, signal.SIG_IGN)  # removing the files is not interrupted
        raise Interrupted(f"stopped by {signal.Signals(number).name} {when}")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    if previous[signal.SIGHUP] is signal.SIG_IGN:
        del previous[signal.SIGHUP]  # nohup
    try:
        for number in previous:
            signal.signal(number, end)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _handlers(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle Ctrl-C and SIGTERM inside the block."""
    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, before in previous.items():
            # None means a handler that was not set from Python and cannot be restored.
            signal.signal(number, signal.SIG_DFL if before is None else before)


def _say(text: str) -> None:
    """Write to standard error from a handler, where buffered streams are not safe to use."""
    with suppress(OSError):
        os.write(2, text.encode())
