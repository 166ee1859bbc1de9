"""Searches over the tiny settings, and what their ledgers say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from mpscl_ray.config import load_config, to_dict
from mpscl_ray.tune.ledger import Ledger, Trial
from tests.tiny import SETTINGS

ITERATIONS = 12
"""Of a trial's own phase; it validates, and so reports, after every second one."""

SHARED_STEPS = 8
"""Of the phases before it."""


def write_space(data: Path, name: str, distributions: dict[str, Any], **search: Any) -> str:
    """Write the space of a search ``data/runs/NAME`` on the datasets mr and ct in ``data``; returns its path."""
    folders = [f"data.source={data / 'mr'}", f"data.target={data / 'ct'}", f"run.storage={data / 'runs'}"]
    lengths = [f"phases.adaptation={ITERATIONS}", "run.validate_every=2", "scaling.num_workers=1"]
    base = to_dict(load_config("small/mpscl", [*SETTINGS, *folders, *lengths]))
    base["run"]["name"] = name
    file = data / f"{name}.yaml"
    file.write_text(yaml.safe_dump({**base, "preset": "small/mpscl", "search": search, "space": distributions}))
    return str(file)


def trials_of(folder: Path) -> list[Trial]:
    return [trial for _, trial in sorted(Ledger(folder / "ledger.jsonl").trials.items())]


def ends(folder: Path) -> list[int]:
    """Number of each trial that has an end in the ledger, as often as it has."""
    ledger = folder / "ledger.jsonl"
    records = [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()] if ledger.exists() else []
    return sorted(record["number"] for record in records if record["event"] == "end")
