"""A server that speaks Google Cloud Storage (gcp-storage-emulator) on loopback, with the methods of tests.s3.Server."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpscl_ray.runs.gcs import GcsPath
from tests.s3 import START_S, Door

SCRIPT = """
import sys, time
from gcp_storage_emulator.server import create_server
create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
"""


class Server:
    """The server, its door and one bucket."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(port)],
            stdout=(folder / "gcs.log").open("w"),
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert self.process.poll() is None, (folder / "gcs.log").read_text(encoding="utf-8")
            assert time.monotonic() < deadline
            time.sleep(0.1)
        self.door = Door(port)

    def url(self, path: str, bucket: str = "bucket") -> str:
        """The URL of something on the server."""
        return f"gs://{bucket}/{path}?endpoint_override=http://127.0.0.1:{self.door.port}"

    def folder(self, path: str) -> GcsPath:
        """A folder in the bucket."""
        return GcsPath.parse(self.url(path))

    def stop(self) -> None:
        """End the server."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """A server inside the block, with this process's cache folder set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPSCL_RAY_CACHE", str(folder / "cache"))
        server = Server(folder)
        try:
            yield server
        finally:
            server.stop()
