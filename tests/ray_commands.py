"""Commands in processes of their own on the Ray that a test runs, and what they leave there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group_table

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 600
POLL_S = 0.2


def environment() -> dict[str, str]:
    """Environment of a command that joins the Ray of this process."""
    return os.environ | {
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "RAY_AUTH_MODE": "token",
        "PYTHONPATH": str(ROOT),
    }


def run_until_killed(words: Sequence[str], when: Callable[[], bool]) -> None:
    """Start ``python -m WORDS``; when a condition holds, end it by SIGKILL, with the processes that it started itself.

    Fails the test, with what the command printed, where the command ends before or the condition never holds.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *words],
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + PATIENCE_S
            while not when():
                if process.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    pytest.fail(f"ended, or did not come so far; it printed:\n{output.read().decode()}")
                time.sleep(POLL_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def reserved() -> set[str]:
    """Ids of the placement groups there are."""
    return {name for name, group in placement_group_table().items() if group["state"] != "REMOVED"}


def assert_nothing_is_reserved() -> None:
    """No place is held on the cluster, and all of it is free."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not reserved() and ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]:
            return
        time.sleep(0.2)
    pytest.fail(f"still reserved: {reserved()}; free: {ray.available_resources()}")
