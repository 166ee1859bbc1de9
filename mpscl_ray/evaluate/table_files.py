"""Writing tables and scores to files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpscl_ray.evaluate.metrics import StructureScore
from mpscl_ray.runs.atomic_files import storage_errors, write_atomically


def write_tables(folder: Path, files: Mapping[str, str]) -> None:
    """Write texts into a folder, by file name."""
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_atomically(folder / name, text.encode())


def json_text(value: Any) -> str:
    """JSON with a newline at its end; refuses NaN."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def score_json(score: StructureScore) -> dict[str, Any]:
    """A score as plain values; an undefined number is null."""
    return without_nan(asdict(score))


def without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """The values, None for NaN."""
    return {name: None if value != value else value for name, value in values.items()}
