"""Locks of a run directory: one command and one worker 0 at a time. The system frees those of a process that ends."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mpscl_ray.errors import ClusterError, ConfigError, StorageError
from mpscl_ray.runs.atomic_files import storage_errors
from mpscl_ray.runs.environment import now

_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
_OLD_WORKER_S = 60.0
"""Longest time for a worker to end after the command that started it was killed."""


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a run directory for this command.

    Raises:
        ConfigError: another process of this host holds it; names its pid.
        StorageError: the lock file cannot be written.
    """
    file = folder / ".lock"
    with storage_errors(file):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _acquire(folder, descriptor)
        with storage_errors(file):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} {platform.node()} {now()}\n".encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _acquire(folder: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, *_NO_FLOCK):
            raise StorageError(f"cannot lock {folder / '.lock'}: {error.strerror}") from error
        supported = error.errno not in _NO_FLOCK
    pid, host, since = _owner(descriptor)
    # Some network file systems have no flock: there the pid in the file decides.
    if not supported and (host != platform.node() or not process_alive(pid)):
        return
    raise ConfigError(
        f"the run {folder.name} is in use by process {pid} on {host} since {since} ({folder}); wait for it, "
        f'stop it with "kill {pid}", or give this one another run.name'
    )


def _owner(descriptor: int) -> tuple[str, str, str]:
    """Pid, host and time that the file of a lock names; ``?`` where it names none."""
    pid, host, since = [*os.pread(descriptor, 1000, 0).decode("utf-8", "replace").split(), "?", "?", "?"][:3]
    return pid, host, since


def lock_owner(folder: Path) -> int | None:
    """Pid of the process that holds a run directory now; None when none does."""
    try:
        descriptor = os.open(folder / ".lock", os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        pid, host, _ = _owner(descriptor)
        # Processes of another host cannot be seen: there the lock has to do.
        return int(pid) if pid.isdigit() and (host != platform.node() or process_alive(pid)) else None
    else:
        return None
    finally:
        os.close(descriptor)


@contextmanager
def worker_lock(folder: Path) -> Iterator[None]:
    """Hold the right to write what worker 0 writes.

    The lock of a command that is killed is free at once, but on a cluster its workers live on for some seconds.

    Raises:
        ClusterError: another worker keeps holding it.
    """
    with (folder / ".worker-lock").open("a+", encoding="utf-8") as file:
        deadline = time.monotonic() + _OLD_WORKER_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise ClusterError(
                        f"a worker of an earlier start ({file.read().strip()}) still trains the run {folder}; end "
                        "it, or wait until the cluster has, and give the same command again"
                    ) from None
                time.sleep(0.5)
            except OSError:
                break  # Some network file systems have no locks.
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


def process_alive(pid: str) -> bool:
    """Whether a process of this host is running."""
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # It belongs to another user.
        pass
    return True
