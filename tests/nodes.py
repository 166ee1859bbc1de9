"""A Ray cluster of several raylets on this machine, each with its own resources, guarded by a token."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
START_S = 300
MARK = "MPSCL_RAY_TEST_NODE"
RAY = """
from ray.scripts.scripts import main
from mpscl_ray.distributed.ray_session import _patched_start

with _patched_start(monitors=True):
    main()
"""
"""The command ``ray``, which waits longer for a node to start on a busy machine."""


class Node:
    """The processes of one ``ray start``.

    Args:
        address: its own, on loopback.
        environment: of the processes.
        words: of ``ray start``.
        hide: folder in whose place the node sees an empty one, as where a shared one is not mounted.
    """

    def __init__(self, address: str, environment: dict[str, str], words: list[str], hide: Path | None = None) -> None:
        self.address = address
        command = [sys.executable, "-c", RAY, "start", *words, "--block", "--disable-usage-stats"]
        if hide is not None:
            script = 'mount -t tmpfs none "$0" && exec "$@"'
            command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(hide), *command]
        self.mark = secrets.token_hex(8)
        with Path(environment["NODE_LOG"]).open("a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command,
                env=environment | {MARK: self.mark},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        """SIGKILL to raylet, agents and workers alike, as when the power goes."""
        while pids := [pid for pid in _marked(self.mark) if pid != self.process.pid or self.process.poll() is None]:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        self.process.wait()


def _marked(mark: str) -> list[int]:
    """Processes that were started with a mark in their environment, the oldest first."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in environment.read_bytes():
                found.append(int(environment.parent.name))
    return sorted(found)


class Cluster:
    """A head, and nodes that come and go."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="c", dir="/tmp"))
        token = self.folder / "token"
        token.write_text(secrets.token_hex(32))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_ADDRESS": self.address,
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "NODE_LOG": str(self.folder / "nodes.log"),
        }
        self.nodes: list[Node] = []
        port = self.address.partition(":")[2]
        head = self._start(["--head", "--port", port, "--include-dashboard", "false", "--temp-dir", str(self.folder)])
        self._wait(lambda: head.address in self.alive())

    def add(self, hide: Path | None = None) -> Node:
        """One more node, which has joined when this returns."""
        node = self._start(["--address", self.address], hide)
        self._wait(lambda: node.address in self.alive())
        return node

    def lose(self, node: Node) -> None:
        """Kill a node, and wait until the head has noticed."""
        node.kill()
        self._wait(lambda: node.address not in self.alive())

    def announce_preemption(self, node: Node, seconds: int) -> None:
        """Tell Ray, as a cloud provider's notice does, that a node will be taken away in so many seconds."""
        nodes = "import ray; ray.init(logging_level=50); print(*(n['NodeName'] + n['NodeID'] for n in ray.nodes()))"
        listed = self._run([sys.executable, "-c", nodes]).stdout.split()
        (node_id,) = (name.removeprefix(node.address) for name in listed if name.startswith(node.address))
        done = self._run(
            [
                str(Path(sys.executable).with_name("ray")),
                "drain-node",
                f"--address={self.address}",
                f"--node-id={node_id}",
                "--reason=DRAIN_NODE_REASON_PREEMPTION",
                "--reason-message=spot",
                f"--deadline-remaining-seconds={seconds}",
            ]
        )
        assert done.returncode == 0, done.stderr

    def _start(self, words: list[str], hide: Path | None = None) -> Node:
        # Ports are drawn: the default ranges of two nodes of one machine would be the same.
        address = f"127.0.0.{len(self.nodes) + 1}"
        words += [
            "--node-ip-address",
            address,
            "--node-name",
            address,
            "--num-cpus",
            "1",
            "--object-store-memory",
            str(150 * 2**20),
        ]
        words += ["--min-worker-port", "0", "--max-worker-port", "0"]
        environment = {k: v for k, v in self.environment.items() if k != "RAY_ADDRESS"}
        self.nodes.append(Node(address, environment, words, hide))
        return self.nodes[-1]

    def alive(self) -> set[str]:
        """Addresses of the nodes that the head takes for alive."""
        script = "import ray; ray.init(logging_level=50); print(*(n['NodeName'] for n in ray.nodes() if n['Alive']))"
        done = self._run([sys.executable, "-c", script])
        return set(done.stdout.split()) if done.returncode == 0 else set()

    def _run(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=START_S)

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_S
        while not condition():
            assert time.monotonic() < deadline, (self.folder / "nodes.log").read_text(encoding="utf-8")
            time.sleep(0.5)

    def command(self, output: Path, *words: str) -> subprocess.Popen[bytes]:
        """A command of the package on the cluster, printing to a file."""
        with output.open("w", encoding="utf-8") as stream:
            return subprocess.Popen(
                [sys.executable, "-m", *words],
                env=self.environment,
                cwd=self.folder,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self) -> None:
        """End all nodes."""
        for node in reversed(self.nodes):
            node.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """A head with one CPU inside the block."""
    started = Cluster()
    try:
        yield started
    finally:
        started.stop()


def wait_for(process: subprocess.Popen[bytes], output: Path, seconds: float) -> int:
    """Exit code of a command."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"the command hangs; it printed:\n{output.read_text(encoding='utf-8')}")
