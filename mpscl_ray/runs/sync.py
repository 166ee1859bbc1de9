"""Keeping a local folder and a folder of a bucket in step while a run trains.

A thread uploads files that change, and downloads those that other processes change. Files come first, then checkpoints
in the order in which they were written. A checkpoint is complete when its SHA256SUMS is there, which is uploaded last
and deleted first. So after a kill the bucket has every record of metrics up to its newest complete checkpoint.

A storage that does not answer stops no training: uploads are retried, with longer and longer waits, and only after
``patience_s`` is :attr:`Synchronizer.error` set.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from mpscl_ray.errors import StorageError
from mpscl_ray.runs.atomic_files import partial_path
from mpscl_ray.runs.checkpoint_files import LARGEST_SUMS, SUMS, files
from mpscl_ray.runs.storage import S3Path

INTERVAL_S = 2.0
"""Time between two rounds."""
LARGE_BYTES = 1 << 20
"""Larger files are uploaded once in LARGE_INTERVAL_S while they grow."""
LARGE_INTERVAL_S = 60.0
_MAX_INTERVAL_S = 30.0

_Signature = tuple[int, ...]


class Synchronizer:
    """Uploads and downloads in the background.

    Args:
        local: folder here.
        remote: folder in the bucket.
        outgoing: patterns of files and folders in the local one that are uploaded when they change and deleted
            there when they are deleted here.
        incoming: files of other processes, which are downloaded when they change.
        check: called before each round; an error other than StorageError ends the synchronization.
        patience_s: how long the storage may fail to answer.
        warn: called with a sentence once when it does not answer, and once when it does again.
    """

    def __init__(
        self,
        local: Path,
        remote: S3Path,
        *,
        outgoing: Sequence[str],
        incoming: Sequence[str],
        check: Callable[[], None],
        patience_s: float,
        warn: Callable[[str], None],
    ) -> None:
        self.local, self.remote = local, remote
        self.error: Exception | None = None
        """Why nothing is uploaded any more."""
        self._outgoing, self._incoming, self._check = outgoing, incoming, check
        self._patience_s, self._warn = patience_s, warn
        self._sent: dict[str, _Signature] = {}
        self._sent_at: dict[str, float] = {}
        self._received: dict[str, tuple[int, int]] = {}
        self._changed = threading.Condition()
        self._wanted = self._done = 0
        self._failing_since: float | None = None
        self._close_by: float | None = None
        self._thread = threading.Thread(target=self._run, name=f"synchronizer of {remote.name}", daemon=True)

    def mark_synced(self) -> None:
        """Treat the local files as uploaded: they have just been downloaded."""
        self._sent = dict(self._here())

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def flush(self) -> bool:
        """Wait until all local files are uploaded; False at once where the storage fails."""
        with self._changed:
            self._wanted += 1
            wanted = self._wanted
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._done >= wanted or self._failing_since or self.error)
            return self._done >= wanted

    def close(self) -> None:
        """Upload the rest for at most ``patience_s``, and end; raises :attr:`error` if there is one."""
        with self._changed:
            self._close_by = time.monotonic() + self._patience_s
            self._changed.notify_all()
        self._thread.join()
        if self.error is not None:
            raise self.error

    # ---- the thread ----

    def _run(self) -> None:
        wait = INTERVAL_S
        while True:
            with self._changed:
                self._changed.wait_for(self._wake_up, wait)
                wanted, closing = self._wanted, self._close_by is not None
            try:
                self._round(everything=closing or wanted > self._done)
            except StorageError as error:
                wait = min(2 * wait, _MAX_INTERVAL_S) if self._failing_since else INTERVAL_S / 2
                if self._failed(error):
                    return
            except Exception as error:  # noqa: BLE001 - a training that waits for this thread must see it
                self._give_up(error)
                return
            else:
                wait = INTERVAL_S
                self._succeeded(wanted)
                if closing:
                    return

    def _wake_up(self) -> bool:
        """Whether the next round must start now; never while the storage fails."""
        return not self._failing_since and (self._close_by is not None or self._wanted > self._done)

    def _failed(self, error: StorageError) -> bool:
        """Record a failure; True where it has lasted longer than patience."""
        first = self._failing_since is None
        if self._failing_since is None:
            self._failing_since = time.monotonic()
        with self._changed:
            self._changed.notify_all()
        if first:
            self._warn(
                f"{error}; meanwhile the run continues, its files stay on this node, and uploads are retried for "
                f"{self._patience_s / 60:g} min"
            )
        since = time.monotonic() - self._failing_since
        if since < self._patience_s and (self._close_by is None or time.monotonic() < self._close_by):
            return False
        self._give_up(StorageError(f"the storage of the run has failed for {since / 60:.1f} min: {error}"))
        return True

    def _succeeded(self, wanted: int) -> None:
        if self._failing_since is not None:
            seconds = time.monotonic() - self._failing_since
            self._warn(f"{self.remote.server} answers again after {seconds:.0f} s, and all of the run is uploaded")
        with self._changed:
            self._failing_since = None
            self._done = wanted
            self._changed.notify_all()

    def _give_up(self, error: Exception) -> None:
        with self._changed:
            self.error = error
            self._changed.notify_all()

    def _round(self, everything: bool) -> None:
        self._check()
        for name in self._incoming:
            self._download(name)
        here = dict(self._here())
        now = time.monotonic()
        for name in sorted(self._sent.keys() - here.keys()):
            delete_path(self.remote / name)
            del self._sent[name]
        for name, signature in here.items():
            if self._sent.get(name) == signature:
                continue
            large = len(signature) == _FILE and signature[0] > LARGE_BYTES
            if large and not everything and now - self._sent_at.get(name, 0.0) < LARGE_INTERVAL_S:
                continue
            if upload_path(self.local / name, self.remote / name):
                self._sent[name], self._sent_at[name] = signature, now

    def _download(self, name: str) -> None:
        remote = self.remote / name
        stamp = remote.version_stamp()
        if stamp is None:
            if self._received.pop(name, None):
                (self.local / name).unlink(missing_ok=True)
        elif self._received.get(name) != stamp:
            try:
                remote.download(self.local / name)
            except FileNotFoundError:
                return
            self._received[name] = stamp

    def _outgoing_paths(self) -> Iterator[Path]:
        for pattern in self._outgoing:
            for path in self.local.glob(pattern):
                yield from _walk(path)

    def _here(self) -> Iterator[tuple[str, _Signature]]:
        """Paths to upload, each with a signature that changes with it: files first, then checkpoints, oldest first."""
        checkpoints: list[tuple[int, str, _Signature]] = []
        for path in self._outgoing_paths():
            try:
                relative = str(path.relative_to(self.local))
                if path.is_dir():
                    about = (path / SUMS).stat()
                    checkpoints.append(
                        (about.st_mtime_ns, relative, (about.st_mtime_ns, about.st_ino, path.stat().st_ino))
                    )
                else:
                    about = path.stat()
                    yield relative, (about.st_size, about.st_mtime_ns)
            except FileNotFoundError:
                continue
        for _, relative, signature in sorted(checkpoints):
            yield relative, signature


_FILE = 2
"""Length of the signature of a file; that of a checkpoint is longer."""


def _walk(path: Path) -> Iterator[Path]:
    """The path itself or the files and checkpoints below it, without partial ones, whose names start with a dot."""
    if path.name.startswith("."):
        return
    if not path.is_dir() or (path / SUMS).exists():
        if path.exists():
            yield path
        return
    for inner in sorted(path.iterdir()):
        yield from _walk(inner)


def upload_path(path: Path, remote: S3Path) -> bool:
    """Upload a file or a checkpoint; False where it was deleted or replaced meanwhile.

    Raises:
        StorageError: the upload failed; the checkpoint in the bucket is missing or recognisably incomplete.
    """
    with ExitStack() as stack:
        try:
            if not path.is_dir():
                remote.upload(stack.enter_context(path.open("rb")))
                return True
            before = path.stat().st_ino
            names = [*files((path / SUMS).read_bytes()), SUMS]
            opened = {name: stack.enter_context((path / name).open("rb")) for name in names}
            if path.stat().st_ino != before:
                return False
        except FileNotFoundError:
            return False
        # From here on the open files are those of one checkpoint, even if the folder is renamed or replaced.
        (remote / SUMS).delete()
        for name, file in opened.items():
            (remote / name).upload(file)
    return True


def delete_path(remote: S3Path) -> None:
    """Delete an object, or a checkpoint with its SHA256SUMS first."""
    names = remote.files()
    if names:
        (remote / SUMS).delete()
        remote.delete_folder()
    else:
        remote.delete()


def download_checkpoint(remote: S3Path, target: Path) -> bool:
    """Download a checkpoint, unless the same one is here; False where there is no complete one. Verifies no hash."""
    try:
        sums = (remote / SUMS).read_bytes(LARGEST_SUMS)
        if (target / SUMS).is_file() and (target / SUMS).read_bytes() == sums:
            return True
        partial = partial_path(target)
        shutil.rmtree(partial, ignore_errors=True)
        for name in files(sums):
            (remote / name).download(partial / name)
        (partial / SUMS).write_bytes(sums)
    except FileNotFoundError:
        return False
    shutil.rmtree(target, ignore_errors=True)
    os.rename(partial, target)
    return True
