"""YAML that anyone may have written: plain values in a file of bounded size, without aliases, not too deep.

A few lines of aliases of aliases stand for more values than fit into memory, and deep nesting ends Python's stack.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
"""Mappings and lists within each other."""


class SafeLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which builds plain values alone, with these limits."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark: Any = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, f"found the alias *{event.anchor}, expected its value in place", mark
            )
        if self._depth == MAX_DEPTH:
            raise yaml.composer.ComposerError(
                None, None, f"found more than {MAX_DEPTH} mappings and lists within each other", mark
            )
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def compose(text: str) -> yaml.Node | None:
    """The nodes of a text, None of an empty one. Raises yaml.YAMLError."""
    node: yaml.Node | None = yaml.compose(text, Loader=SafeLoader)
    return node


def construct(node: yaml.Node) -> Any:
    """The value of a node. Raises yaml.YAMLError."""
    try:
        return SafeLoader("").construct_object(node, deep=True)
    except ValueError as error:  # a date without such a day, a number of thousands of digits
        raise yaml.YAMLError(f"{error} in line {node.start_mark.line + 1}") from error


def load(text: str) -> Any:
    """The values of a text. Raises yaml.YAMLError."""
    node = compose(text)
    return None if node is None else construct(node)


def read_text(path: Path) -> str:
    """The text of a file. Raises OSError where it cannot be read or is too large, UnicodeDecodeError."""
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise OSError(errno.EFBIG, f"larger than {MAX_BYTES >> 20} MB, so hardly a file of settings", str(path))
    return content.decode()
