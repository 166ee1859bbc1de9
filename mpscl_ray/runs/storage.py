"""Folders by URL: objects of an S3-compatible storage, read and written through pyarrow.

A location is a local path or ``s3://bucket/folder``; :func:`parse_location` says which. The server is the one that
``?endpoint_override=host:port`` or ``AWS_ENDPOINT_URL`` names, else AWS. Credentials come from where AWS tools look for
them (``AWS_ACCESS_KEY_ID`` and ``AWS_SECRET_ACCESS_KEY``, a profile, the role of the machine), on every node, and never
from the URL, because URLs are kept in the files of a run.

pyarrow is imported only where a server is asked: most commands need to know only whether a location is a URL.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, ClassVar, Literal, TypeVar
from urllib.parse import parse_qsl, urlsplit

from mpscl_ray.errors import ConfigError, DataError, StorageError
from mpscl_ray.runs.atomic_files import replacing, storage_errors

if TYPE_CHECKING:
    from pyarrow import NativeFile, fs

log = logging.getLogger(__name__)
T = TypeVar("T")

_CHUNK = 1 << 23
_CONNECT_S = 5.0
_SILENCE_S = 20.0
"""Longest silence of a server in the middle of a request."""
_ATTEMPTS = 2
_VERSIONS = 20
"""How often an object may be replaced while it is read."""
_RETRY_S = 2.0


def is_url(location: object) -> bool:
    """Whether a location is a URL, also one that lost a slash in a :class:`pathlib.Path`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(location)) is not None


def parse_location(location: str | Path | S3Path) -> Path | S3Path:
    """A location as a local path or a path in a bucket. Raises ConfigError for a URL that cannot be used."""
    if isinstance(location, S3Path):
        return location
    if not isinstance(location, str | os.PathLike):
        raise ConfigError(f"{location!r} was given for a name, path or URL; expected text")
    if not is_url(location):
        return Path(location)
    if str(location).startswith("gs:"):
        from mpscl_ray.runs.gcs import GcsPath  # which derives from S3Path

        return GcsPath.parse(str(location))
    return S3Path.parse(str(location))


def join_location(location: str | Path | S3Path, *names: str) -> Path | S3Path:
    """A folder or file below a location."""
    found = parse_location(location)
    for name in names:
        found = found / name
    return found


def read_limited(file: Path | S3Path, max_bytes: int) -> bytes:
    """Contents of a file or an object that anyone may have written. Raises OSError; ValueError where it is larger."""
    size = 0
    if isinstance(file, S3Path):
        content = file.read_bytes(max_bytes + 1)
    else:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size  # before read, which takes memory for all that it is asked for
            content = stream.read(size + 1) if size <= max_bytes else b""
    if max(size, len(content)) > max_bytes:
        raise ValueError(f"it is larger than {max_bytes} bytes")
    return content


def delete_file(file: Path | S3Path) -> None:
    """Remove a file or an object, if there is one. Raises StorageError."""
    if isinstance(file, S3Path):
        file.delete()
    else:
        with storage_errors(file):
            file.unlink(missing_ok=True)


def retry(action: Callable[[], None], patience_s: float) -> None:
    """Repeat an action while the storage does not answer, for at most ``patience_s``. Raises the last StorageError."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return action()
        except StorageError as error:
            if time.monotonic() > deadline:
                raise
            log.warning("%s; tried again", error)
            time.sleep(_RETRY_S)


@dataclass(frozen=True)
class S3Path:
    """A folder or an object of a bucket, of S3 or a kind that derives from it. Making one accesses nothing; each method
    asks the server.

    All methods raise StorageError, with the URL and what to do, where the server refuses or does not answer.
    """

    SCHEME: ClassVar[str] = "s3"
    OPTIONS: ClassVar[tuple[str, ...]] = ("endpoint_override", "region", "scheme")
    """What may be behind the question mark."""
    CREDENTIALS: ClassVar[str] = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    """Where they may be given, for messages."""
    ENDPOINT: ClassVar[str] = "AWS_ENDPOINT_URL"
    """Variable that names the server."""
    _REFUSALS: ClassVar[tuple[str, ...]] = (
        *("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "EXPIRED_TOKEN", "INVALID_CLIENT"),
    )
    _SILENCE: ClassVar[tuple[str, ...]] = ("NETWORK_CONNECTION", "curlCode")

    key: str
    """``bucket/folder/name``"""
    query: str = ""
    """Options behind the question mark."""

    @classmethod
    def parse(cls, url: str) -> S3Path:
        """Parse a URL. Raises ConfigError where it cannot be used; the message leaves out what may be a secret."""
        parts = urlsplit(re.sub(r"^(\w+):/(?!/)", r"\1://", url))
        if parts.scheme != cls.SCHEME:
            raise ConfigError(
                f"{parts.scheme}:// is not a storage that can be used directly, expected s3://BUCKET/FOLDER, "
                "gs://BUCKET/FOLDER or a folder on a file system that all nodes share; mount it there"
            )
        given = parse_qsl(parts.query, keep_blank_values=True)
        unknown = sorted({name for name, _ in given} - set(cls.OPTIONS))
        if "@" in parts.netloc or unknown:
            what = f"the option {unknown[0]}" if unknown else "a key in front of the bucket"
            raise ConfigError(
                f"a URL of a bucket has {what}, expected {cls.SCHEME}://BUCKET/FOLDER with at most the options "
                f"{', '.join(cls.OPTIONS)}; give credentials in {cls.CREDENTIALS}"
            )
        if not parts.netloc:
            raise ConfigError(f"{url} names no bucket, expected {cls.SCHEME}://BUCKET/FOLDER")
        names = [parts.netloc, *(name for name in parts.path.split("/") if name)]
        return cls("/".join(names), parts.query)

    def __str__(self) -> str:
        """The URL."""
        return f"{self.SCHEME}://{self.key}" + (f"?{self.query}" if self.query else "")

    def __truediv__(self, name: str | Path) -> S3Path:
        """The folder or object below this one."""
        return replace(self, key=f"{self.key}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> S3Path:
        """The folder around this one."""
        return replace(self, key=self.key.rpartition("/")[0])

    @property
    def server(self) -> str:
        """Name of the server, for messages."""
        return _endpoint(self.query) or "AWS"

    def read_bytes(self, at_most: int | None = None) -> bytes:
        """Contents of the object, or its first bytes. Raises FileNotFoundError where there is none."""
        return self._read_one_version(lambda stream: bytes(stream.read(at_most)))

    def write_bytes(self, data: bytes) -> None:
        """Make or replace the object."""
        with self._errors("write"), self._open_output() as stream:
            stream.write(data)

    def download(self, target: Path) -> None:
        """Copy the object into a file, which appears when it is whole. Raises FileNotFoundError where there is none."""
        with storage_errors(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as partial:

            def copy(stream: NativeFile) -> None:
                with storage_errors(target):
                    file = partial.open("wb")
                with file:
                    while data := stream.read(_CHUNK):
                        with storage_errors(target):
                            file.write(data)
                            file.flush()

            self._read_one_version(copy)

    def upload(self, source: IO[bytes]) -> None:
        """Make or replace the object with the rest of an open file."""
        with self._errors("write"), self._open_output() as stream:
            while data := source.read(_CHUNK):
                stream.write(data)

    def delete(self) -> None:
        """Remove the object, if there is one."""
        with suppress(FileNotFoundError), self._errors("delete"):
            self.filesystem.delete_file(self.key)

    def delete_folder(self) -> None:
        """Remove all objects below, if there are any."""
        with suppress(FileNotFoundError), self._errors("delete"):
            self.filesystem.delete_dir(self.key)

    def version_stamp(self) -> tuple[int, int] | None:
        """Size and time of the object, which differ when it was replaced; None where there is none."""
        info = self._info()
        return (info.size, info.mtime_ns) if info.is_file else None

    def exists(self) -> bool:
        """Whether there is such an object or folder."""
        from pyarrow import fs

        return bool(self._info().type != fs.FileType.NotFound)

    def require_bucket(self) -> None:
        """Raises StorageError where there is no such bucket, which looks like an empty folder otherwise."""
        bucket = replace(self, key=self.key.partition("/")[0])
        if not bucket.exists():
            raise StorageError(f"cannot read {self}: {self._reason('NO_SUCH_BUCKET', 'read')}")

    def files(self) -> list[str]:
        """Names, relative to this folder, of all objects below it."""
        return self._list("File", recursive=True)

    def folders(self) -> list[str]:
        """Names of the folders directly below this one."""
        return self._list("Directory", recursive=False)

    def _list(self, kind: Literal["File", "Directory"], recursive: bool) -> list[str]:
        from pyarrow import fs

        with self._errors("list"):
            found = self.filesystem.get_file_info(fs.FileSelector(self.key, recursive=recursive, allow_not_found=True))
        return sorted(info.path.removeprefix(f"{self.key}/") for info in found if info.type == fs.FileType[kind])

    def _info(self) -> fs.FileInfo:
        with self._errors("read"):
            (info,) = self.filesystem.get_file_info([self.key])
        return info

    def _read_one_version(self, read: Callable[[NativeFile], T]) -> T:
        """Read again where the object was replaced meanwhile.

        pyarrow asks for its size first, then for its bytes, which may be the first ones of a newer version.
        """
        with self._errors("read"):
            for _ in range(_VERSIONS):
                with self.filesystem.open_input_file(self.key) as stream:
                    version = stream.metadata().get("ETag")
                    found = read(stream)
                with self.filesystem.open_input_file(self.key) as stream:
                    if stream.metadata().get("ETag") == version:
                        return found
        raise StorageError(f"cannot read {self}: it was replaced {_VERSIONS} times meanwhile; see what writes it")

    def _open_output(self) -> NativeFile:
        # By default pyarrow compresses what is written to a name that ends in .gz; the contents are compressed already.
        return self.filesystem.open_output_stream(self.key, compression=None)

    @property
    def filesystem(self) -> fs.FileSystem:
        """The server, on which the path is :attr:`key`."""
        return _filesystem(self.query, _endpoint(self.query))

    @contextmanager
    def _errors(self, action: Literal["read", "write", "delete", "list"]) -> Iterator[None]:
        from pyarrow import ArrowException

        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, ArrowException) as error:
            raise StorageError(f"cannot {action} {self}: {self._reason(str(error), action)}") from error

    def _reason(self, message: str, action: str) -> str:
        bucket = self.key.partition("/")[0]
        if "NO_SUCH_BUCKET" in message:
            return f"there is no bucket {bucket} at {self.server}; make it, or correct the URL"
        code = next((code for code in self._REFUSALS if code in message), None)
        if code:
            return (
                f"{self.server} refuses ({code}); give credentials that may {action} in the bucket {bucket} in "
                f"{self.CREDENTIALS}, or a profile, on every node"
            )
        if any(word in message for word in self._SILENCE):
            return (
                f"no answer from {self.server}; check that it runs and that endpoint_override in the URL or "
                f"{self.ENDPOINT} names it, then give the same command again"
            )
        code_found = re.search(r"AWS Error (\w+)", message)
        detail = code_found.group(1) if code_found else " ".join(message.split())[:200]
        return f"{self.server} answers {detail}; check the URL and the server, then give the same command again"


def cache_folder() -> Path:
    """Folder of this node for copies of objects in buckets: ``MPSCL_RAY_CACHE``, else ``~/.cache/mpscl_ray``."""
    given = os.environ.get("MPSCL_RAY_CACHE")
    folder = Path(given or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mpscl_ray")
    with storage_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # It may hold images of patients.
    return folder


@contextmanager
def output_directory(location: Path | S3Path) -> Iterator[Path]:
    """A directory to write in: a local location itself, made if need be; for a bucket a temporary one, whose files are
    uploaded in the order in which they were written when the block ends without an error.

    Raises:
        StorageError: it cannot be written.
    """
    if isinstance(location, Path):
        with storage_errors(location):
            location.mkdir(parents=True, exist_ok=True)
        yield location
        return
    with tempfile.TemporaryDirectory(prefix=f"{location.name}-", dir=cache_folder()) as temporary:
        yield Path(temporary)
        files = [path for path in sorted(Path(temporary).rglob("*")) if path.is_file()]
        for file in sorted(files, key=lambda path: path.stat().st_mtime_ns):
            with file.open("rb") as stream:
                (location / file.relative_to(temporary)).upload(stream)


def cached_file(remote: S3Path, sha256: str, size: int) -> Path:
    """A local copy of an immutable object, downloaded once on each node and checked against its hash.

    Raises:
        FileNotFoundError: there is no such object.
        DataError: its contents are not those of the hash.
    """
    path = cache_folder() / "cases" / sha256[:2] / f"{sha256}{Path(remote.name).suffix}"
    if path.is_file() and path.stat().st_size == size:
        return path
    with replacing(path) as partial:
        remote.download(partial)
        with partial.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise DataError(
                f"{remote}: damaged or replaced: its SHA-256 is not the manifest's; prepare the dataset again"
            )
    return path


def _endpoint(query: str) -> str:
    options = dict(parse_qsl(query))
    return (
        options.get("endpoint_override")
        or os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL")
        or ""
    )


@lru_cache(maxsize=8)
def _filesystem(query: str, endpoint: str) -> fs.S3FileSystem:
    from pyarrow import fs

    options = dict(parse_qsl(query))
    scheme, separator, host = endpoint.rpartition("://")
    return fs.S3FileSystem(
        endpoint_override=host or None,
        scheme=options.get("scheme") or (scheme if separator else "https"),
        region=options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
        connect_timeout=_CONNECT_S,
        request_timeout=_SILENCE_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
    )
