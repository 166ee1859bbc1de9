"""What all commands share: errors as one sentence, documented exit codes, hints for misspelt names."""

from __future__ import annotations

import atexit
import difflib
import gc
import io
import os
import sys
from collections.abc import Callable, Iterable

from mpscl_ray.errors import MpsclError

EXIT_CODES = (
    "exit codes: 0 done, 2 usage or config, 3 data, 4 cluster or resources, 5 storage, 6 training failed, "
    "130 interrupted and resumable"
)
"""Shown at the end of every --help."""


def did_you_mean(word: str, candidates: Iterable[str], cutoff: float = 0.5, prefix: str = "") -> str:
    """``did you mean 'WORD'?`` with the nearest candidate, or nothing where none is near.

    Args:
        word: what was given.
        candidates: what it could have been.
        cutoff: least similarity of the two, 0 to 1.
        prefix: put in front of the candidate.
    """
    nearest = difflib.get_close_matches(word, list(candidates), n=1, cutoff=cutoff)
    return f"did you mean '{prefix}{nearest[0]}'?" if nearest else ""


def run(main: Callable[[list[str]], int], arguments: list[str] | None = None) -> None:
    """Run a command's ``main(arguments)``, by default with those of the process, and exit with its code.

    An :class:`MpsclError` is printed as one sentence; anything else is a defect and keeps its traceback.
    ``MPSCL_RAY_DEBUG=1`` shows the traceback of the former too.
    """
    atexit.register(gc.freeze)  # Otherwise Python collects garbage in all of torch and Ray at exit, for seconds.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # File names may have characters that the terminal lacks.
    try:
        code = main(sys.argv[1:] if arguments is None else arguments)
    except MpsclError as error:
        if os.environ.get("MPSCL_RAY_DEBUG") == "1":
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    sys.exit(code)
