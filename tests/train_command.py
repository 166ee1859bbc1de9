"""The train command as a process on tiny runs: started, waited for, killed, and what its runs leave."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray

from mpscl_ray.config import load_config, to_yaml
from mpscl_ray.runs.run_directory import RunDirectory
from tests.tiny import tiny_settings

ROOT = Path(__file__).resolve().parents[1]
PHASE = 30
EVERY = 7
STEPS = 3 * PHASE
LONG = (
    f"phases.source_only={PHASE}",
    f"phases.warm_up={PHASE}",
    f"phases.adaptation={PHASE}",
    f"run.checkpoint_every={EVERY}",
    f"run.validate_every={PHASE}",
    "run.log_every=1",
    "scaling.num_workers=2",
)
"""A run that is long enough to be hit in the middle."""
PATIENCE_S = 300
MARK = "MPSCL_RAY_TEST_MARK"


class Command:
    """The train command as a process, alone in its process group and with its own folder for temporary files.

    Args:
        arguments: of the command.
        cluster: whether to join the cluster of the tests; else it starts its own Ray.
    """

    def __init__(self, arguments: list[str], *, cluster: bool = False) -> None:
        self.mark = secrets.token_hex(8)
        self.temporary = Path(tempfile.mkdtemp(prefix="m", dir="/tmp"))
        environment = {k: v for k, v in os.environ.items() if cluster or not k.startswith(("RAY_AUTH", "RAY_ADDRESS"))}
        if cluster:
            environment |= {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "RAY_AUTH_MODE": "token"}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary), MARK: self.mark}
        self.output = self.temporary / "output.txt"
        with self.output.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mpscl_ray.train", *arguments],
                env=environment,
                cwd=self.temporary,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        """What it has printed."""
        return self.output.read_text(encoding="utf-8")

    def wait(self) -> int:
        """Its exit code."""
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the command hangs; it printed:\n{self.text}")

    def wait_for_steps(self, run: RunDirectory, steps: int, start: int = 1) -> int:
        """Wait until workers of the run have made so many steps since their ``start``-th start; returns the step."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and self.process.poll() is None:
            if len(starts(run)) >= start:
                found = max((record["global_step"] for record in run.read_metrics()), default=0)
                if found >= starts(run)[start - 1] + steps:
                    assert found < STEPS, "too late: the run is done"
                    return int(found)
            time.sleep(0.02)
        pytest.fail(f"{steps} steps did not come; the command printed:\n{self.text}")

    def processes(self) -> list[int]:
        """All processes that it started, and that they started."""
        found = []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"{MARK}={self.mark}".encode() in environment.read_bytes():
                    found.append(int(environment.parent.name))
            except OSError:
                continue  # ended meanwhile
        return found

    def assert_nothing_left(self, seconds: float = 20.0) -> None:
        """None of its processes lives on."""
        deadline = time.monotonic() + seconds
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert self.processes() == []

    def temporary_files(self) -> list[str]:
        """What it left among temporary files (torch leaves an empty folder there in each process that imports it)."""
        others = {self.output.name, "torchinductor_root"}
        return [path.name for path in self.temporary.iterdir() if path.name not in others]

    def end(self) -> None:
        """Kill what is left."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        shutil.rmtree(self.temporary, ignore_errors=True)


Start = Callable[..., Command]


@contextmanager
def started_commands() -> Iterator[Start]:
    """Starts commands, and ends them all at the end of the block."""
    started: list[Command] = []

    def start(arguments: list[str], *, cluster: bool = False) -> Command:
        started.append(Command(arguments, cluster=cluster))
        return started[-1]

    try:
        yield start
    finally:
        for command in started:
            command.end()


@dataclass(frozen=True)
class Runs:
    """Tiny runs on the datasets ``mr`` and ``ct`` below ``data``, in the folder ``storage``."""

    data: Path
    storage: Path

    def arguments(self, name: str, *overrides: str, preset: str = "small/mpscl") -> list[str]:
        """Of the command that trains a run."""
        file = self.storage / f"{preset.replace('/', '-')}.yaml"
        if not file.exists():
            folders = [f"data.source={self.data / 'mr'}", f"data.target={self.data / 'ct'}"]
            settings = [*tiny_settings(preset), *folders, f"run.storage={self.storage}"]
            file.write_text(to_yaml(load_config(preset, settings)))
        return [str(file), f"run.name={name}", *overrides]

    def __getitem__(self, name: str) -> RunDirectory:
        return RunDirectory(self.storage / name)


def contents(directory: Path) -> dict[str, str]:
    """SHA-256 of each file: a difference is one line, not in a comparison of megabytes."""
    files = sorted(directory.iterdir())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def assert_same_run(run: RunDirectory, other: RunDirectory) -> None:
    """All checkpoints of the ends, byte for byte: weights, optimisers, prototypes, random state, position."""
    for phase in ("source_only", "warm_up", "adaptation"):
        assert contents(run.phases / phase) == contents(other.phases / phase), phase
    assert contents(run.best) == contents(other.best)
    ours, theirs = (
        [{key: value for key, value in r.items() if not key.startswith("perf/")} for r in f.read_metrics()]
        for f in (run, other)
    )
    assert [record for record in ours if record["global_step"] in range(1, STEPS + 1)] == theirs


def starts(run: RunDirectory) -> list[int]:
    """The steps at which worker 0 has started, in turn."""
    file = run.logs / "worker-0.log"
    log = file.read_text(encoding="utf-8") if file.exists() else ""
    return [int(step) for step in re.findall(r"training starts at step (\d+)", log)]


def signal_worker(run: RunDirectory, rank: int, number: signal.Signals) -> None:
    """Send a signal to the process of a worker alone."""
    log = (run.logs / f"worker-{rank}.log").read_text(encoding="utf-8")
    os.kill(int(re.findall(r"pid (\d+) INFO worker starts", log)[-1]), number)


def check_status(run: RunDirectory, state: str, exit_code: int, reason: str) -> str:
    """Check status.json; returns the command to resume with."""
    status = run.read_status()
    assert (status["state"], status["exit_code"]) == (state, exit_code)
    assert reason in status["reason"]
    assert status["resume_command"].startswith("python -m mpscl_ray.train ")
    assert f"run.name={run.name}" in status["resume_command"]
    return str(status["resume_command"])


def wait_for_free_cpus() -> None:
    """Until the cluster has taken back what workers held."""
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources().get("CPU", 0) == ray.cluster_resources()["CPU"]
