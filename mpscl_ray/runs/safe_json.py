"""JSON that anyone may have written: a file of bounded size, not too deep, with integers that numpy and pages can hold.

A file of a gigabyte takes many times that when it is parsed, deep nesting ends Python's stack, and an integer of
thousands of digits takes minutes or overflows where a float is made of it. All of that is a ValueError here, as what is
no JSON is, with a message that completes a sentence such as ``FILE is damaged: ...``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpscl_ray.errors import DataError, StorageError
from mpscl_ray.runs.storage import S3Path, read_limited

MAX_BYTES = 1 << 26
MAX_DEPTH = 64
"""Objects and lists within each other."""
MAX_DIGITS = 100
"""Of an integer; a float holds 308."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read(file: Path | S3Path, max_bytes: int = MAX_BYTES, pairs: Callable[..., Any] | None = None) -> Any:
    """The values of a file. Raises OSError where it cannot be read, ValueError; for the rest see :func:`loads`."""
    return loads(read_limited(file, max_bytes), pairs)


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a run. Raises DataError and StorageError, each with a whole sentence."""
    try:
        content = read(file)
    except FileNotFoundError as error:
        raise DataError(f"{file} is missing: the run was stopped before it wrote one") from error
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{file} is damaged: it does not read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} is damaged: expected a JSON object")
    return content


def loads(data: bytes, pairs: Callable[..., Any] | None = None, *, any_text: bool = False) -> Any:
    """The values of a text in UTF-8.

    Args:
        data: The text.
        pairs: What makes an object of its (key, value) pairs, instead of dict.
        any_text: Whether texts may hold half of a surrogate pair, which no file and no terminal takes.

    Raises:
        ValueError: It is no JSON, or beyond the limits of this module.
    """
    text = data.decode("utf-8-sig")
    try:
        content = json.loads(text, object_pairs_hook=pairs, parse_int=_integer)
    except RecursionError:
        raise _too_deep() from None
    _check_depth(content)
    if not any_text and _SURROGATE.search(text):
        json.dumps(content, ensure_ascii=False).encode()
    return content


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"it holds an integer of {len(digits)} digits, expected at most {MAX_DIGITS}")
    return int(digits)


def _check_depth(content: Any) -> None:
    level = [content] if isinstance(content, dict | list) else []
    for _ in range(MAX_DEPTH):
        values = (item for value in level for item in (value.values() if isinstance(value, dict) else value))
        level = [item for item in values if isinstance(item, dict | list)]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> ValueError:
    return ValueError(f"it holds more than {MAX_DEPTH} objects and lists within each other")
