"""Placement groups of trainings, released even if the process that reserved them was killed.

Ray Train releases the placement group of its workers when a training ends. If its controller is killed, Ray keeps the
group as long as the job runs. A group that is requested while the job already ends, because its command was killed just
then, stays reserved until the cluster ends.
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
    """Record the placement group of the workers of a run, for :func:`release`."""
    group = get_current_placement_group()
    if group is not None:
        write_atomically(run.path / PLACEMENT_GROUP_FILE, group.id.hex().encode())
        run.store.upload(run.path / PLACEMENT_GROUP_FILE)


def release(folder: RunDirectory) -> None:
    """Release the placement group of a training that does not run any more.

    Raises:
        StorageError: its record cannot be read or deleted.
    """
    name = folder.control_files.read(PLACEMENT_GROUP_FILE)
    if name is not None:
        _remove(name)
        folder.control_files.clear(PLACEMENT_GROUP_FILE)


@contextmanager
def release_orphaned_placement_groups(folder: RunDirectory) -> Iterator[None]:
    """Release placement groups that earlier commands of this folder left reserved when they were killed.

    This happens at the start of the block, to make room, and again at its end, because processes of a killed command
    may still run for a while. Within the block this command is recorded in the folder, with the session of the cluster.
    The command holds the lock of the folder (:meth:`RunDirectory.lock`), so that no other command of it runs.

    Raises:
        StorageError: the record cannot be read or written.
    """
    context = ray.get_runtime_context()
    session = context.get_session_name()
    own = f"{session} {context.get_job_id()}"
    killed = [line for line in (folder.control_files.read(ACTIVE_JOBS_FILE) or "").splitlines() if line != own]
    jobs = [job for killed_in, job in (line.split() for line in killed) if killed_in == session]
    _release_of_jobs(jobs)
    folder.control_files.write(ACTIVE_JOBS_FILE, "".join(f"{line}\n" for line in (*killed, own)))
    try:
        yield
    finally:
        # The cluster may be gone, and the groups with it.
        with suppress(StorageError, RuntimeError, ray.exceptions.RayError):
            _release_of_jobs(jobs)
            folder.control_files.clear(ACTIVE_JOBS_FILE)


def _release_of_jobs(jobs: list[str]) -> None:
    for name, group in placement_group_table().items() if jobs else ():
        # The id of a placement group ends in the id of the job that requested it.
        if name.endswith(tuple(jobs)) and group["state"] != "REMOVED":
            _remove(name)


def _remove(name: str) -> None:
    remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))
