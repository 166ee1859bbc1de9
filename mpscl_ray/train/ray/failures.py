"""Worker failures: their causes in words, the warning and the count of each restart.

The controller of Ray Train imports this module before it starts the workers, so it imports little.
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


def record_restart(folder: RunDirectory, display_name: str, worker_exceptions: Mapping[int, BaseException]) -> None:
    """Count that workers failed and are replaced, and leave a warning."""
    count_restart(display_name)
    folder.add_warning(f"{causes(worker_exceptions)}; the workers are replaced and resume", WORKER_FAILURES_FILE)


class WorkerFailureCallback(UserCallback):
    """Records each worker failure that a restart may mend; runs in the controller of Ray Train."""

    def __init__(self, folder: RunDirectory, display_name: str) -> None:
        self.folder, self.display_name = folder, display_name

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        if not (self.folder.path / FAILURE_FILE).exists():
            record_restart(self.folder, self.display_name, worker_exceptions)


_PEER_IS_GONE = re.compile(
    r"Connection (?:reset|closed|refused)|Broken pipe|remote process (?:exited|closed)", re.IGNORECASE
)
"""Errors of gloo and NCCL when another process is gone, which Ray Train may notice only later."""


_NO_ANSWER = re.compile(r"no answer from another worker within (\S+) s, after step (\d+); the workers are on (.+)")
"""What :mod:`mpscl_ray.train.ray.hanging` makes of a collective that another worker did not join."""


def causes(worker_exceptions: Mapping[int, BaseException]) -> str:
    """Which workers failed and how. Where one died, the errors of the others are its consequence and left out."""
    died = {rank: error for rank, error in worker_exceptions.items() if _is_death(error)}
    texts = [str(error) for error in worker_exceptions.values()]
    unanswered = [found for text in texts if (found := _NO_ANSWER.search(text))]
    if unanswered and not died and all(_NO_ANSWER.search(text) or _PEER_IS_GONE.search(text) for text in texts):
        return _silence(unanswered[0], worker_exceptions)
    lines = []
    for rank, error in sorted((died or worker_exceptions).items()):
        if _is_death(error):
            lines.append(f"worker {rank} was lost: its process died")
        elif _PEER_IS_GONE.search(str(error)):
            lines.append(f"worker {rank} was cut off: a process or a node that it communicated with was lost")
        else:
            lines.append(f"worker {rank} failed: {last_line(error)}")
    return "; ".join(lines)


def _silence(unanswered: re.Match[str], worker_exceptions: Mapping[int, BaseException]) -> str:
    """Who did not answer: the workers that have failed did not hang."""
    seconds, step, nodes = unanswered.groups()
    after = f"for {seconds} s (scaling.collective_timeout_s) after step {step}"
    silent = [
        f"worker {rank} on {node}" for rank, node in enumerate(nodes.split(", ")) if rank not in worker_exceptions
    ]
    if not silent:
        return f"the workers did not hear from each other {after}: the network between {nodes} is cut or too slow"
    return f"{' or '.join(silent)} did not answer {after}: its process hangs, or the network to it is cut"


def _is_death(error: BaseException) -> bool:
    chain = (error, getattr(error, "health_check_failure", None), error.__cause__)
    return any(isinstance(cause, (ray.exceptions.ActorDiedError, ray.exceptions.WorkerCrashedError)) for cause in chain)


def last_line(error: BaseException) -> str:
    """The most informative line of an error's text, shortened."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # Ray names a lack of memory early in a page of text.
    return next((line for line in lines if "low on memory" in line), lines[-1])[:300]
