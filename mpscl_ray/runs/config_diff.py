"""Comparison of the config of a resumed run with the one that it was started with."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from mpscl_ray.errors import ConfigError

_ABSENT = object()


def check_config_change(run: str, stored: Any, given: Any, may_change: Collection[str]) -> list[str]:
    """Refuse a config that changes what must stay.

    Args:
        run: Name of the run.
        stored: Nested values of the config that the run was started with.
        given: The same of the config now.
        may_change: Dotted keys that may differ; ``scaling`` covers ``scaling.num_workers`` too.

    Returns:
        A sentence for each key of ``may_change`` that did change.

    Raises:
        ConfigError: Lists every other key that differs, with both values.
    """
    old, new = flatten(stored), flatten(given)
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
        may = f" (only these may change: {', '.join(sorted(may_change))})" if may_change else ""
        raise ConfigError(
            f"the run {run} was started with another config: {'; '.join(refused)}; set "
            f"{'it' if len(refused) == 1 else 'them'} back to resume, or give another run.name to start from scratch"
            f"{may}"
        )
    return changed


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping by dotted keys."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(flatten(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _format(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, default=str)
