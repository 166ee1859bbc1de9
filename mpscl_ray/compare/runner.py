"""Runs the cells of a comparison as trials of Ray Tune."""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ray import tune

from mpscl_ray.compare.cells import Cell, CellLedger, Entry
from mpscl_ray.compare.comparison_page import comparison_page
from mpscl_ray.compare.trainable import OUTCOME, cell_location, train_cell
from mpscl_ray.errors import MpsclError, StorageError
from mpscl_ray.runs.control_files import STOP_FILE
from mpscl_ray.runs.live_page import LivePage
from mpscl_ray.runs.position import StatusUpdates
from mpscl_ray.runs.progress import ProgressLine
from mpscl_ray.runs.run_directory import RunDirectory, open_run
from mpscl_ray.runs.signals import Interruption
from mpscl_ray.runs.trackers import Tracking
from mpscl_ray.train.ray import trials
from mpscl_ray.train.ray.concurrent import Shared
from mpscl_ray.train.ray.prometheus import CommandGauges, Reading
from mpscl_ray.train.ray.room import Room
from mpscl_ray.train.tracking import final_scores, tracking_of

_PROGRESS_S = 2.0


class Comparison(trials.Trials):
    """Says which cells Ray Tune runs, and records in the ledger how they end.

    Args:
        cells: all of the comparison, in order.
        ledger: their states.
        folder: of the comparison; run folders are in ``cells/``.
        room: how many cells run at once.
        finished: called after each cell that ended.
        table: returns the table of the finished cells, for the page.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        ledger: CellLedger,
        folder: RunDirectory,
        room: Room,
        finished: Callable[[], None],
        table: Callable[[], str],
    ) -> None:
        self._running: set[str] = set()
        super().__init__(folder, self._running)
        self.cells, self.ledger, self.room, self.finished = {cell.name: cell for cell in cells}, ledger, room, finished
        self._waiting = [cell for cell in cells if not is_done(ledger[cell.name])]
        self._active: set[str] = set()
        """Cells that Ray Tune has, with a process or waiting for one."""
        self._folders: dict[str, RunDirectory] = {}
        self._total = sum(cell.own_iterations for cell in self._waiting)
        self._done = 0
        self._line = ProgressLine(self._total, "all runs, iteration")
        self._messages: deque[str] = deque()
        for cell in self._waiting:
            self._end_start(cell)
        self._status = StatusUpdates(folder, self._counts)
        self._tracking: dict[str, Tracking] = {}
        self._gauges = CommandGauges(folder.name, self._readings)
        self._since: tuple[float, int] | None = None
        self._next_line = 0.0
        self._page: LivePage | None = None
        if cells[0].config.run.progress_page:
            self._page = comparison_page(folder, cells, ledger, self._iterations_of_running, table)

    def run(self, interruption: Interruption, resume_command: str, shared: Mapping[str, Shared]) -> None:
        """Run until every cell has ended, or after an interruption until the running ones have stopped.

        Args:
            interruption: asks the cells to write a checkpoint and end.
            resume_command: command that resumes the comparison.
            shared: by the name of the cell.

        Raises:
            ClusterError, StorageError: a cell could not continue.
        """
        self.folder.control_files.clear(STOP_FILE)
        trainable = tune.with_parameters(
            train_cell,
            cells=self.cells,
            comparison_uri=self.folder.uri,
            resume_command=resume_command,
            shared=dict(shared),
        )
        places = {cell.name: trials.trial_resources(cell.config, shared[cell.name].use_gpu) for cell in self._waiting}
        failures = max(cell.config.run.max_failures for cell in self._waiting)
        with self._line:
            try:
                trials.run_trials(
                    self, trainable, lambda trial: places[trial["name"]], failures, self.room, interruption, self._show
                )
            finally:
                for name in self._active:
                    self.ledger[name].state = "interrupted"
                self.ledger.write()
                while self._tracking:
                    self._tracking.popitem()[1].close("interrupted")
                self._show(at_once=True)
                self._gauges.close()

    # ------------------------------------------------------------------------------------------ for Ray Tune's thread

    def next(self) -> trials.Settings | str | None:
        if not self._waiting:
            return None if self._active else trials.NO_MORE
        if self._active and not self.room.has_place(len(self._active)):
            return None
        try:
            for cell in self._waiting:
                fork_point = self._fork_point(cell)
                if fork_point is not None:
                    return self._give(cell, fork_point)
        except StorageError:
            pass  # Nothing new starts. The folder itself reports a storage that fails for long.
        return None

    def _give(self, cell: Cell, fork_point: tuple[str, ...]) -> trials.Settings:
        """A cell's settings for Ray Tune."""
        self._waiting.remove(cell)
        self._active.add(cell.name)
        entry = self.ledger[cell.name]
        entry.state, entry.reason = "running", ""
        if fork_point and not entry.forked:
            entry.forked = list(fork_point)
        self.ledger.write()
        origin = f", from the end of {fork_point[1]} of {fork_point[0]}" if fork_point else ""
        self._messages.append(f"{cell.name} starts{origin}")
        run = self.run_folder(cell.name)
        self._tracking[cell.name] = tracking_of(cell.config, run, self.folder, self._messages.append, cell.name)
        shown = {"direction": cell.direction, "system": cell.system, "seed": cell.seed}
        shown |= {} if cell.fold is None else {"fold": cell.fold}
        return {"name": cell.name, **shown, "fork": " ".join(fork_point).encode()}

    def started(self, trial: trials.Settings) -> None:
        self._running.add(trial["name"])

    def reported(self, trial: trials.Settings, result: dict[str, Any]) -> None:
        cell = self.cells[trial["name"]]
        if OUTCOME in result:
            self._end(cell, json.loads(result[OUTCOME]))
        else:
            self.ledger[cell.name].unfinished_seconds = result["seconds"]
            self.ledger.write()

    def lost(self, trial: trials.Settings, error: str) -> None:
        self._running.discard(trial["name"])
        self._end_start(self.cells[trial["name"]])
        self._messages.append(f"{trial['name']} lost its process and resumes from its last checkpoint: {error}")

    def ended(self, trial: trials.Settings, error: str) -> None:
        name = trial["name"]
        self._running.discard(name)
        if name in self._active:  # it has not reported
            reason = f"its process failed or was lost each time it was tried: {error}"
            self._end(self.cells[name], {"state": "failed", "reason": reason} if error else {"state": "interrupted"})

    def _fork_point(self, cell: Cell) -> tuple[str, ...] | None:
        """Cell and phase to fork from; empty to train from scratch or resume; None until its parent is there."""
        if cell.parent is None or cell.fork_phase is None or self.run_folder(cell.name).store.step_checkpoints():
            return ()
        if cell.fork_phase in self.run_folder(cell.parent).store.finished_phases():
            return cell.parent, cell.fork_phase
        # If the parent fails before that phase, its children train all phases themselves.
        coming = cell.parent in self._active or any(cell.parent == other.name for other in self._waiting)
        return None if coming else ()

    def _end(self, cell: Cell, found: dict[str, Any]) -> None:
        entry = self.ledger[cell.name]
        entry.state, entry.reason = found["state"], found.get("reason", "")
        before = entry.seconds
        entry.unfinished_seconds = found.get("seconds", entry.unfinished_seconds)
        self._end_start(cell)
        for phase, seconds in found.get("phase_seconds", {}).items():
            entry.phase_seconds.setdefault(phase, before + seconds)
        entry.summary = found.get("summary")
        entry.scored_on = found.get("scored_on", {})
        self.ledger.write()
        scores = final_scores(cell.config.schedule[-1][0], entry.summary) if entry.summary else {}
        self._tracking.pop(cell.name).close(entry.state, scores)
        self._active.remove(cell.name)
        if entry.state != "interrupted":
            self._done += cell.own_iterations
        self._messages.append(f"{cell.name} {_description(entry)}")
        self.finished()

    def _end_start(self, cell: Cell) -> None:
        """Count the wall time of a start of a cell that does not run any more."""
        entry = self.ledger[cell.name]
        entry.seconds += entry.unfinished_seconds
        entry.unfinished_seconds = 0.0

    # ---------------------------------------------------------------------------------------------------- for display

    def _show(self, at_once: bool = False) -> None:
        while self._messages:
            self._line.message(self._messages.popleft())
        self._status.update(at_once)
        self._gauges.update()
        if self._page is not None:
            self._page.update(at_once)
        for tracking in list(self._tracking.values()):  # another thread adds some
            tracking.update()
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _PROGRESS_S
            self._line.update(self._trained())

    def _iterations_of_running(self) -> dict[str, int]:
        """Iterations that each running cell has trained itself."""
        return {name: self._iterations(self.cells[name]) for name in tuple(self._active)}

    def _counts(self) -> dict[str, Any]:
        """How many runs there are and how many of them are over or run, for the status."""
        states = Counter(self.ledger[name].state for name in self.cells)
        return {
            "runs": {"total": len(self.cells)} | {state: states[state] for state in ("finished", "failed", "running")}
        }

    def _readings(self) -> Iterator[Reading]:
        """Cells by state, and the seconds that all of them still take at the speed so far, for Prometheus."""
        counts = self._counts()["runs"]
        total = counts.pop("total")
        for state, number in (counts | {"waiting": total - sum(counts.values())}).items():
            yield "mpscl_cells", {"state": state}, number
        now, trained = time.monotonic(), self._trained()
        since, before = self._since = self._since or (now, trained)
        if trained > before:
            yield "mpscl_eta_seconds", {}, (now - since) * (self._total - trained) / (trained - before)

    def _trained(self) -> int:
        """Iterations of the cells that this start has to train, those from before it included."""
        return self._done + sum(self._iterations_of_running().values())

    def _iterations(self, cell: Cell) -> int:
        """Iterations that a running cell has trained itself."""
        with suppress(MpsclError):
            records = self.run_folder(cell.name).read_metrics()
            if records:
                return max(0, int(records[-1]["global_step"]) - (cell.iterations - cell.own_iterations))
        return 0

    def run_folder(self, name: str) -> RunDirectory:
        """Folder of a cell's run."""
        if name not in self._folders:
            self._folders[name] = open_run(cell_location(self.folder, name))
        return self._folders[name]


def is_done(entry: Entry) -> bool:
    """Whether a cell is trained and scored."""
    return entry.state == "finished" and entry.summary is not None


def total_seconds(name: str, ledger: CellLedger) -> float:
    """Wall time of a cell as if it had trained the phases that it shares."""
    entry = ledger[name]
    return entry.seconds + _seconds_until(entry.forked, ledger)


def _seconds_until(end: Sequence[str], ledger: CellLedger) -> float:
    """Wall time up to the end of a phase of a cell, (cell, phase), whichever cell trained it; 0 for ()."""
    if not end:
        return 0.0
    name, phase = end
    entry = ledger[name]
    own = entry.phase_seconds.get(phase)
    if own is None:  # the cell was forked after that phase
        return _seconds_until([entry.forked[0], phase] if entry.forked else [], ledger)
    return own + _seconds_until(entry.forked, ledger)


def _description(entry: Entry) -> str:
    if entry.state == "finished" and entry.summary is not None:
        dice = entry.summary["structures"]["mean"]["dice"]["mean"]
        return "is finished" if dice is None else f"is finished: mean Dice {100 * dice:.1f} %"
    return f"failed: {entry.reason}" if entry.state == "failed" else "stopped after a checkpoint"
