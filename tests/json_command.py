"""Commands with ``--json``, in this process."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from typing import Any

import pytest

from mpscl_ray.runs import cli


def json_of(main: Callable[[list[str]], int], *words: object) -> dict[str, Any]:
    """The document that a command prints, which must be all that it prints on stdout."""
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout), pytest.raises(SystemExit) as ended:
        cli.run(main, [*map(str, words), "--json"])
    document: dict[str, Any] = json.loads(stdout.getvalue())
    assert list(document)[:3] == ["command", "exit_code", "error"]
    assert document["exit_code"] == ended.value.code
    assert (document["error"] is None) == (document["exit_code"] == 0)
    return document
