"""Places on the cluster that trainings have reserved, given back whoever of those that reserved them was killed.

Ray Train gives back the placement group of its workers when a training ends. Where its controller is killed, Ray would
keep the group for as long as the whole job runs. And one that is asked for while the job already ends, because its
command was killed just then, Ray forgets altogether: it stays reserved until the cluster ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group_table,
    remove_placement_group,
)

from mpscl_ray.errors import StorageError
from mpscl_ray.runs.atomic_files import write_atomically
from mpscl_ray.runs.control_files import ACTIVE_JOBS_FILE, PLACEMENT_GROUP_FILE
from mpscl_ray.runs.run_directory import RunDirectory


def record_placement_group(run: RunDirectory) -> None:
    """Leave, for :func:`release`, the name of what this worker and those beside it stand on."""
    group = get_current_placement_group()
    if group is not None:
        write_atomically(run.path / PLACEMENT_GROUP_FILE, group.id.hex().encode())
        run.store.upload(run.path / PLACEMENT_GROUP_FILE)


def release(folder: RunDirectory) -> None:
    """Give back the place of a training that does not run any more.

    Raises:
        StorageError: its name cannot be read or taken away.
    """
    name = folder.control_files.read(PLACEMENT_GROUP_FILE)
    if name is None:
        return
    _remove(name)
    folder.control_files.clear(PLACEMENT_GROUP_FILE)


@contextmanager
def release_orphaned_placement_groups(folder: RunDirectory) -> Iterator[None]:
    """Give back what commands that held this folder before have left reserved when they were killed.

    At the beginning of the block, so that there is room, and at the end of it once more, as processes of a command may
    live on for a while. Until then this command is on record in the folder, with the session of the cluster.

    Args:
        folder: of the command, which holds it (:meth:`RunDirectory.lock`), so that no other one of it runs.

    Raises:
        StorageError: the record cannot be read or written.
    """
    context = ray.get_runtime_context()
    session = context.get_session_name()
    own = f"{session} {context.get_job_id()}"
    killed = [line for line in (folder.control_files.read(ACTIVE_JOBS_FILE) or "").splitlines() if line != own]
    jobs = [job for there, job in (line.split() for line in killed) if there == session]
    _give_back(jobs)
    folder.control_files.write(ACTIVE_JOBS_FILE, "".join(f"{line}\n" for line in (*killed, own)))
    try:
        yield
    finally:
        with suppress(StorageError, RuntimeError, ray.exceptions.RayError):  # the cluster may be gone, then so are they
            _give_back(jobs)
            folder.control_files.clear(ACTIVE_JOBS_FILE)


def _give_back(jobs: list[str]) -> None:
    """Remove the placement groups of jobs."""
    for name, group in placement_group_table().items() if jobs else ():
        # The id of a placement group ends in that of the job whose process asked for it.
        if name.endswith(tuple(jobs)) and group["state"] != "REMOVED":
            _remove(name)


def _remove(name: str) -> None:
    remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))
