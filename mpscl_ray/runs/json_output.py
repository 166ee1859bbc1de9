"""``--json``: one JSON document on stdout says what a command did, and text for people goes to stderr.

Every document has ``command``, ``exit_code`` and ``error``: a sentence, null where the exit code is 0. Commands add
what they did by :func:`report`, whether or not it was asked for; ``docs/scripts.md`` lists the keys.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

OPTION = "--json"
_FOR_PEOPLE = frozenset(("-h", "--help", "--help-all", "--version", "--list-presets"))
"""Options that only print a text."""

_document: dict[str, Any] = {}
"""What the command that runs has reported so far. A process runs one command."""


def report(**entries: Any) -> None:
    """Add entries to the document of this command; paths become text, dataclasses objects, and NaN null."""
    _document.update(entries)


def is_asked_for(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for a document."""
    return OPTION in arguments and not _FOR_PEOPLE.intersection(arguments)


def run(work: Callable[[], int]) -> int:
    """Do the work of a command and print its document, also where it fails, or refuses its arguments by SystemExit.

    Returns:
        The exit code of the command.
    """
    _document.clear()
    stdout, code = sys.stdout, 1
    try:
        with contextlib.redirect_stdout(sys.stderr):
            code = work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except Exception as defect:
        report(error=f"{type(defect).__name__}: {defect}")
        raise
    finally:
        head = {"command": _document.pop("command", None), "exit_code": code, "error": _document.pop("error", None)}
        print(json.dumps(_plain(head | _document), indent=1, allow_nan=False), file=stdout, flush=True)
    return code


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):  # a number of numpy
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
