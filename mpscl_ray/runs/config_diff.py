"""Configs by dotted keys, and the comparison of a resumed run's config with the one that it was started with."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from mpscl_ray.errors import ConfigError

_ABSENT = object()
_OLDER = {"optim.kind": ("optim.weight_decay", 5e-4, None)}
"""Of a run that is older than a setting: another key, a value of it, and how the same is written since."""


def check_config_change(
    run: str,
    stored: Mapping[str, Any],
    given: Mapping[str, Any],
    may_change: Collection[str],
    option: str = "",
    defaults: Mapping[str, Any] | None = None,
) -> list[str]:
    """Refuse a config that changes what must stay.

    Args:
        run: Name of the run.
        stored: Nested values of the config that the run was started with.
        given: The same of the config now.
        may_change: Dotted keys that may differ; ``scaling`` covers ``scaling.num_workers`` too.
        option: Option of the command that permits every change, where it has one.
        defaults: Nested values that settings have in a run which is older than they are.

    Returns:
        A sentence for each key of ``may_change`` that did change.

    Raises:
        ConfigError: Lists every other key that differs, with both values.
    """
    old, new = dict(flatten(stored)), dict(flatten(given))
    for setting, (key, before, since) in _OLDER.items():
        if setting in new and setting not in old and old.get(key) == before and new.get(key, before) == since:
            old[key] = since
    old = {key: value for key, value in flatten(defaults or {}) if key in new} | old
    changed: list[str] = []
    refused: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, _ABSENT), new.get(key, _ABSENT)
        if before == after:
            continue
        allowed = any(key == other or key.startswith(f"{other}.") for other in may_change)
        sentence = f"{key}: {_format(before)} in the run, {_format(after)} now"
        (changed if allowed else refused).append(sentence)
    if refused:
        raise ConfigError(
            f"the run {run} was started with another config: {'; '.join(refused)}; set "
            f"{'it' if len(refused) == 1 else 'them'} back"
            + (f", give another run.name, or {option}" if option else ", or give another run.name")
        )
    return changed


def flatten(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested settings; an empty mapping is a value."""
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _format(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, default=str)
