"""The life of a run: status.json says how it ended, however it ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mpscl_ray.errors import Interrupted, MpsclError
from mpscl_ray.runs.run_directory import RunDirectory

Details = Callable[[], Mapping[str, Any]]
"""Gives phase, iteration and global_step for the status at the end."""


def carry_out(run: RunDirectory, resume_command: str, work: Callable[[], None], details: Details = dict) -> int:
    """Do the work of a command, and write its status: running, then finished, interrupted or failed.

    Args:
        run: Directory of the command, which holds its lock.
        resume_command: Printed where the work was interrupted.
        work: Raises :class:`Interrupted` where it was stopped from outside.
        details: Of the status at the end.

    Returns:
        The exit code: 0, or 130 where the work was interrupted.

    Raises:
        BaseException: What ``work`` raises otherwise, after it was written to the status.
    """
    run.write_status("running", resume_command=resume_command)
    with record_failure(run, details):
        try:
            work()
        except (Interrupted, KeyboardInterrupt, SystemExit) as stop:
            # Ray's start replaces the handler of SIGTERM by one that raises SystemExit.
            name = "SIGINT" if isinstance(stop, KeyboardInterrupt) else "SIGTERM"
            reason = str(stop) if isinstance(stop, Interrupted) else f"stopped by {name} while Ray started or ended"
            run.write_status("interrupted", exit_code=Interrupted.exit_code, reason=reason, **details())
            print(f"{reason}; to resume:\n  {resume_command}", flush=True)
            return Interrupted.exit_code
    run.write_status("finished", exit_code=0, **details())
    return 0


@contextmanager
def record_failure(run: RunDirectory, details: Details = dict) -> Iterator[None]:
    """Write the status ``failed``, with exit code and reason, where the block raises."""
    try:
        yield
    except BaseException as error:
        code, reason = 1, f"{type(error).__name__}: {error}"
        if isinstance(error, MpsclError):
            code, reason = error.exit_code, str(error)
        run.write_status("failed", exit_code=code, reason=reason, **details())
        raise
