"""Datasets that model.json names, found again where a run and its data were moved together."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mpscl_ray.runs.storage import is_url

RELATIVE = "dataset_from_run"
"""Path of a dataset from the folder of the run, beside its own path in ``dataset``."""


def with_relative_paths(model: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """The content of model.json, with the path of each dataset from the folder of the run beside its own path."""
    changed = dict(model)
    for domain, values in _on_disk(model):
        changed[domain] = {**values, RELATIVE: os.path.relpath(values["dataset"], run.absolute())}
    return changed


def with_moved_datasets(model: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """The content of model.json, with datasets where they are now.

    One that is no longer at its own path is looked for at the same place as seen from the run; where it is not there
    either, its path stays.
    """
    changed = dict(model)
    for domain, values in _on_disk(model):
        if values.get(RELATIVE) and not os.path.exists(values["dataset"]):
            seen_from = (run.absolute(), run.resolve())  # the run may be given by a link
            there = [os.path.normpath(folder / str(values[RELATIVE])) for folder in seen_from]
            changed[domain] = {**values, "dataset": next(filter(os.path.exists, there), values["dataset"])}
    return changed


def _on_disk(model: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The domains whose dataset is on a disk."""
    for domain in ("source", "target"):
        values = model.get(domain)
        if isinstance(values, Mapping) and isinstance(values.get("dataset"), str) and not is_url(values["dataset"]):
            yield domain, values
