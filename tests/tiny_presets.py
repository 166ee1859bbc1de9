"""A family of tiny presets for comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.tiny import tiny_settings

METHOD: dict[str, dict[str, object]] = {
    "source_only": {},
    "supervised": {},
    "baseline": {"beta": 0, "gamma": 0},
    "mpscl": {},
}
"""Systems of the tests, with what tiny settings would overwrite."""


def write_presets(folder: Path, phase: int = 4, **changes: dict[str, dict[str, object]]) -> Path:
    """A family of tiny presets with equal budgets."""
    folder.mkdir(exist_ok=True)
    for system, method in METHOD.items():
        settings: dict[str, Any] = {"preset": f"small/{system}", "scaling": {"num_workers": 1}}
        for line in tiny_settings(f"small/{system}"):
            key, _, value = line.partition("=")
            section, _, name = key.partition(".")
            settings.setdefault(section, {})[name] = yaml.safe_load(value)
        plain = system in ("source_only", "supervised")
        lengths = (3 * phase, 0, 0) if plain else (phase, phase, phase)
        settings["phases"] |= dict(zip(("source_only", "warm_up", "adaptation"), lengths, strict=True))
        if method:
            settings["method"] |= method
        settings["data"] = {"global_batch_size": settings["data"]["global_batch_size"]}
        for section, values in changes.get(system, {}).items():
            settings[section] = {**settings[section], **values}
        (folder / f"{system}.yaml").write_text(yaml.safe_dump(settings))
    return folder
