"""The cells of a comparison: what was asked for, the run of each, which share their beginning, and how far they are."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mpscl_ray.config import PRESETS, Config, load_config
from mpscl_ray.config.systems import SYSTEMS, shared_phase
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.runs.atomic_files import write_atomically
from mpscl_ray.runs.environment import now

DIRECTIONS = ("forward", "backward")
"""From data.source to data.target, and from data.target to data.source."""

OF_A_CELL = ("run.name", "run.seed", "data.labelled", "method.name")
"""Settings that the comparison makes itself."""

CellState = Literal["waiting", "running", "finished", "failed", "interrupted"]


@dataclass(frozen=True)
class Plan:
    """What the command line asks for.

    Attributes:
        systems: in the order of the table.
        seeds: of the runs.
        directions: forward, backward or both.
        families: direction -> folder of presets.
        overrides: ``key=value`` for all cells.
        out: folder, or URL, of the comparison; None for ``STORAGE/compare``.
        max_concurrent: most cells at a time; None for as many as there is room for.
    """

    systems: tuple[str, ...]
    seeds: tuple[int, ...]
    directions: tuple[str, ...]
    families: Mapping[str, str]
    overrides: tuple[str, ...]
    out: str | None = None
    max_concurrent: int | None = None


@dataclass(frozen=True)
class Cell:
    """One training of the table.

    Attributes:
        name: of its run folder.
        direction: forward or backward.
        seed: of the run.
        system: key of :data:`mpscl_ray.config.systems.SYSTEMS`.
        config: resolved.
        parent: name of the cell that it shares its beginning with; None if it trains all by itself.
        fork_phase: the last phase that it shares.
    """

    name: str
    direction: str
    seed: int
    system: str
    config: Config
    parent: str | None = None
    fork_phase: str | None = None

    @property
    def own_iterations(self) -> int:
        """Iterations that it trains itself."""
        names = [name for name, _ in self.config.schedule]
        first = names.index(self.fork_phase) + 1 if self.fork_phase else 0
        return sum(iterations for _, iterations in self.config.schedule[first:])

    @property
    def iterations(self) -> int:
        """Iterations of all its phases."""
        return sum(iterations for _, iterations in self.config.schedule)

    @property
    def last_phase(self) -> str:
        """The phase whose end is its row of the table."""
        return self.config.schedule[-1][0]


def base_config(family: str, overrides: Sequence[str]) -> Config:
    """The settings that all cells of a family of presets start from."""
    return system_config(family, "mpscl", overrides)


def system_config(family: str, system: str, overrides: Sequence[str]) -> Config:
    """Settings of a system: its preset in a family, and overrides.

    Args:
        family: folder of presets of the package, such as ``small``, or path of a folder with a ``SYSTEM.yaml`` each.
        system: key of SYSTEMS.
        overrides: ``key=value``.

    Raises:
        ConfigError: the family has no preset of that system, or a setting is wrong.
    """
    shipped = PRESETS / family
    folder = shipped if shipped.is_dir() else Path(family)
    if not (folder / f"{system}.yaml").is_file():
        have = sorted(path.stem for path in folder.glob("*.yaml") if path.stem in SYSTEMS)
        families = sorted({path.parent.name for path in PRESETS.glob("*/*.yaml")})
        raise ConfigError(
            f"the presets {family} have no system {system}"
            + (f", only {', '.join(have)}" if have else f"; give one of {', '.join(families)}, or a folder of your own")
        )
    return load_config(f"{family}/{system}" if folder is shipped else folder / f"{system}.yaml", overrides)


def make_cells(
    systems: Sequence[str],
    seeds: Sequence[int],
    directions: Mapping[str, tuple[str, str]],
    families: Mapping[str, str],
    datasets: tuple[str, str],
    overrides: Sequence[str],
    storage: str,
) -> list[Cell]:
    """All cells, in the order of the table; one that shares a beginning names the earlier cell it is forked from.

    Args:
        systems: keys of SYSTEMS.
        seeds: of the runs.
        directions: direction -> names of source and target, for the names of the cells.
        families: direction -> folder of its presets.
        datasets: folders of the two prepared datasets.
        overrides: ``key=value`` for all cells.
        storage: folder, or URL, of the run folders.
    """
    cells: list[Cell] = []
    for direction, (source_name, target_name) in directions.items():
        source, target = datasets if direction == "forward" else datasets[::-1]
        for seed in seeds:
            group: list[Cell] = []
            for system in systems:
                name = f"{source_name}2{target_name}-seed{seed}-{system}"
                own = [f"run.name={name}", f"run.seed={seed}", f"run.storage={storage}"]
                own += [f"data.source={source}", f"data.target={target}"]
                config = system_config(families[direction], system, [*overrides, *own])
                group.append(_with_parent(Cell(name, direction, seed, system, config), group))
            cells += group
    return cells


def _with_parent(cell: Cell, earlier: Sequence[Cell]) -> Cell:
    """The cell, forked from the earlier one with which it shares most."""
    phases = [name for name, _ in cell.config.schedule]
    best, length = None, 0
    for other in earlier:
        phase = shared_phase(other.config, cell.config)
        if phase is not None and phases.index(phase) + 1 > length:
            best, length = other, phases.index(phase) + 1
    if best is None:
        return cell
    return dataclasses.replace(cell, parent=best.name, fork_phase=phases[length - 1])


@dataclass
class Entry:
    """What the ledger knows of a cell.

    Attributes:
        state: waiting, running, finished, failed or interrupted.
        reason: why it failed, in a sentence.
        forked: cell and phase that it really began from; empty where it trained all by itself.
        seconds: wall time of its own training and evaluation, over all starts.
        phase_seconds: phase -> wall time from the beginning of training to the end of the phase, shared phases
            included.
        summary: of its scores, as :meth:`mpscl_ray.evaluate.tables.Summary.to_json` gives it.
        scored_on: what was scored: split, volumes, modality.
    """

    state: CellState = "waiting"
    reason: str = ""
    forked: list[str] = field(default_factory=list)
    seconds: float = 0.0
    phase_seconds: dict[str, float] = field(default_factory=dict)
    summary: dict[str, Any] | None = None
    scored_on: dict[str, Any] = field(default_factory=dict)


class Ledger:
    """The cells of a comparison folder, ``cells.json``; one process writes it, as a whole each time.

    Args:
        file: where they are.
        settle: called after each write, to wait until the file is in its place where that is a bucket.
    """

    def __init__(self, file: Path, settle: Callable[[], None] = lambda: None) -> None:
        self.file, self._settle = file, settle
        self.entries: dict[str, Entry] = self._read()

    def __getitem__(self, name: str) -> Entry:
        return self.entries.setdefault(name, Entry())

    def write(self) -> None:
        """Replace the file. Raises StorageError."""
        content = {name: dataclasses.asdict(entry) for name, entry in self.entries.items()}
        text = json.dumps({"updated": now(), "cells": content}, indent=1, allow_nan=False)
        write_atomically(self.file, text.encode() + b"\n")
        self._settle()

    def _read(self) -> dict[str, Entry]:
        try:
            cells = json.loads(self.file.read_text(encoding="utf-8"))["cells"]
            return {name: Entry(**entry) for name, entry in cells.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{self.file} is damaged ({type(error).__name__}: {error}); remove it: finished runs are then scored "
                "again, not trained again"
            ) from error
