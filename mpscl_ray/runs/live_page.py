"""The page ``progress.html`` of a run, a search or a comparison, rewritten while it runs.

It is one file that needs no server: it has what it shows inside, loads nothing, and renews itself in the browser.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpscl_ray import __version__
from mpscl_ray.errors import StorageError
from mpscl_ray.runs.atomic_files import write_atomically
from mpscl_ray.runs.environment import now
from mpscl_ray.runs.html import render

_EVERY_S = 20.0
"""Least time between two writings."""
_LONGEST_SHARE = 0.01
"""Of the time, for writing the page."""
_RENEW_S = 30
"""After this time the browser reads the page again."""


@dataclass(frozen=True)
class LiveTable:
    """A table of text cells."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    links: Sequence[str] = ()
    """For each row, the page that its first cell leads to, relative to this one; "" for none."""


@dataclass(frozen=True)
class Content:
    """What a page shows now."""

    title: str
    state: str
    """In a sentence."""
    done: float
    """Share of the work, in [0, 1]; at 1 the page does not renew itself any more."""
    facts: Sequence[tuple[str, str]] = ()
    """Names and values."""
    notices: Sequence[str] = ()
    """What may be wrong, a sentence each."""
    tables: Sequence[LiveTable] = ()
    curves: Mapping[str, Any] = field(default_factory=lambda: {"panels": []})
    """See :func:`mpscl_ray.runs.curves.curves`."""
    pictures: Sequence[tuple[str, bytes]] = ()
    """Caption and PNG of each, in the order in which they are shown."""
    preformatted: str = ""
    """Lines of text that keep their columns."""


class LivePage:
    """Writes a page now and then; a file that cannot be written ends nothing, as the records have the same numbers.

    Args:
        file: the page.
        content: returns what it shows.
        clock: seconds, from any origin.
    """

    def __init__(self, file: Path, content: Callable[[], Content], clock: Callable[[], float] = time.monotonic) -> None:
        self._file, self._content, self._clock = file, content, clock
        self._next = 0.0

    def update(self, at_once: bool = False) -> None:
        """Write the page, unless that was done a short time ago; called as often as one likes."""
        started = self._clock()
        if started < self._next and not at_once:
            return
        with suppress(StorageError):
            write_atomically(self._file, live_page(self._content()).encode())
        ended = self._clock()
        self._next = ended + max(_EVERY_S, (ended - started) / _LONGEST_SHARE)


def live_page(content: Content) -> str:
    """The whole page."""
    return render(
        Path(__file__).parent / "live.html",
        title=content.title,
        content=content,
        renew_s=_RENEW_S if content.done < 1 else None,
        written=now(),
        version=__version__,
    )
