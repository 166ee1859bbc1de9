"""Settings as they are written: YAML files and ``key=value`` words, as flat keys with the origin of each value."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from mpscl_ray.errors import ConfigError
from mpscl_ray.runs import safe_yaml
from mpscl_ray.runs.config_diff import flatten
from mpscl_ray.runs.storage import is_url


class Setting(NamedTuple):
    """One value, and where it was written."""

    value: Any
    origin: str
    """Such as ``in small.yaml:4``."""


GIVEN = ON_COMMAND_LINE, IN_OVERRIDES = "on the command line", "in the overrides"
"""Origins of settings that were given for one run. A key of another method is an error there; in a preset it is not,
because another preset may build on it."""


def split_words(words: Sequence[str], kind: Literal["presets", "spaces"]) -> tuple[str, list[str]]:
    """The preset or space that a command line names, ``phantom`` where it names none, and the overrides.

    Raises:
        ConfigError: it names two.
    """
    overrides = [word for word in words if "=" in word and not is_url(word)]
    names = [word for word in words if word not in overrides]
    if len(names) > 1:
        raise ConfigError(f"{' and '.join(names)} are two {kind}, expected one; settings are written key=value")
    return (names[0] if names else "phantom"), overrides


def read_file(path: Path) -> dict[str, Setting]:
    """Flat keys of a YAML file.

    Raises:
        ConfigError: the file cannot be read, or holds no keys and values.
    """
    try:
        text = safe_yaml.read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; give a readable YAML file") from error
    return {key: Setting(copy.deepcopy(value), origin) for key, (value, origin) in _parsed(text, path)}


@functools.lru_cache(maxsize=256)
def _parsed(text: str, path: Path) -> tuple[tuple[str, Setting], ...]:
    """Keys and values of a text, parsed once: a comparison reads its presets in every cell."""
    try:
        root = safe_yaml.compose(text)
        if root is None:
            return ()
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path} holds a {root.tag.rsplit(':', 1)[-1]}, expected keys and values")
        return tuple(_walk(root, path))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def _walk(node: yaml.MappingNode, path: Path, prefix: str = "") -> Iterator[tuple[str, Setting]]:
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        if isinstance(value_node, yaml.MappingNode) and value_node.value:
            yield from _walk(value_node, path, f"{key}.")
        else:
            yield key, Setting(safe_yaml.construct(value_node), f"in {path.name}:{key_node.start_mark.line + 1}")


def read_overrides(
    overrides: Sequence[str] | Mapping[str, Any], origin: str = IN_OVERRIDES
) -> tuple[dict[str, Setting], list[str]]:
    """Flat keys of overrides, and a sentence for each word that is not ``key=value``.

    Args:
        overrides: ``section.key=value`` words with YAML values, such as ``null``, ``[1, 2]`` or ``true``; a later word
            replaces an earlier one. A string is one word. Or a mapping: dotted keys, or sections with mappings of
            their own.
        origin: one of :data:`GIVEN`, for the values of words.
    """
    if isinstance(overrides, str):
        overrides = [overrides]
    if not isinstance(overrides, Mapping | Sequence):
        return {}, [f"the overrides are {overrides!r}; expected a list of key=value words or a mapping"]
    if isinstance(overrides, Mapping):
        values = ((key, str(value) if isinstance(value, Path) else value) for key, value in flatten(overrides))
        return {key: Setting(value, IN_OVERRIDES) for key, value in values}, []
    found: dict[str, Setting] = {}
    problems: list[str] = []
    for override in overrides:
        key, separator, text = override.partition("=") if isinstance(override, str) else ("", "", "")
        if not separator or not key:
            problems.append(f"{override!r} {origin} is not key=value")
            continue
        try:
            value = safe_yaml.load(text) if text.strip() else ""
        except yaml.YAMLError:
            value = text
        found |= {name: Setting(part, origin) for name, part in flatten({key: value})}
    return found, problems
