"""A cluster of several nodes on this machine for tests and benchmarks, by the script that users get for it."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "cluster" / "local" / "cluster.sh"
RUNTIME_ENV = ROOT / "cluster" / "runtime_env.yaml"
PATIENCE_S = 600
"""For whatever has to come; a machine may be slow."""


def free_base() -> int:
    """A port that is free, with those above it that a cluster takes."""
    bases = list(range(12000, 30000, 2000))
    random.shuffle(bases)  # Others may look for ports at the same time.
    for base in bases:
        wanted = [base, base + 1, *(base + 10 * node + part for node in (1, 2, 3) for part in range(6))]
        try:
            for port in wanted:
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("", port))
        except OSError:
            continue
        return base
    raise RuntimeError("no free ports")


class LocalCluster:
    """Nodes with their own ports, folder and token; stopped, with all they started, at the end of the block.

    Args:
        nodes: how many.
        cpus: of each.
        installed: whether the package is on all nodes, so that jobs need not bring it.
    """

    def __init__(self, nodes: int = 1, *, cpus: int = 1, installed: bool = False) -> None:
        self.nodes, self.base = nodes, free_base()
        self.folder = Path(tempfile.mkdtemp(prefix="c", dir="/tmp"))
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MPSCL_CLUSTER", "PYTHONPATH"))}
        self._environment = (
            inherited
            | {
                "MPSCL_CLUSTER_DIR": str(self.folder),
                "MPSCL_CLUSTER_PORT": str(self.base),
                "MPSCL_CLUSTER_CPUS": str(cpus),
                "OMP_NUM_THREADS": "1",
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                # What else runs on this machine may need memory; it is not these processes that should end then.
                "RAY_memory_monitor_refresh_ms": "0",
                # By default 15: beside other programs workers would hardly start.
                "RAY_worker_niceness": "0",
            }
            | ({"PYTHONPATH": str(ROOT)} if installed else {})
        )

    def __enter__(self) -> Self:
        try:
            self.script("up", str(self.nodes))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.script("down")
        shutil.rmtree(self.folder, ignore_errors=True)

    def processes(self, node: int) -> list[str]:
        """Titles of all processes of a node."""
        mark, found = f"MPSCL_CLUSTER_NODE={self.folder}/{node}".encode(), []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # ended meanwhile
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    found.append((process / "cmdline").read_text(encoding="utf-8").replace("\0", " ").strip())
        return found

    @property
    def address(self) -> str:
        """Where commands join it."""
        return f"127.0.0.1:{self.base}"

    @property
    def dashboard(self) -> str:
        """Base of its URLs."""
        return f"http://127.0.0.1:{self.base + 1}"

    @property
    def token(self) -> str:
        """What guards it."""
        return (self.folder / "token").read_text(encoding="utf-8").strip()

    def metrics_port(self, node: int) -> int:
        """Where a node shows its metrics."""
        return self.base + 10 * (node + 1) + 3

    def script(self, *words: str) -> str:
        """Run the script; returns what it printed."""
        done = subprocess.run(
            [str(SCRIPT), *words],
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a command that talks to it, as the script's ``env`` sets it."""
        exports = dict(re.findall(r"(\w+)=(\S+)", self.script("env")))
        return {k: v for k, v in self._environment.items() if not k.startswith("MPSCL_CLUSTER")} | exports

    def command(self, *words: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command with its output in one string."""
        return subprocess.run(
            words,
            env=self.environment | variables,
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE_S,
        )

    def submit(self, name: str, *command: str, cwd: Path = ROOT, wait: bool = True) -> subprocess.CompletedProcess[str]:
        """``ray job submit`` of a command with the working directory and the runtime_env that users are told to use."""
        options = ["--submission-id", name, "--working-dir", ".", "--runtime-env", str(RUNTIME_ENV)]
        return self.command("ray", "job", "submit", *options, *([] if wait else ["--no-wait"]), "--", *command, cwd=cwd)

    def get(self, path: str, token: str | None = None) -> tuple[int, Any]:
        """Status and JSON of a request to the dashboard."""
        request = urllib.request.Request(f"{self.dashboard}{path}")
        if token is not None:
            request.add_header("Authorization", f"Bearer {token}")
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, None

    def job(self, name: str) -> dict[str, Any]:
        """What the cluster says of a job."""
        status, content = self.get(f"/api/jobs/{name}", self.token)
        assert status == 200
        return dict(content)

    def logs(self, name: str) -> str:
        """What a job has printed."""
        _, content = self.get(f"/api/jobs/{name}/logs", self.token)
        return str(content["logs"])


def wait_until(there: Callable[[], Any], what: str, seconds: float = PATIENCE_S) -> Any:
    """Ask until the answer is true, and return it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = there()
        if answer:
            return answer
        time.sleep(0.2)
    raise AssertionError(f"{what} did not come within {seconds:g} s")
