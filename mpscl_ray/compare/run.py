"""One comparison, new or resumed, up to its table: what the compare command does."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from mpscl_ray.compare.cells import DIRECTIONS, Cell, CellLedger, Plan, make_cells
from mpscl_ray.compare.folds import check_folds, pairs_of
from mpscl_ray.compare.published import published_for
from mpscl_ray.compare.runner import Comparison, is_done, total_seconds
from mpscl_ray.compare.table import CellResult, Direction, Style, comparison_csv, comparison_rows, format_comparison
from mpscl_ray.config import Config, default_settings, reads_target, to_yaml
from mpscl_ray.config.systems import SYSTEMS
from mpscl_ray.data.dataset import Manifest, load_manifest
from mpscl_ray.distributed.ray_session import connect
from mpscl_ray.errors import ConfigError, Interrupted, TrainingError
from mpscl_ray.evaluate.evaluation import PROTOCOLS
from mpscl_ray.prepare import phantom_dataset
from mpscl_ray.runs import json_output
from mpscl_ray.runs.atomic_files import write_atomically
from mpscl_ray.runs.lifecycle import carry_out
from mpscl_ray.runs.next_steps import command_line
from mpscl_ray.runs.run_directory import RunDirectory, open_run
from mpscl_ray.runs.signals import Interruption
from mpscl_ray.runs.storage import S3Path, join_location, parse_location
from mpscl_ray.runs.trackers import check_installed
from mpscl_ray.runs.wording import counted
from mpscl_ray.train.ray.concurrent import Shared, open_shared
from mpscl_ray.train.ray.launch import Fit
from mpscl_ray.train.ray.placement_groups import release_orphaned_placement_groups
from mpscl_ray.train.ray.resources import check_machine
from mpscl_ray.train.ray.room import Room
from mpscl_ray.train.run import MAY_CHANGE

TABLES: Mapping[str, Style] = {"comparison.txt": "text", "comparison.md": "markdown", "comparison.tex": "latex"}
"""Files of the table, beside comparison.csv."""


def compare(
    plan: Plan, base: Config, command: Sequence[str], fit: Fit | None = None, *, dashboard: bool = False
) -> int:
    """Run all cells of a plan that are not finished, and write the table; returns the exit code.

    Raises:
        ConfigError, DataError, ClusterError, StorageError: no cell can run.
        Interrupted: stopped from outside; the same command resumes.
        TrainingError: some cells failed; the table is written nevertheless.
    """
    pairs_of(base.data.source, base.data.target, folds=plan.folds)  # what is wrong is said before anything is made
    check_machine(base)
    check_installed(base.run.loggers)
    location = plan.out or join_location(base.run.storage, "compare")
    folder = open_run(
        location, "command", 60 * base.run.storage_retry_minutes, ("cells.json", "comparison.*", "progress.html")
    )
    folder.create(("cells",))
    resume = shlex.join(command)
    with folder.lock():
        return carry_out(folder, resume, lambda: _run(plan, base, folder, resume, fit, dashboard))


def _run(plan: Plan, base: Config, folder: RunDirectory, resume: str, fit: Fit | None, dashboard: bool) -> None:
    ledger = CellLedger(folder.path / "cells.json", folder.store.flush)
    out = parse_location(folder.uri)  # valid for workers on other nodes too
    phantom_dataset.check(base)
    with connect(dashboard=dashboard), release_orphaned_placement_groups(folder):
        base = phantom_dataset.resolve(base)
        pairs = pairs_of(base.data.source, base.data.target, folds=plan.folds)
        of_folds = {fold: [load_manifest(parse_location(dataset)) for dataset in pair] for fold, pair in pairs.items()}
        for warning in check_folds(pairs, of_folds):
            print(f"warning: {warning}", flush=True)
        for fold, pair in pairs.items():
            _check_labels(plan.directions, pair, of_folds[fold])
        manifests = next(iter(of_folds.values()))
        names = _direction_names(plan.directions, manifests)
        cells = make_cells(plan, names, pairs, str(out / "cells"))
        for cell in cells:
            run = open_run(out / "cells" / cell.name)
            if run.store.step_checkpoints() and run.exists:
                run.check_config(to_yaml(cell.config), MAY_CHANGE, defaults=default_settings(cell.config.method_name))
        print(_summary(plan, cells, ledger, manifests, out), flush=True)

        def write() -> None:
            found = _directions(plan, cells, ledger, manifests)
            for name, style in TABLES.items():
                write_atomically(folder.path / name, format_comparison(found, style).encode())
            write_atomically(folder.path / "comparison.csv", comparison_csv(found).encode())

        def table() -> str:
            return format_comparison(_directions(plan, cells, ledger, manifests), "text")

        todo = [cell for cell in cells if not is_done(ledger[cell.name])]
        if todo:
            shared = _open(todo, folder, fit)
            largest = max(todo, key=lambda cell: cell.config.scaling.most_workers)
            room = Room(largest.config, shared[largest.name].use_gpu, plan.max_concurrent)
            with Interruption() as interruption:
                Comparison(cells, ledger, folder, room, write, table).run(interruption, resume, shared)
        write()
    print(f"\n{table()}")
    json_output.report(
        folder=out,
        rows=comparison_rows(_directions(plan, cells, ledger, manifests)),
        runs={cell.name: {"folder": out / "cells" / cell.name, "state": ledger[cell.name].state} for cell in cells},
        next=_print_next_steps(out, cells, ledger),
    )
    failed = [cell.name for cell in cells if ledger[cell.name].state == "failed"]
    if todo and interruption.requested:
        done = f"{_finished(cells, ledger)} of {counted(len(cells), 'run')}"
        raise Interrupted(f"stopped by {interruption.signal_name} with {done} finished")
    if failed:
        raise TrainingError(
            f"{len(failed)} of {counted(len(cells), 'run')} failed: {', '.join(failed)}; {out / 'cells.json'} "
            "says why, and the "
            "same command tries them again"
        )


def _direction_names(directions: Sequence[str], manifests: Sequence[Manifest]) -> dict[str, tuple[str, str]]:
    """Direction -> names of its source and target in the names of cells: modalities; a and b if equal."""
    source, target = (manifest.modality for manifest in manifests)
    if source == target:
        source, target = "a", "b"
    both = {"forward": (source, target), "backward": (target, source)}
    return {direction: both[direction] for direction in directions}


def _check_labels(directions: Sequence[str], datasets: Sequence[str], manifests: Sequence[Manifest]) -> None:
    """Check before the training that each direction has labelled volumes to be scored on."""
    for direction in directions:
        source, target = (0, 1) if direction == "forward" else (1, 0)
        if not any(case.labelled for split in ("test", "val") for case in manifests[target].split(split)):
            raise ConfigError(
                f"{datasets[source]} to {datasets[target]} ({direction}) cannot be scored: the target has no labelled "
                f"test or validation volume; prepare some, or give --directions {DIRECTIONS[target]}"
            )


def _open(cells: Sequence[Cell], folder: RunDirectory, fit: Fit | None) -> dict[str, Shared]:
    """Open the data that each cell needs, once for all cells that read the same."""
    opened: dict[tuple[str, int | None, str], Shared] = {}
    folds = len({cell.fold for cell in cells})
    # Data opened for a cell that reads the target serves the cells that do not.
    for cell in sorted(cells, key=lambda cell: not any(reads_target(name) for name, _ in cell.config.schedule)):
        key = (cell.direction, cell.fold, cell.config.data.labelled_domain)
        if key not in opened:
            opened[key], warnings = open_shared(cell.config, folder, fit, pairs=folds)
            said = "warning" if cell.fold is None else f"warning: fold {cell.fold}"
            for warning in warnings:
                print(f"{said}: {warning}", flush=True)
    return {cell.name: opened[cell.direction, cell.fold, cell.config.data.labelled_domain] for cell in cells}


def _summary(
    plan: Plan, cells: Sequence[Cell], ledger: CellLedger, manifests: Sequence[Manifest], out: Path | S3Path
) -> str:
    budgets = sorted({cell.iterations for cell in cells})
    spread = f"{budgets[0]}" if len(budgets) == 1 else f"{budgets[0]} to {budgets[-1]}"
    own = sum(cell.own_iterations for cell in cells)
    titles = ", ".join(SYSTEMS[system] for system in plan.systems)
    names = [f"{source} to {target}" for source, target in _direction_names(plan.directions, manifests).values()]
    folds = len({cell.fold for cell in cells})
    over = f"{counted(folds, 'fold')}, " if plan.folds else ""
    return (
        f"comparison in {out}: {titles}\n"
        f"  {' and '.join(names)}, {over}seeds {', '.join(map(str, plan.seeds))}: {counted(len(cells), 'run')}, "
        f"{_finished(cells, ledger)} of them finished\n"
        f"  {spread} iterations each; phases that runs share are trained once, {own} iterations in all"
    )


def _finished(cells: Sequence[Cell], ledger: CellLedger) -> int:
    return sum(is_done(ledger[cell.name]) for cell in cells)


def _directions(
    plan: Plan, cells: Sequence[Cell], ledger: CellLedger, manifests: Sequence[Manifest]
) -> list[Direction]:
    """The current content of the table."""
    structures = manifests[0].classes[1:]
    found = []
    for direction in plan.directions:
        own = [cell for cell in cells if cell.direction == direction]
        done = [cell for cell in own if is_done(ledger[cell.name])]
        source, target = (m.modality for m in (manifests if direction == "forward" else manifests[::-1]))
        summaries = [ledger[cell.name].summary or {} for cell in done]
        in_mm = all(summary["structures"]["mean"]["asd_mm_worst_case"]["n"] for summary in summaries)
        unit = "mm" if in_mm else "voxel"
        results: dict[str, list[CellResult]] = {}
        for cell, summary in zip(done, summaries, strict=True):
            result = CellResult.from_summary(
                cell.seed, summary, cell.iterations, total_seconds(cell.name, ledger), unit, cell.fold
            )
            results.setdefault(cell.system, []).append(result)
        folds = tuple(dict.fromkeys(cell.fold for cell in own if cell.fold is not None))
        found.append(
            Direction(
                title=f"{source.upper()} to {target.upper()}",
                data=f"Presets {plan.preset_groups[direction]}, scored on {_scored_on(done, ledger)}.",
                structures=structures,
                rows={system: SYSTEMS[system] for system in plan.systems},
                results=results,
                runs=len(plan.seeds) * max(1, len(folds)),
                unit=unit,
                published=published_for(source, target, frozenset(structures)),
                folds=folds,
            )
        )
    return found


def _scored_on(done: Sequence[Cell], ledger: CellLedger) -> str:
    """The volumes that finished cells of a direction were scored on; those of folds are different ones."""
    scored = [ledger[cell.name].scored_on for cell in {cell.fold: cell for cell in reversed(done)}.values()]
    if not scored:
        return "nothing yet"
    # Cells of an earlier version name no protocol: they were scored on prepared slices.
    protocols = {ledger[cell.name].scored_on.get("protocol", "prepared") for cell in done}
    kind = "test" if all(one.get("split") == "test" for one in scored) else "validation"
    where = scored[0]["dataset"]
    if done[0].fold is not None:
        where = f"{counted(len(scored), 'fold')} of {parse_location(where).parent}"
    return (
        f"{counted(sum(one['volumes'] for one in scored), f'labelled {kind} volume')} of "
        f"{scored[0]['modality'].upper()} in {where}: {' or '.join(PROTOCOLS[name] for name in protocols)}"
    )


def _print_next_steps(out: Path | S3Path, cells: Sequence[Cell], ledger: CellLedger) -> list[str]:
    """Print what to do next; returns the commands."""
    key = (cells[0].direction, cells[0].fold, cells[0].seed)
    first = [cell for cell in cells if (cell.direction, cell.fold, cell.seed) == key]
    runs = [out / "cells" / cell.name for cell in first if is_done(ledger[cell.name])]
    print(f"{out} has the table as comparison.txt, .md, .csv and .tex, and each run in cells/. Next:")
    page = out / "report" if isinstance(out, Path) else "report"
    commands = [command_line("report", *runs, "--out", page)] if runs else []
    for line in commands:
        print(f"  {line}")
    print("  the same command with more systems or --seeds; it trains only what is missing", flush=True)
    return commands
