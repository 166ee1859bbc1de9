"""The keys that docs/scripts.md gives the JSON document of each command."""

from __future__ import annotations

import re
from typing import Any

from tests.docs.markdown import ROOT, code, table_rows

_PAGE = ROOT / "docs" / "scripts.md"
HEAD = [code(row[0])[0] for row in table_rows(_PAGE, "# Scripts and agents")]
KEYS = {
    code(command)[0]: [key for key in code(re.sub(r"\([^)]*\)", "", keys)) if "." not in key]
    for command, keys in table_rows(_PAGE, "## What each command prints")
}


def check_keys(command: str, document: dict[str, Any]) -> None:
    """The document of a command that did its work has the keys of the page, and no others."""
    assert document["exit_code"] == 0, document["error"]
    assert document["command"] == command.split()[0]
    assert sorted(document) == sorted([*HEAD, *KEYS[command]])
