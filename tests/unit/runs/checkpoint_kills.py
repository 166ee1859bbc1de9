"""Kill processes that write checkpoints, check what is left, and print a report as JSON.

    python -m tests.unit.runs.checkpoint_kills EMPTY_FOLDER [KILLS]

KILLS is the number of kills at random moments, half of them while new checkpoints are written and half while one is
replaced (20 by default). Forty more of each hit a writer before its first system calls, one after the other.
test_checkpoint_writing.py runs this in its own process, which loads torch once and forks the writers.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mpscl_ray.runs import checkpoint

RANDOM_KILLS = 20
CALLS = 40
LARGE, SMALL = 500_000, 1_000
"""Numbers in a state: writing takes a share of the time that a kill can hit, or next to none of the test's time."""


def state(step: int, size: int) -> dict[str, Any]:
    """What depends on the step alone."""
    return {"step": step, "tensor": torch.full((size,), step, dtype=torch.float32), "text": str(step) * (size // 10)}


def write_for_ever(folder: Path, mode: str, size: int, acknowledge: int) -> None:
    """Save checkpoint after checkpoint, telling each one that is complete."""
    step = 1
    while True:
        name = checkpoint.checkpoint_name(step) if mode == "new" else checkpoint.checkpoint_name(7)
        checkpoint.save(folder / name, state(step, size))
        os.write(acknowledge, step.to_bytes(4, "little"))
        if mode == "new":
            checkpoint.prune(folder, 2)
        step += 1


def kill_at_call(number: int) -> None:
    """Let the process kill itself before the given one of its fsyncs, renames, removals and writes."""
    calls = 0

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return counted

    os.fsync = before(os.fsync)
    os.rename = before(os.rename)
    os.mkdir = before(os.mkdir)
    os.unlink = before(os.unlink)
    os.rmdir = before(os.rmdir)
    checkpoint._write = before(checkpoint._write)


def run_and_kill(folder: Path, mode: str, size: int, *, seconds: float | None = None, call: int = 0) -> int:
    """Fork a writer and kill it; returns the last step that it reported as complete."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        if call:
            kill_at_call(call)
        write_for_ever(folder, mode, size, writing)
    os.close(writing)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the writer ended without a kill: {status}"
    assert os.WTERMSIG(status) == signal.SIGKILL
    with os.fdopen(reading, "rb") as pipe:
        reported = pipe.read()
    return int.from_bytes(reported[-4:], "little")


def judge(folder: Path, size: int, acknowledged: int) -> tuple[str | None, bool]:
    """What was lost, if anything, and whether the kill hit a save or a removal half-way."""
    entries = os.listdir(folder) if folder.exists() else []
    half_way = any(name.startswith(".") for name in entries)
    found, warnings = checkpoint.latest(folder)
    if warnings:
        return f"damaged: {warnings}", half_way
    for path in checkpoint.list_checkpoints(folder):
        checkpoint.verify(path)
    if found is None:
        return ("nothing left" if acknowledged else None), half_way
    loaded = checkpoint.load(found)
    step = loaded["step"]
    if not acknowledged <= step <= acknowledged + 1:
        return f"step {step} after {acknowledged}", half_way
    expected = state(step, size)
    if not torch.equal(loaded["tensor"], expected["tensor"]) or loaded["text"] != expected["text"]:
        return f"wrong contents of step {step}", half_way
    # The next save works and removes all leftovers.
    checkpoint.save(folder / checkpoint.checkpoint_name(99), state(99, SMALL))
    if left := [name for name in os.listdir(folder) if name.startswith(".")]:
        return f"left behind: {left}", half_way
    return None, half_way


def main(folder: Path, random_kills: int) -> None:
    start = time.perf_counter()
    for step in range(3):
        checkpoint.save(folder / "timing" / f"{step}", state(step, LARGE))
    one_save = (time.perf_counter() - start) / 3
    random_numbers = random.Random(20)
    report: dict[str, Any] = {"kills": 0, "random": 0, "half_way": 0, "lost": []}
    for mode in ("new", "replace"):
        plans: list[tuple[int, dict[str, Any]]] = [
            (LARGE, {"seconds": random_numbers.uniform(0.5, 5) * one_save}) for _ in range(random_kills // 2)
        ]
        # As many calls as the first checkpoints of either mode take, removals and replacements included.
        plans += [(SMALL, {"call": number}) for number in range(1, CALLS + 1)]
        for size, plan in plans:
            where = folder / "writer"
            lost, half_way = judge(where, size, run_and_kill(where, mode, size, **plan))
            report["kills"] += 1
            report["random"] += "seconds" in plan
            report["half_way"] += half_way
            if lost:
                report["lost"].append({"mode": mode, **plan, "lost": lost})
            shutil.rmtree(where, ignore_errors=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else RANDOM_KILLS)
