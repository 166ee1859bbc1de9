"""Folders ``gs://bucket/folder`` of Google Cloud Storage, with the methods of :class:`~mpscl_ray.runs.storage.S3Path`.

The server is Google's, or the one that ``?endpoint_override=http://host:port`` or ``STORAGE_EMULATOR_HOST`` names;
one that is reached by http is asked without credentials. Others come from where Google's tools look for them
(``GOOGLE_APPLICATION_CREDENTIALS``, the account of the machine), on every node.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal
from urllib.parse import parse_qsl

from mpscl_ray.runs.storage import S3Path, T

if TYPE_CHECKING:
    from pyarrow import NativeFile, fs

_RETRY_S = 10
"""Seconds for which the library itself repeats a request that was not answered."""


@dataclass(frozen=True)
class GcsPath(S3Path):
    """A folder or an object of a bucket."""

    SCHEME: ClassVar[str] = "gs"
    OPTIONS: ClassVar[tuple[str, ...]] = ("endpoint_override",)
    CREDENTIALS: ClassVar[str] = "a file that GOOGLE_APPLICATION_CREDENTIALS names"
    ENDPOINT: ClassVar[str] = "STORAGE_EMULATOR_HOST"
    _REFUSALS: ClassVar[tuple[str, ...]] = ("UNAUTHENTICATED", "PERMISSION_DENIED")
    _SILENCE: ClassVar[tuple[str, ...]] = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "Retry policy exhausted")

    @property
    def server(self) -> str:
        return _endpoint(self.query) or "Google Cloud Storage"

    @property
    def filesystem(self) -> fs.GcsFileSystem:
        return _filesystem(_endpoint(self.query))

    def _read_one_version(self, read: Callable[[NativeFile], T]) -> T:
        # One request, so one version. A random-access file asks the server while it holds Python's lock: a server that
        # does not answer would stop all threads.
        with self._errors("read"), self.filesystem.open_input_stream(self.key, compression=None) as stream:
            return read(stream)

    def folders(self) -> list[str]:
        # Of folders pyarrow lists those only that an object stands for.
        return sorted({name.partition("/")[0] for name in self.files() if "/" in name})

    def delete_folder(self) -> None:
        # delete_dir also deletes an object that stands for the folder, and fails where there is none.
        with self._errors("delete"):
            self.filesystem.delete_dir_contents(self.key, missing_dir_ok=True)

    @contextmanager
    def _errors(self, action: Literal["read", "write", "delete", "list"]) -> Iterator[None]:
        try:
            with super()._errors(action):
                yield
        except FileNotFoundError:
            if action == "write":
                self.require_bucket()
            raise


def _endpoint(query: str) -> str:
    return dict(parse_qsl(query)).get("endpoint_override") or os.environ.get("STORAGE_EMULATOR_HOST") or ""


@lru_cache(maxsize=8)
def _filesystem(endpoint: str) -> fs.GcsFileSystem:
    from pyarrow import fs

    scheme, _, host = endpoint.rpartition("://")
    return fs.GcsFileSystem(
        anonymous=scheme == "http",
        scheme=scheme or "https",
        endpoint_override=host or None,
        retry_time_limit=timedelta(seconds=_RETRY_S),
    )
