"""Files that survive a kill, a crash and a full disk: written aside, synced, renamed; failures in one sentence."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mpscl_ray.errors import StorageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_NOT_A_FOLDER = (errno.ENOTDIR, errno.EEXIST)


def megabytes(size: int) -> str:
    """A number of bytes, rounded and exact: ``520.1 MB (520100000 bytes)``."""
    return f"{size / 1e6:.1f} MB ({size} bytes)"


def free_bytes(folder: Path) -> int | None:
    """Bytes that may still be written to the file system of an existing folder; None where it reports none."""
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total > 0 else None


def disk_full(path: Path, needed: int | None, free: int | None) -> StorageError:
    """The error of a disk, a quota or a file-size limit that leaves no room for ``path``."""
    numbers = [
        f"{word} {megabytes(value)}" for word, value in (("needed", needed), ("free", free)) if value is not None
    ]
    return StorageError(
        f"cannot write {path}: no space left{': ' if numbers else ''}{', '.join(numbers)}; "
        f"free some space or choose another folder, then give the same command again to resume"
    )


@contextmanager
def storage_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn any OSError inside the block, which writes ``path``, into a :class:`StorageError`.

    The message of a full disk says how many bytes were ``needed``.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            existing = next((folder for folder in path.absolute().parents if folder.is_dir()), Path("/"))
            raise disk_full(path, needed, free_bytes(existing)) from error
        if error.errno in _REFUSED:
            raise StorageError(
                f"cannot write {path}: {error.strerror} ({error.filename or path}); "
                f"give yourself write permission there or choose another folder"
            ) from error
        if error.errno in _NOT_A_FOLDER:
            raise StorageError(
                f"cannot write {path}: {error.filename or path} is a file where a folder is needed; "
                f"move it away or choose another folder"
            ) from error
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def fsync_directory(folder: Path) -> None:
    """Make the names in a folder durable (a file's own fsync does not cover its name)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no fsync of folders: there a rename is durable when it returns, or never.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def partial_path(path: Path) -> Path:
    """Where this process writes a file or a folder that gets the name ``path`` when it is complete."""
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to. That file replaces ``path`` when the block ends, and is removed where the block raises."""
    partial = partial_path(path)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, data: bytes, *, private: bool = False) -> None:
    """Replace a file as a whole: a reader, or a restart after a crash, finds the old contents or the new.

    Args:
        path: The file.
        data: Its contents.
        private: Whether its owner alone may read it.

    Raises:
        StorageError: The file cannot be written; the old one is intact.
    """
    with storage_errors(path, len(data)):
        with replacing(path) as partial, open(partial, "wb") as file:
            if private:
                os.fchmod(file.fileno(), 0o600)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fsync_directory(path.parent)
