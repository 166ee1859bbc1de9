"""Runs the cells of a comparison concurrently, each in a Ray task, which trains itself where a cell has one worker."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from mpscl_ray.compare.cells import Cell, CellLedger, Entry
from mpscl_ray.compare.comparison_page import comparison_page
from mpscl_ray.config import Config
from mpscl_ray.errors import InsufficientResources, MpsclError, StorageError
from mpscl_ray.evaluate.run import evaluate_phases
from mpscl_ray.runs.control_files import STOP_FILE
from mpscl_ray.runs.fork import fork
from mpscl_ray.runs.live_page import LivePage
from mpscl_ray.runs.position import StatusUpdates
from mpscl_ray.runs.progress import ProgressLine
from mpscl_ray.runs.run_directory import RunDirectory, open_run
from mpscl_ray.runs.signals import Interruption
from mpscl_ray.runs.storage import S3Path, join_location
from mpscl_ray.runs.trackers import Tracking
from mpscl_ray.train.ray.concurrent import Shared, run_trial
from mpscl_ray.train.ray.launch import Launch
from mpscl_ray.train.ray.one_process import own_resources, trains_in_one_process
from mpscl_ray.train.ray.prometheus import CommandGauges, Reading
from mpscl_ray.train.ray.resources import evaluation_place
from mpscl_ray.train.ray.room import Room
from mpscl_ray.train.tracking import final_scores, tracking_of

_POLL_S = 0.5
_PROGRESS_S = 2.0


def run_cell(
    cell: Cell, fork_point: tuple[str, ...], comparison_uri: str, resume_command: str, shared: Shared
) -> dict[str, Any]:
    """Train a cell and score the end of its last phase.

    Args:
        cell: what to train.
        fork_point: cell and phase to fork from; () for none.
        comparison_uri: address of the comparison's folder, where STOP_FILE asks the cell to stop.
        resume_command: for the cell's status.json.
        shared: of :func:`~mpscl_ray.train.ray.concurrent.open_shared`.

    Returns:
        Fields of :class:`Entry`; an MpsclError is in ``reason`` and not raised, because Ray would wrap it.
    """
    started = time.monotonic()
    config, comparison = cell.config, open_run(comparison_uri)
    patience_s = 60 * config.run.storage_retry_minutes
    folder = open_run(cell_location(comparison, cell.name), "command", patience_s)
    phases = [name for name, _ in config.schedule]
    found: dict[str, Any] = {"phase_seconds": {}}
    next_poll = 0.0

    def note_phases() -> None:
        for phase in folder.store.finished_phases():
            if phase in phases and phase not in before:
                found["phase_seconds"].setdefault(phase, time.monotonic() - started)

    def poll(training: Launch) -> None:
        nonlocal next_poll
        if time.monotonic() < next_poll:
            return
        next_poll = time.monotonic() + folder.store.poll_interval_s
        # The training itself reports a storage that does not answer.
        with suppress(StorageError):
            note_phases()
            if comparison.control_files.read(STOP_FILE) is not None:
                training.request_stop()

    try:
        if fork_point:
            parent, phase = fork_point
            fork(folder, open_run(cell_location(comparison, parent), patience_s=patience_s), phase)
        before = set(folder.store.finished_phases())
        outcome = run_trial(config, folder, shared, poll, resume_command=resume_command, reserved=True)
        note_phases()
        if outcome.state == "finished":
            found |= {"state": "finished", **_scores(folder, config, shared.use_gpu)}
        else:
            found["state"] = "interrupted"
    except MpsclError as error:
        found |= {"state": "failed", "reason": str(error)}
    return {**found, "seconds": time.monotonic() - started}


def _scores(folder: RunDirectory, config: Config, use_gpu: bool) -> dict[str, Any]:
    """Scores at the end of the last phase, and the volumes that they are of.

    A process that has trained itself has the place of a worker, and scores them there.
    """
    phase = config.schedule[-1][0]
    where: dict[str, Any] = {"workers": 0, "device": "cuda" if use_gpu else "cpu"}
    if not trains_in_one_process(config):
        where = {"place": evaluation_place(config, use_gpu)}
    evaluation = evaluate_phases(folder.uri, [phase], progress=False, **where)[phase]
    scored_on = {
        "split": evaluation.split,
        "volumes": len(evaluation.scores),
        "modality": evaluation.modality,
        "dataset": str(evaluation.dataset),
        "protocol": evaluation.protocol,
    }
    return {"summary": evaluation.summary.to_json(), "scored_on": scored_on}


@dataclass
class Comparison:
    """Runs cells, and records in the ledger how they end."""

    cells: Sequence[Cell]
    """All of the comparison, in order."""
    ledger: CellLedger
    folder: RunDirectory
    """Folder of the comparison; run folders are in ``cells/``, and ``stop-requested`` in it ends the running cells."""
    shared: Mapping[str, Shared]
    """By the name of the cell."""
    room: Room
    """How many cells run at once."""
    resume_command: str
    """Command that resumes the comparison."""
    finished: Callable[[], None]
    """Called after each cell that ended."""
    table: Callable[[], str]
    """Returns the table of the finished cells, for the page."""

    def __post_init__(self) -> None:
        self.waiting = [cell for cell in self.cells if not is_done(self.ledger[cell.name])]
        self.running: dict[Any, Cell] = {}
        self._folders: dict[str, RunDirectory] = {}
        self._before: dict[str, dict[str, Any]] = {}
        """Status of each cell's run when its task was given to Ray, which may have to wait for a place."""
        self.process_failures: Counter[str] = Counter()
        """How often the process of a cell was lost, for example with its node, or failed."""
        self._task = ray.remote(max_retries=0)(run_cell)
        self._total = sum(cell.own_iterations for cell in self.waiting)
        self._line = ProgressLine(self._total, "all runs, iteration")
        self._status = StatusUpdates(self.folder, self._counts)
        self._tracking: dict[str, Tracking] = {}
        self._gauges = CommandGauges(self.folder.name, self._readings)
        self._since: tuple[float, int] | None = None
        self._done = 0
        self._page: LivePage | None = None
        if self.cells[0].config.run.progress_page:
            self._page = comparison_page(self.folder, self.cells, self.ledger, self._running, self.table)

    def run(self, interruption: Interruption) -> None:
        """Run until every cell has ended, or after an interruption until the running ones have stopped."""
        self.folder.control_files.clear(STOP_FILE)
        last_progress = next_poll = 0.0
        with self._line:
            try:
                while self.running or (self.waiting and not interruption.requested):
                    if self.folder.store.sync_error is not None:
                        raise self.folder.store.sync_error
                    if time.monotonic() >= next_poll:
                        next_poll = time.monotonic() + self.folder.store.poll_interval_s
                        self._poll(interruption)
                    if not self.running:
                        time.sleep(_POLL_S)
                        continue
                    ready = ray.wait(list(self.running), timeout=_POLL_S)[0]
                    for reference in ready:
                        self._end(self.running.pop(reference), reference)
                    self._show()
                    for cell in self.running.values():
                        self._tracking[cell.name].update()
                    if time.monotonic() - last_progress >= _PROGRESS_S:
                        last_progress = time.monotonic()
                        self._line.update(self._trained())
            finally:
                self.room.close()
                with suppress(StorageError):
                    self.folder.control_files.clear(STOP_FILE)
                for reference, cell in self.running.items():
                    ray.cancel(reference, force=True)
                    self.ledger[cell.name].state = "interrupted"
                self.ledger.write()
                for tracking in self._tracking.values():
                    tracking.close("interrupted")
                self._gauges.close()
                self._show(at_once=True)

    def _show(self, at_once: bool = False) -> None:
        self._status.update(at_once)
        if not at_once:
            self._gauges.update()
        if self._page is not None:
            self._page.update(at_once)

    def _running(self) -> dict[str, int]:
        """Iterations that each running cell has trained itself."""
        return {cell.name: self._iterations(cell) for cell in self.running.values()}

    def _poll(self, interruption: Interruption) -> None:
        """Ask the cells to stop where the comparison is interrupted, else start those that there is room for."""
        try:
            if self.folder.control_files.read(STOP_FILE) is not None:
                interruption.request(f"the file {STOP_FILE} in its folder")
            elif interruption.requested:
                self.folder.control_files.write(STOP_FILE, "")
            for reference, cell in self.running.items() if interruption.requested else ():
                if not self._has_started(cell):
                    ray.cancel(reference)
            if self.running and not any(map(self._has_started, self.running.values())):
                shortage = self.room.shortage()
                if shortage is not None:
                    raise InsufficientResources(shortage)
            fork_points = {}
            if not interruption.requested and self.waiting:
                fork_points = {cell.name: self._fork_point(cell) for cell in self.waiting}
        except StorageError:
            return  # Nothing new starts. The folder itself reports a storage that fails for long.
        self._start_ready(fork_points)

    def _start_ready(self, fork_points: Mapping[str, tuple[str, ...] | None]) -> None:
        """Start the waiting cells that have a fork point, as many as there is room for."""
        for cell in list(self.waiting):
            fork_point = fork_points.get(cell.name)
            if fork_point is None:
                continue
            if self.running and not self.room.has_place(len(self.running)):
                return
            self.waiting.remove(cell)
            entry = self.ledger[cell.name]
            entry.state, entry.reason = "running", ""
            if fork_point and not entry.forked:
                entry.forked = list(fork_point)
            self.ledger.write()
            origin = f", from the end of {fork_point[1]} of {fork_point[0]}" if fork_point else ""
            self._line.message(f"{cell.name} starts{origin}")
            if cell.name not in self._tracking:  # it is there where the cell lost its process
                self._tracking[cell.name] = tracking_of(
                    cell.config, self.run_folder(cell.name), self.folder, self._line.message, cell.name
                )
            self._before[cell.name] = self.run_folder(cell.name).read_status()
            shared = self.shared[cell.name]
            reserved = own_resources(cell.config, shared.use_gpu)
            task = self._task.options(**reserved.task_options())
            self.running[task.remote(cell, fork_point, self.folder.uri, self.resume_command, shared)] = cell

    def _has_started(self, cell: Cell) -> bool:
        """Whether the task of a cell has its place."""
        return self.run_folder(cell.name).read_status() != self._before[cell.name]

    def _fork_point(self, cell: Cell) -> tuple[str, ...] | None:
        """Cell and phase to fork from; empty to train from scratch or resume; None until its parent is there."""
        if cell.parent is None or cell.fork_phase is None or self.run_folder(cell.name).store.step_checkpoints():
            return ()
        if cell.fork_phase in self.run_folder(cell.parent).store.finished_phases():
            return cell.parent, cell.fork_phase
        # If the parent fails before that phase, its children train all phases themselves.
        coming = self.ledger[cell.parent].state in ("waiting", "running") or any(
            cell.parent == other.name for other in self.waiting
        )
        return None if coming else ()

    def _end(self, cell: Cell, reference: Any) -> None:
        entry = self.ledger[cell.name]
        try:
            found: dict[str, Any] = ray.get(reference)
        except ray.exceptions.TaskCancelledError:  # it waited for a place when the comparison was interrupted
            entry.state = "interrupted"
            return
        except ray.exceptions.RayError as error:
            self.process_failures[cell.name] += 1
            if self.process_failures[cell.name] <= cell.config.run.max_failures:
                self._line.message(
                    f"{cell.name} lost its process, for example with its node ({type(error).__name__}), and will "
                    "resume from a checkpoint"
                )
                entry.state = "waiting"
                self.waiting.insert(0, cell)
                return
            lines = str(error).strip().splitlines() or [type(error).__name__]
            found = {"state": "failed", "reason": f"its process ended with {type(error).__name__}: {lines[-1][:300]}"}
        entry.state, entry.reason = found["state"], found.get("reason", "")
        before = entry.seconds
        entry.seconds += found.get("seconds", 0.0)
        for phase, seconds in found.get("phase_seconds", {}).items():
            entry.phase_seconds.setdefault(phase, before + seconds)
        entry.summary = found.get("summary")
        entry.scored_on = found.get("scored_on", {})
        self.ledger.write()
        scores = final_scores(cell.config.schedule[-1][0], entry.summary) if entry.summary else {}
        self._tracking[cell.name].close(entry.state, scores)
        if entry.state != "interrupted":
            self._done += cell.own_iterations
        self._line.message(f"{cell.name} {_description(entry)}")
        self.finished()

    def _counts(self) -> dict[str, Any]:
        """How many runs there are and how many of them are over or run, for the status."""
        states = Counter(self.ledger[cell.name].state for cell in self.cells)
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
        return self._done + sum(self._running().values())

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


def cell_location(comparison: RunDirectory, name: str) -> Path | S3Path:
    """Run folder of a cell, or its URL."""
    return join_location(comparison.uri, "cells", name)


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
