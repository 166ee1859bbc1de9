"""Runs that share their beginning: a new run that goes on from the end of a phase of another one."""

from __future__ import annotations

import shutil
from pathlib import Path

from mpscl_ray import checkpoint
from mpscl_ray.errors import ConfigError
from mpscl_ray.run_folder import RunFolder


def fork(run: RunFolder, parent: RunFolder, phase: str) -> Path:
    """Make a new run begin where a phase of ``parent`` ended, as if it had trained up to there itself.

    The new run goes on from there when it is trained: weights, random state and position in the data are those of the
    parent, so that it ends as a run that trained all phases would, provided the settings of the phases up to the fork
    are the same. Earlier phases' ends come along for the table of results. A run that has checkpoints already is left
    as it is: it was forked before.

    Args:
        run: the new run; its folder is made.
        parent: the run that has finished the phase.
        phase: name of the phase, such as ``warm_up``.

    Returns:
        The checkpoint that the new run begins with.

    Raises:
        ConfigError: the parent has not finished that phase; names those it has.
        DataError: the parent's checkpoint is damaged.
        StorageError: the new folder cannot be written.
    """
    run.create()
    existing = checkpoint.list_checkpoints(run.checkpoints)
    if existing:
        return existing[0]
    end = parent.phases / phase
    if not end.is_dir():
        finished = sorted(path.name for path in parent.phases.glob("[!.]*"))
        raise ConfigError(
            f"the run {parent.path} has no end of the phase {phase} to begin from; it has finished "
            f"{', '.join(finished) or 'no phase yet'}: train it first, or name one of these"
        )
    state = checkpoint.load(end)
    for earlier in parent.phases.glob("[!.]*"):
        before = checkpoint.load(earlier) if earlier != end else state
        if before["position"]["phase"] <= state["position"]["phase"]:
            shutil.rmtree(run.phases / earlier.name, ignore_errors=True)
            checkpoint.save(run.phases / earlier.name, before)
    # Last, because it is what tells that the fork is complete.
    return checkpoint.save(run.checkpoints / checkpoint.checkpoint_name(state["position"]["step"]), state)
