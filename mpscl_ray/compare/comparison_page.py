"""What ``progress.html`` shows of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mpscl_ray.compare.cells import Cell, CellLedger, Entry
from mpscl_ray.config.systems import SYSTEMS
from mpscl_ray.runs.live_page import Content, LivePage, LiveTable
from mpscl_ray.runs.progress import duration
from mpscl_ray.runs.run_directory import RunDirectory


def comparison_page(
    folder: RunDirectory,
    cells: Sequence[Cell],
    ledger: CellLedger,
    iterations: Callable[[], Mapping[str, int]],
    table: Callable[[], str],
) -> LivePage:
    """The page of a comparison, which its caller updates.

    Args:
        folder: of the comparison.
        cells: all of them.
        ledger: their states.
        iterations: returns, by the name of each running cell, the iterations that it has trained itself.
        table: returns the table of what is finished.
    """

    def content() -> Content:
        running = iterations()
        entries = {cell.name: ledger[cell.name] for cell in cells}
        done = sum(_share(cell, entries[cell.name], running.get(cell.name, 0)) for cell in cells)
        total = sum(cell.own_iterations for cell in cells)
        states = [entry.state for entry in entries.values()]
        of_fold = ["fold"] if any(cell.fold is not None for cell in cells) else []
        header = ["run", "system", *of_fold, "seed", "state", "iterations", "mean Dice %", "time"]
        rows = [_row(cell, entries[cell.name], running.get(cell.name, 0)) for cell in cells]
        over = all(state in ("finished", "failed") for state in states)
        return Content(
            title=f"Comparison {folder.name}",
            state=f"{states.count('finished')} of {len(cells)} runs are finished, {states.count('running')} running.",
            done=1.0 if over else min(0.999, done / max(total, 1)),
            notices=[f"{name} failed: {entry.reason}" for name, entry in entries.items() if entry.state == "failed"],
            tables=[LiveTable(header, rows, [f"cells/{cell.name}/progress.html" for cell in cells])],
            preformatted=table(),
        )

    return LivePage(folder.progress_page, content)


def _share(cell: Cell, entry: Entry, iterations: int) -> int:
    return cell.own_iterations if entry.state in ("finished", "failed") else iterations


def _row(cell: Cell, entry: Entry, iterations: int) -> list[str]:
    done = _share(cell, entry, iterations) if entry.state != "failed" else iterations
    spent = entry.seconds + entry.unfinished_seconds
    mean = entry.summary["structures"]["mean"]["dice"]["mean"] if entry.summary else None
    return [
        cell.name,
        SYSTEMS[cell.system],
        *([] if cell.fold is None else [str(cell.fold)]),
        str(cell.seed),
        entry.state,
        f"{done} of {cell.own_iterations}",
        "" if mean is None else f"{100 * mean:.1f}",
        duration(spent) if spent else "",
    ]
