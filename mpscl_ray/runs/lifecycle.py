"""The life of a command in its folder: status.json tells how it ended, however it ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mpscl_ray.errors import Interrupted, MpsclError
from mpscl_ray.runs.run_directory import RunDirectory


def carry_out(
    folder: RunDirectory,
    resume_command: str,
    work: Callable[[], None],
    details: Callable[[], Mapping[str, Any]] = dict,
) -> int:
    """Do the work of a command, and write its status: running, then finished, interrupted or failed.

    Args:
        folder: of the command, which holds its lock.
        resume_command: printed where the work was interrupted.
        work: raises :class:`Interrupted` where it was stopped from outside.
        details: gives phase, iteration and global_step of the status at the end.

    Returns:
        The exit code: 0, or 130 where the work was interrupted.

    Raises:
        BaseException: what ``work`` raises otherwise, after it was written down.
    """
    folder.write_status("running", resume_command=resume_command)
    try:
        work()
    except (Interrupted, KeyboardInterrupt, SystemExit) as stop:
        # Ray's start replaces the handler of SIGTERM by one that raises SystemExit.
        name = "SIGINT" if isinstance(stop, KeyboardInterrupt) else "SIGTERM"
        reason = str(stop) if isinstance(stop, Interrupted) else f"stopped by {name} while Ray started or ended"
        folder.write_status("interrupted", exit_code=Interrupted.exit_code, reason=reason, **details())
        print(f"{reason}; to go on:\n  {resume_command}", flush=True)
        return Interrupted.exit_code
    except MpsclError as error:
        folder.write_status("failed", exit_code=error.exit_code, reason=str(error), **details())
        raise
    except BaseException as error:
        folder.write_status("failed", exit_code=1, reason=f"{type(error).__name__}: {error}", **details())
        raise
    folder.write_status("finished", exit_code=0, **details())
    return 0
