"""The cells of a comparison: one training for each system, seed and direction, what it shares, and its state."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mpscl_ray.config import PRESETS, Config, load_command_line
from mpscl_ray.config.systems import SYSTEMS, shared_phase
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.runs import safe_json
from mpscl_ray.runs.atomic_files import write_atomically
from mpscl_ray.runs.cli import did_you_mean
from mpscl_ray.runs.environment import now

DIRECTIONS = ("forward", "backward")
"""From data.source to data.target, and from data.target to data.source."""

SET_BY_COMPARISON = ("run.name", "run.seed", "data.labelled_domain", "method.name")
"""Settings that the comparison sets for each cell."""

CellState = Literal["waiting", "running", "finished", "failed", "interrupted"]


@dataclass(frozen=True)
class Plan:
    """What the command line asks for."""

    systems: tuple[str, ...]
    """In the order of the table."""
    seeds: tuple[int, ...]
    directions: tuple[str, ...]
    """forward, backward or both."""
    preset_groups: Mapping[str, str]
    """Direction -> group of presets, see :func:`system_config`."""
    overrides: tuple[str, ...]
    """``key=value`` for all cells."""
    out: str | None = None
    """Folder, or URL, of the comparison; None for ``STORAGE/compare``."""
    max_concurrent: int | None = None
    """Cells that run concurrently at most; None for as many as there is room for."""
    folds: bool = False
    """Whether both datasets are folders of folds, all of which are compared over."""


@dataclass(frozen=True)
class Cell:
    """One training of the table."""

    name: str
    """Also that of its run folder."""
    direction: str
    seed: int
    system: str
    """Key of :data:`mpscl_ray.config.systems.SYSTEMS`."""
    config: Config
    fold: int | None = None
    """Of both datasets; None where they have no folds."""
    parent: str | None = None
    """Name of the cell that it shares its first phases with; None if it trains all phases itself."""
    fork_phase: str | None = None
    """The last phase that it shares."""

    @property
    def own_iterations(self) -> int:
        """Iterations that it trains itself."""
        names = [name for name, _ in self.config.schedule]
        first = names.index(self.fork_phase) + 1 if self.fork_phase else 0
        return sum(iterations for _, iterations in self.config.schedule[first:])

    @property
    def iterations(self) -> int:
        """Iterations of all its phases."""
        return self.config.total_iterations


def check_presets(plan: Plan) -> Config:
    """Read the preset of every system and direction of a plan; returns settings that name the data and the storage.

    Raises:
        ConfigError: a preset is missing, or a setting is wrong in one of them.
    """
    for direction in plan.directions:
        for system in plan.systems:
            system_config(plan.preset_groups[direction], system, plan.overrides)
    return system_config(plan.preset_groups["forward"], plan.systems[0], plan.overrides)


def system_config(group: str, system: str, overrides: Sequence[str]) -> Config:
    """Settings of a system: its preset in a group, and overrides.

    Args:
        group: folder of presets of the package, such as ``small``, or path of a folder with a ``SYSTEM.yaml`` each.
        system: key of SYSTEMS.
        overrides: ``key=value``.

    Raises:
        ConfigError: the group has no preset of that system, or a setting is wrong.
    """
    shipped = PRESETS / group
    folder = shipped if shipped.is_dir() else Path(group)
    if not (folder / f"{system}.yaml").is_file():
        have = sorted(path.stem for path in folder.glob("*.yaml") if path.stem in SYSTEMS)
        groups = sorted({path.parent.name for path in PRESETS.glob("*/*.yaml")})
        if not folder.is_dir():
            hint = did_you_mean(group, groups) or f"give one of {', '.join(groups)}, or a folder of your own"
            raise ConfigError(f"there is no group of presets '{group}'; {hint}")
        raise ConfigError(
            f"the presets {group} have no system {system}"
            + (f", only {', '.join(have)}" if have else f"; give one of {', '.join(groups)}, or a folder of your own")
        )
    preset = f"{group}/{system}" if folder is shipped else str(folder / f"{system}.yaml")
    try:
        return load_command_line(preset, overrides)
    except ConfigError as error:
        raise ConfigError(f"{preset}: {error}") from error


def make_cells(
    plan: Plan,
    directions: Mapping[str, tuple[str, str]],
    datasets: Mapping[int | None, tuple[str, str]],
    storage: str,
) -> list[Cell]:
    """All cells, in the order of the table; a cell that shares phases names the earlier cell that it is forked from.

    Args:
        plan: systems, seeds, presets and overrides.
        directions: direction -> names of source and target, for the names of the cells.
        datasets: fold -> folders of the two prepared datasets; a single entry, None, without folds.
        storage: folder, or URL, of the run folders.
    """
    cells: list[Cell] = []
    for direction, (source_name, target_name) in directions.items():
        for (fold, pair), seed in itertools.product(datasets.items(), plan.seeds):
            source, target = pair if direction == "forward" else pair[::-1]
            same_data: list[Cell] = []
            for system in plan.systems:
                of_fold = "" if fold is None else f"fold{fold}-"
                name = f"{source_name}2{target_name}-{of_fold}seed{seed}-{system}"
                own = [f"run.name={name}", f"run.seed={seed}", f"run.storage={storage}"]
                own += [f"data.source={source}", f"data.target={target}"]
                config = system_config(plan.preset_groups[direction], system, [*plan.overrides, *own])
                same_data.append(_with_parent(Cell(name, direction, seed, system, config, fold), same_data))
            cells += same_data
    return cells


def _with_parent(cell: Cell, earlier: Sequence[Cell]) -> Cell:
    """The cell, forked from the earlier one with which it shares most phases."""
    phases = [None, *(name for name, _ in cell.config.schedule)]
    shared = [shared_phase(other.config, cell.config) for other in earlier]
    last = max(shared, key=phases.index, default=None)
    if last is None:
        return cell
    return dataclasses.replace(cell, parent=earlier[shared.index(last)].name, fork_phase=last)


@dataclass
class Entry:
    """What the ledger knows of a cell."""

    state: CellState = "waiting"
    reason: str = ""
    """Why it failed, in a sentence."""
    forked: list[str] = field(default_factory=list)
    """Cell and phase that it was forked from; empty where it trained all phases itself."""
    seconds: float = 0.0
    """Wall time of its own training and evaluation, over all starts that have ended."""
    unfinished_seconds: float = 0.0
    """Wall time of its last start, which runs or was lost."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    """Phase -> wall time of the cell's own training up to the end of the phase."""
    summary: dict[str, Any] | None = None
    """Of its scores, as :meth:`mpscl_ray.evaluate.tables.Summary.to_json` returns it."""
    scored_on: dict[str, Any] = field(default_factory=dict)
    """What was scored: split, volumes, modality, dataset."""


class CellLedger:
    """The state of the cells of a comparison, in ``cells.json``.

    Raises:
        DataError: the file is damaged.
    """

    def __init__(self, file: Path, flush: Callable[[], object] = lambda: None) -> None:
        self.file, self._flush = file, flush
        try:
            cells = safe_json.read(file)["cells"] if file.exists() else {}
            self.entries = {name: Entry(**entry) for name, entry in cells.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{file} is damaged ({type(error).__name__}: {error}); remove it: finished runs are then scored again, "
                "not trained again"
            ) from error

    def __getitem__(self, name: str) -> Entry:
        return self.entries.setdefault(name, Entry())

    def write(self) -> None:
        """Replace the file; in a bucket it is uploaded when this returns. Raises StorageError."""
        cells = {name: dataclasses.asdict(entry) for name, entry in self.entries.items()}
        text = json.dumps({"updated": now(), "cells": cells}, indent=1, allow_nan=False)
        write_atomically(self.file, text.encode() + b"\n")
        self._flush()
