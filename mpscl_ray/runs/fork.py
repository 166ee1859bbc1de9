"""Runs with common first phases: a new run that starts from the end of a phase of another run."""

from __future__ import annotations

import shutil
from pathlib import Path

from mpscl_ray.errors import ConfigError
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.run_directory import RunDirectory


def fork(run: RunDirectory, parent: RunDirectory, phase: str) -> Path:
    """Let a new run start where a phase of ``parent`` ended, as if it had trained that phase itself.

    Training resumes from there: weights, random state and position in the data are those of the parent. If the settings
    of the phases up to the fork are the same, the run ends as a run that trained all phases would. The last checkpoints
    of earlier phases are copied for the table of results. A run that already has checkpoints was forked before and is
    not changed.

    Returns:
        The checkpoint that the new run starts from.

    Raises:
        ConfigError: the parent has not finished that phase; names those it has.
        DataError: the parent's checkpoint is damaged.
        StorageError: the new directory cannot be written.
    """
    run.create()
    existing = run.store.step_checkpoints()
    if existing:
        return run.store.localize(run.checkpoints / existing[0])
    finished = parent.store.finished_phases()
    if phase not in finished:
        raise ConfigError(
            f"the run {parent.display_path} has not finished the phase {phase}; it has finished "
            f"{', '.join(finished) or 'no phase yet'}: train it first, or name one of these"
        )
    state = checkpoint.load(parent.store.localize(parent.phases / phase))
    for earlier in finished:
        before = checkpoint.load(parent.store.localize(parent.phases / earlier)) if earlier != phase else state
        if before["position"]["phase"] <= state["position"]["phase"]:
            shutil.rmtree(run.phases / earlier, ignore_errors=True)
            run.store.upload(checkpoint.save(run.phases / earlier, before))
    # Last, because its presence means that the fork is complete.
    first = checkpoint.save(run.checkpoints / checkpoint.checkpoint_name(state["position"]["step"]), state)
    run.store.upload(first)
    return first
