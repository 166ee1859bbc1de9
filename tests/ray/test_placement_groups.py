"""Places that killed commands have left reserved, on a real local Ray."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from mpscl_ray.runs.control_files import ACTIVE_JOBS_FILE
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train.ray.placement_groups import release_orphaned_placement_groups
from tests.ray.conftest import CPUS
from tests.ray_commands import environment, reserved

PATIENCE_S = 120

COMMAND = """
import os, signal, sys
from pathlib import Path
import ray
from ray.util.placement_group import placement_group
from mpscl_ray.distributed.ray_session import connect
from mpscl_ray.train.ray.placement_groups import release_orphaned_placement_groups
from mpscl_ray.runs.run_directory import RunDirectory

class Survivor:
    def reserve(self):
        ray.get(placement_group([{"CPU": 1}]).ready())

folder = RunDirectory(Path(sys.argv[1]))
with folder.lock(), connect(), release_orphaned_placement_groups(folder):
    survivor = ray.remote(num_cpus=0)(Survivor).options(name="survivor", namespace="test", lifetime="detached").remote()
    ray.get(survivor.reserve.remote())
    os.kill(os.getpid(), signal.SIGKILL)
"""
"""Is killed, and leaves a process that has reserved a placement group and keeps reserving more."""


def wait_for_free(cpus: float) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while ray.available_resources().get("CPU", 0) != cpus:
        assert time.monotonic() < deadline, f"still reserved: {reserved()}"
        time.sleep(0.1)


def test_placement_groups_of_a_killed_command_are_released_before_and_after_the_next_one(
    cluster: None, tmp_path: Path
) -> None:
    own = placement_group([{"CPU": 1}])
    ray.get(own.ready())
    folder = RunDirectory(tmp_path / "run")
    folder.create()
    command = subprocess.run(
        [sys.executable, "-c", COMMAND, str(folder.path)],
        env=environment(),
        timeout=PATIENCE_S,
    )
    assert command.returncode == -signal.SIGKILL
    assert len(reserved()) == 2
    wait_for_free(CPUS - 2)

    record = folder.control_files.read(ACTIVE_JOBS_FILE)
    assert record is not None
    folder.control_files.write(ACTIVE_JOBS_FILE, record + f"another-session {ray.get_runtime_context().get_job_id()}\n")
    survivor = ray.get_actor("survivor", namespace="test")
    with folder.lock():
        with release_orphaned_placement_groups(folder):
            assert reserved() == {own.id.hex()}, (
                "not what others have, nor what a job of that id has in another cluster"
            )
            wait_for_free(CPUS - 1)
            ray.get(survivor.reserve.remote())
            assert len(reserved()) == 2
            with pytest.raises(RuntimeError), release_orphaned_placement_groups(folder):
                raise RuntimeError("where the command fails too")
            ray.get(survivor.reserve.remote())
        assert reserved() == {own.id.hex()}
    wait_for_free(CPUS - 1)
    assert folder.control_files.read(ACTIVE_JOBS_FILE) is None
    ray.kill(survivor)
    remove_placement_group(own)
    wait_for_free(CPUS)
