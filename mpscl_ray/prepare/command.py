"""Images to a dataset for training: ``python -m mpscl_ray.prepare INPUT --layout mmwhs --out DIR``."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from mpscl_ray.errors import Interrupted
from mpscl_ray.prepare.arguments import parse


@contextmanager
def _signals_end() -> Iterator[None]:
    """SIGTERM, SIGHUP and Ctrl-C raise an error, so that the hidden folder is removed; the second one changes nothing.

    Raises:
        Interrupted: on the first signal.
    """

    def end(number: int, frame: FrameType | None) -> None:
        for one in previous:
            signal.signal(one, signal.SIG_IGN)  # removing the files is not interrupted
        raise Interrupted(
            f"stopped by {signal.Signals(number).name} before the dataset was finished; nothing was written, give the "
            "same command again"
        )

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
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


def main(arguments: Sequence[str]) -> int:
    """The command line; returns its exit code."""
    options = parse(arguments)
    # Imported here: help and refused arguments need no scipy and no pyarrow.
    from mpscl_ray.prepare.pictures.page import PICTURES
    from mpscl_ray.prepare.run import next_command, prepare, summary

    with _signals_end():
        folders = prepare(options)
    for folder in folders.values():
        print(summary(folder))
        if options.pictures:
            print(f"  pictures: {folder / PICTURES}")
    print(f"next: {next_command(folders)}")
    return 0
