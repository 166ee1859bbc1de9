"""Profiles of a few steps by torch.profiler: where the time of a step goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from mpscl_ray.runs.atomic_files import storage_errors

FOLDER = "profile"
_SKIPPED, _WARM_UP = 3, 1
"""Steps of a phase before those that are profiled: the first ones allocate."""
_ROWS = 40


@contextmanager
def profiled_steps(run: Path, phase: str, steps: int, device: torch.device) -> Iterator[Callable[[], None]]:
    """Profile steps of a phase: ``RUN/profile/PHASE.json`` for chrome://tracing or Perfetto, and ``PHASE.txt``.

    Args:
        run: folder of the run.
        phase: its name.
        steps: number of steps that are profiled, after the first four of the phase; 0 profiles nothing.
        device: of the training.

    Returns:
        What the training calls after each step.

    Raises:
        StorageError: the profile cannot be written.
    """
    if steps == 0:
        yield lambda: None
        return

    def write(found: profile) -> None:
        folder = run / FOLDER
        with storage_errors(folder):
            folder.mkdir(exist_ok=True)
            found.export_chrome_trace(str(folder / f"{phase}.json"))
            order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
            table = found.key_averages().table(sort_by=order, row_limit=_ROWS)
            (folder / f"{phase}.txt").write_text(table, encoding="utf-8")

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    plan = schedule(wait=_SKIPPED, warmup=_WARM_UP, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step
