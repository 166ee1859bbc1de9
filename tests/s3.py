"""An S3-speaking server (moto) on loopback, behind a door that can be shut."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pyarrow import fs

from mpscl_ray.runs.storage import S3Path

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "key-of-the-tests",
    "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
START_S = 60


class Door(threading.Thread):
    """Passes connections on to the server; shut, it refuses new ones and breaks those there are."""

    def __init__(self, server: int) -> None:
        super().__init__(daemon=True)
        self.server = server
        self.pairs: set[tuple[socket.socket, socket.socket]] = set()
        self.listener = self._listen(0)
        self.port = self.listener.getsockname()[1]
        self.start()

    @staticmethod
    def _listen(port: int) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(64)
        return listener

    def run(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
                server = socket.create_connection(("127.0.0.1", self.server))
            except OSError:
                time.sleep(0.02)
                continue
            self.pairs.add((client, server))
            threading.Thread(target=self._connect, args=(client, server), daemon=True).start()

    def _connect(self, client: socket.socket, server: socket.socket) -> None:
        answers = threading.Thread(target=self._pass, args=(server, client), daemon=True)
        answers.start()
        self._pass(client, server)
        answers.join()
        self._break(client, server)

    @staticmethod
    def _pass(one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                other.sendall(data)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _break(self, client: socket.socket, server: socket.socket) -> None:
        for end in (client, server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self.pairs.discard((client, server))

    @contextlib.contextmanager
    def shut(self) -> Iterator[None]:
        """Inside the block nobody gets through."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for pair in list(self.pairs):
            self._break(*pair)
        try:
            yield
        finally:
            self.listener = self._listen(self.port)


class Server:
    """The server, its door and one bucket."""

    def __init__(self, folder: Path, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            env=os.environ | environment,
            stdout=(folder / "moto.log").open("w"),
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert self.process.poll() is None, (folder / "moto.log").read_text(encoding="utf-8")
            assert time.monotonic() < deadline
            time.sleep(0.1)
        self.door = Door(port)
        fs.S3FileSystem(endpoint_override=f"127.0.0.1:{port}", scheme="http", allow_bucket_creation=True).create_dir(
            "bucket"
        )

    def url(self, path: str, bucket: str = "bucket") -> str:
        """The URL of something on the server."""
        return f"s3://{bucket}/{path}?endpoint_override=http://127.0.0.1:{self.door.port}"

    def folder(self, path: str) -> S3Path:
        """A folder in the bucket."""
        return S3Path.parse(self.url(path))

    def stop(self) -> None:
        """End the server."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def serve(folder: Path, **environment: str) -> Iterator[Server]:
    """A server inside the block, with this process's credentials and cache folder set for it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (CREDENTIALS | {"MPSCL_RAY_CACHE": str(folder / "cache")}).items():
            patch.setenv(name, value)
        server = Server(folder, **environment)
        try:
            yield server
        finally:
            server.stop()


def upload_folder(folder: Path, remote: S3Path) -> S3Path:
    """Copy all files of a folder into the bucket."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as stream:
                (remote / path.relative_to(folder)).upload(stream)
    return remote


PATIENCE_S = 120.0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.05)


def state(step: int, size: int = 1000) -> dict[str, object]:
    return {"step": step, "weights": torch.full((size,), float(step))}
