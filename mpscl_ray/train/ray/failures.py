"""What is said, and counted, when workers of a training were lost.

The controller of Ray Train imports this module before it starts the workers, so it needs little.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import ray
from ray.train import UserCallback

from mpscl_ray.runs.control_files import FAILURE_FILE, WORKER_FAILURES_FILE
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train.ray.prometheus import count_restart


class WorkerFailureCallback(UserCallback):
    """Counts, and leaves a notice, each time that workers were lost; runs in the controller of Ray Train."""

    def __init__(self, folder: RunDirectory, display_name: str) -> None:
        self.folder, self.display_name = folder, display_name

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        if not (self.folder.path / FAILURE_FILE).exists():
            count_restart(self.display_name)
            self.folder.add_warning(
                f"{causes(worker_exceptions)}; the workers are replaced and go on", WORKER_FAILURES_FILE
            )


_PEER_IS_GONE = re.compile(
    r"Connection (?:reset|closed|refused)|Broken pipe|remote process (?:exited|closed)", re.IGNORECASE
)
"""What gloo and NCCL say where one of the processes is there no more, which Ray Train may learn only later."""


def causes(worker_exceptions: Mapping[int, BaseException]) -> str:
    """Which workers failed and how. Where one died, errors of the others are only its consequence."""
    died = {rank: error for rank, error in worker_exceptions.items() if _is_death(error)}
    lines = []
    for rank, error in sorted((died or worker_exceptions).items()):
        if _is_death(error):
            lines.append(f"worker {rank} was lost: its process died")
        elif _PEER_IS_GONE.search(str(error)):
            lines.append(f"worker {rank} was cut off: a process or a node that it spoke to was lost")
        else:
            lines.append(f"worker {rank} failed: {last_line(error)}")
    return "; ".join(lines)


def _is_death(error: BaseException) -> bool:
    chain = (error, getattr(error, "health_check_failure", None), error.__cause__)
    return any(isinstance(cause, ray.exceptions.ActorDiedError) for cause in chain)


def last_line(error: BaseException) -> str:
    """The line of an error's text that says most, shortened."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # Of a death for want of memory Ray says so early, and then goes on for a page.
    return next((line for line in lines if "low on memory" in line), lines[-1])[:300]
