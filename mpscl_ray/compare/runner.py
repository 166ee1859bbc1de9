"""Running the cells of a comparison side by side: each in a task that holds no CPU, its workers where there is room."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray

from mpscl_ray.compare.cells import Cell, Entry, Ledger
from mpscl_ray.config import config_from_dict, to_dict
from mpscl_ray.errors import MpsclError, StorageError
from mpscl_ray.evaluate.run import evaluate_phases
from mpscl_ray.runs.control_files import STOP_FILE
from mpscl_ray.runs.fork import fork
from mpscl_ray.runs.progress import ProgressLine
from mpscl_ray.runs.run_directory import RunDirectory, open_run
from mpscl_ray.runs.signals import Interruption
from mpscl_ray.runs.storage import join_location
from mpscl_ray.train.ray.concurrent import Shared, run_trial
from mpscl_ray.train.ray.launch import Launch

_LOOK_S = 0.5
_PROGRESS_S = 2.0


@dataclass(frozen=True)
class CellTask:
    """What a task is told of its cell.

    Attributes:
        config: nested plain values.
        folder: address of its run folder.
        parent: address of the run to fork from; None where there is none.
        fork_phase: phase of the parent.
        comparison: address of the comparison's folder, where STOP_FILE asks for the end when it appears.
        resume_command: for the cell's status.json.
    """

    config: dict[str, Any]
    folder: str
    parent: str | None
    fork_phase: str | None
    comparison: str
    resume_command: str


def run_cell(task: CellTask, shared: Shared) -> dict[str, Any]:
    """Train a cell and score the end of its last phase.

    Returns:
        Fields of :class:`Entry`; what a user can cause is in ``reason`` and not raised, because Ray would wrap it.
    """
    started = time.monotonic()
    config = config_from_dict(task.config)
    patience_s = 60 * config.run.outage_min
    folder, comparison = open_run(task.folder, "command", patience_s), open_run(task.comparison)
    phases = [name for name, _ in config.schedule]
    found: dict[str, Any] = {"phase_seconds": {}}
    next_look = 0.0

    def note_phases() -> None:
        for phase in folder.store.finished_phases():
            if phase in phases and phase not in there:
                found["phase_seconds"].setdefault(phase, time.monotonic() - started)

    def look(training: Launch) -> None:
        nonlocal next_look
        if time.monotonic() < next_look:
            return
        next_look = time.monotonic() + folder.store.poll_interval_s
        # A storage that does not answer is the training's concern, which looks after what it writes.
        with suppress(StorageError):
            note_phases()
            if comparison.control_files.read(STOP_FILE) is not None:
                training.request_stop()

    try:
        if task.parent is not None and task.fork_phase is not None:
            fork(folder, open_run(task.parent, patience_s=patience_s), task.fork_phase)
        there = set(folder.store.finished_phases())
        outcome = run_trial(config, folder, shared, look, resume_command=task.resume_command)
        note_phases()
        if outcome.state == "finished":
            done = evaluate_phases(folder.uri, phases[-1:], workers=0, progress=False)
            evaluation = done[phases[-1]]
            found |= {
                "state": "finished",
                "summary": evaluation.summary.to_json(),
                "scored_on": {
                    "split": evaluation.split,
                    "volumes": len(evaluation.scores),
                    "modality": evaluation.modality,
                    "dataset": str(evaluation.dataset),
                },
            }
        else:
            found["state"] = "interrupted"
    except MpsclError as error:
        found |= {"state": "failed", "reason": str(error)}
    return {**found, "seconds": time.monotonic() - started}


class Comparison:
    """The cells that are still to be run, the ones that run, and the ledger of all.

    Args:
        cells: all of the comparison, in order.
        ledger: what is known of them.
        folder: of the comparison; run folders are in ``cells/``, and ``stop-requested`` in it ends the running cells.
        shared: of each cell.
        max_concurrent: most cells at a time.
        resume_command: what to give to go on.
        finished: called after each cell that ended.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        ledger: Ledger,
        folder: RunDirectory,
        shared: Mapping[str, Shared],
        max_concurrent: int,
        resume_command: str,
        finished: Callable[[], None],
    ) -> None:
        self.cells, self.ledger, self.folder, self.shared = {c.name: c for c in cells}, ledger, folder, shared
        self.max_concurrent, self.resume_command, self.finished = max_concurrent, resume_command, finished
        self.waiting = [cell for cell in cells if not is_done(ledger[cell.name])]
        self.running: dict[Any, Cell] = {}
        self._folders: dict[str, RunDirectory] = {}
        self.losses: Counter[str] = Counter()
        """How often the process beside a cell's workers was lost, with its node for example."""
        self._task = ray.remote(num_cpus=0, max_retries=0)(run_cell)
        total = sum(cell.own_iterations for cell in self.waiting)
        self._line = ProgressLine(total, "all cells, iteration")
        self._done = 0

    def run(self, interruption: Interruption) -> None:
        """Run until every cell has ended, or until the running ones have after an interruption."""
        self.folder.control_files.clear(STOP_FILE)
        last_progress = next_look = 0.0
        with self._line:
            try:
                while self.running or (self.waiting and not interruption.requested):
                    if self.folder.store.sync_error is not None:
                        raise self.folder.store.sync_error
                    if time.monotonic() >= next_look:
                        next_look = time.monotonic() + self.folder.store.poll_interval_s
                        self._look(interruption)
                    if not self.running:
                        time.sleep(_LOOK_S)
                        continue
                    ready = ray.wait(list(self.running), timeout=_LOOK_S)[0]
                    for reference in ready:
                        self._end(self.running.pop(reference), reference)
                    if time.monotonic() - last_progress >= _PROGRESS_S:
                        last_progress = time.monotonic()
                        now_running = sum(self._iterations(cell) for cell in self.running.values())
                        self._line.update(self._done + now_running)
            finally:
                with suppress(StorageError):
                    self.folder.control_files.clear(STOP_FILE)
                for reference, cell in self.running.items():
                    ray.cancel(reference, force=True)
                    self.ledger[cell.name].state = "interrupted"
                self.ledger.write()

    def _look(self, interruption: Interruption) -> None:
        """Pass on the wish to stop, or start what has room."""
        try:
            if self.folder.control_files.read(STOP_FILE) is not None:
                interruption.request(f"the file {STOP_FILE} in its folder")
            elif interruption.requested:
                self.folder.control_files.write(STOP_FILE, "")
            origins = {} if interruption.requested else {cell.name: self._origin(cell) for cell in self._candidates()}
        except StorageError:
            return  # The folder's own problem, when it has failed for long; until then nothing new is started.
        self._start_ready(origins)

    def _candidates(self) -> list[Cell]:
        return self.waiting if len(self.running) < self.max_concurrent else []

    def _start_ready(self, origins: Mapping[str, tuple[str, ...] | None]) -> None:
        """Start waiting cells, as far as there is room, from where they begin."""
        for cell in list(self.waiting):
            if len(self.running) >= self.max_concurrent:
                return
            origin = origins.get(cell.name)
            if origin is None:
                continue
            self.waiting.remove(cell)
            entry = self.ledger[cell.name]
            entry.state, entry.reason = "running", ""
            forked = list(origin)
            if forked and not entry.forked:
                entry.forked = forked
            self.ledger.write()
            parent = self.run_folder(forked[0]).uri if forked else None
            self._line.message(
                f"{cell.name} starts" + (f", from the end of {forked[1]} of {forked[0]}" if forked else "")
            )
            task = CellTask(
                to_dict(cell.config),
                self.run_folder(cell.name).uri,
                parent,
                forked[1] if forked else None,
                self.folder.uri,
                self.resume_command,
            )
            self.running[self._task.remote(task, self.shared[cell.name])] = cell

    def _origin(self, cell: Cell) -> tuple[str, ...] | None:
        """Cell and phase to fork from; empty to begin anew or go on; None while what it shares is still trained."""
        if cell.parent is None or cell.fork_phase is None or self.run_folder(cell.name).store.step_checkpoints():
            return ()
        if cell.fork_phase in self.run_folder(cell.parent).store.finished_phases():
            return cell.parent, cell.fork_phase
        # A parent that failed before it came so far leaves its children to train by themselves.
        coming = self.ledger[cell.parent].state in ("waiting", "running") or self.cells[cell.parent] in self.waiting
        return None if coming else ()

    def _end(self, cell: Cell, reference: Any) -> None:
        entry = self.ledger[cell.name]
        try:
            found: dict[str, Any] = ray.get(reference)
        except ray.exceptions.RayError as error:
            lost = not isinstance(error, ray.exceptions.RayTaskError)
            self.losses[cell.name] += lost
            if lost and self.losses[cell.name] <= cell.config.run.restarts:
                self._line.message(f"{cell.name} lost its process, as with its node, and will go on from a checkpoint")
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
        if entry.state != "interrupted":
            self._done += cell.own_iterations
        self._line.message(f"{cell.name} {_told(entry)}")
        self.finished()

    def _iterations(self, cell: Cell) -> int:
        """Iterations that a running cell has made itself."""
        with suppress(MpsclError):
            records = self.run_folder(cell.name).read_metrics()
            if records:
                return max(0, int(records[-1]["global_step"]) - (cell.iterations - cell.own_iterations))
        return 0

    def run_folder(self, name: str) -> RunDirectory:
        """Folder of a cell's run."""
        if name not in self._folders:
            self._folders[name] = open_run(join_location(self.folder.uri, "cells", name))
        return self._folders[name]


def is_done(entry: Entry) -> bool:
    """Whether a cell is trained and scored."""
    return entry.state == "finished" and entry.summary is not None


def total_seconds(name: str, ledger: Ledger) -> float:
    """Wall time of a cell with the phases that it shares, as if it had trained them itself."""
    entry = ledger[name]
    return entry.seconds + (_until(entry.forked[0], entry.forked[1], ledger) if entry.forked else 0.0)


def _until(name: str, phase: str, ledger: Ledger) -> float:
    """Wall time of a cell from its first phase, wherever that was trained, to the end of a phase."""
    entry = ledger[name]
    own = entry.phase_seconds.get(phase)
    if own is None:
        return _until(entry.forked[0], phase, ledger) if entry.forked else 0.0
    return own + (_until(entry.forked[0], entry.forked[1], ledger) if entry.forked else 0.0)


def _told(entry: Entry) -> str:
    if entry.state == "finished" and entry.summary is not None:
        dice = entry.summary["structures"]["mean"]["dice"]["mean"]
        return "is finished" if dice is None else f"is finished: mean Dice {100 * dice:.1f} %"
    return f"failed: {entry.reason}" if entry.state == "failed" else "stopped after a checkpoint"
