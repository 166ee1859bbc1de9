"""The life of a run: status.json says how it ended, however it ended; how far it is: :mod:`mpscl_ray.runs.position`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mpscl_ray.errors import Interrupted, MpsclError
from mpscl_ray.runs import json_output
from mpscl_ray.runs.position import position
from mpscl_ray.runs.run_directory import RunDirectory, State
from mpscl_ray.runs.signals import signals_end


def carry_out(run: RunDirectory, resume_command: str, work: Callable[[], None]) -> int:
    """Do the work of a command, and write its status.

    Args:
        run: Directory of the command, which holds its lock.
        resume_command: Printed where the work was interrupted.
        work: Raises :class:`Interrupted` where it was stopped from outside; any other error is raised again.

    Returns:
        The exit code: 0, or 130 where the work was interrupted.
    """
    try:
        with record_status(run, resume_command):
            try:
                with signals_end("while Ray started or ended"):
                    work()
            except (KeyboardInterrupt, SystemExit) as stop:
                # Ray's start replaces the handler of SIGTERM by one that raises SystemExit.
                name = "SIGINT" if isinstance(stop, KeyboardInterrupt) else "SIGTERM"
                raise Interrupted(f"stopped by {name} while Ray started or ended") from stop
    except Interrupted as stop:
        print(f"{stop}; to resume:\n  {resume_command}", flush=True)
        json_output.report(error=str(stop), next=[resume_command])
        return Interrupted.exit_code
    return 0


@contextmanager
def record_status(run: RunDirectory, resume_command: str) -> Iterator[None]:
    """Write the status of the block: running, then finished, interrupted or failed."""
    run.write_status("running", resume_command=resume_command)
    with record_failure(run):
        yield
    run.write_status("finished", exit_code=0, **position(run))


@contextmanager
def record_failure(run: RunDirectory) -> Iterator[None]:
    """Write the status ``interrupted`` or ``failed``, with exit code and reason, where the block raises."""
    try:
        yield
    except BaseException as error:
        code, reason = 1, f"{type(error).__name__}: {error}"
        if isinstance(error, MpsclError):
            code, reason = error.exit_code, str(error)
        elif isinstance(error, KeyboardInterrupt):
            code, reason = Interrupted.exit_code, "stopped by KeyboardInterrupt"
        state: State = "interrupted" if code == Interrupted.exit_code else "failed"
        run.write_status(state, exit_code=code, reason=reason, **position(run))
        raise
