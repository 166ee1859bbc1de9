"""Keeping a local folder and a folder of a bucket alike while a run goes on.

A thread uploads what changes and downloads what it is told to watch. Files come first, then checkpoints in the order
in which they were written, each complete only when its SHA256SUMS is there, which is uploaded last and removed first:
whoever reads the bucket after a kill finds every record of metrics up to its newest complete checkpoint.

A storage that does not answer stops nobody: uploads are tried again, with longer and longer waits, and only after
``patience_s`` is it :attr:`Mirror.problem`.
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
from mpscl_ray.runs.checkpoint import STATE, SUMS, TENSORS
from mpscl_ray.runs.storage import Remote

EVERY_S = 2.0
"""Time between two looks for changes."""
LARGE_BYTES = 1 << 20
"""Files above are uploaded once in LARGE_EVERY_S while they grow."""
LARGE_EVERY_S = 60.0
_LONGEST_WAIT_S = 30.0

_Signature = tuple[int, ...]


class Mirror:
    """Uploads and downloads in the background.

    Args:
        local: folder here.
        remote: folder in the bucket.
        outgoing: patterns of files and folders in the local one that are uploaded when they change and deleted
            there when they vanish here.
        incoming: files that others write, which are downloaded when they change.
        check: called before each round; raises an error other than StorageError to end it all.
        patience_s: how long the storage may fail to answer.
        say: told once when it does not answer, and once when it does again.
    """

    def __init__(
        self,
        local: Path,
        remote: Remote,
        *,
        outgoing: Sequence[str],
        incoming: Sequence[str],
        check: Callable[[], None],
        patience_s: float,
        say: Callable[[str], None],
    ) -> None:
        self.local, self.remote = local, remote
        self.problem: Exception | None = None
        """Why nothing is uploaded any more."""
        self._outgoing, self._incoming, self._check = outgoing, incoming, check
        self._patience_s, self._say = patience_s, say
        self._sent: dict[str, _Signature] = {}
        self._sent_at: dict[str, float] = {}
        self._got: dict[str, tuple[int, int]] = {}
        self._changed = threading.Condition()
        self._wanted = self._done = 0
        self._failing_since: float | None = None
        self._close_by: float | None = None
        self._thread = threading.Thread(target=self._run, name=f"mirror of {remote.name}", daemon=True)

    def know(self) -> None:
        """Take what is here for what is there: it has just been downloaded."""
        self._sent = dict(self._here())

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def settle(self) -> bool:
        """Wait until all that is here now is there; False where the storage fails, for which nobody should wait."""
        with self._changed:
            self._wanted += 1
            wanted = self._wanted
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._done >= wanted or self._failing_since or self.problem)
            return self._done >= wanted

    def close(self) -> None:
        """Upload what is left, as long as patience allows, and end; raises :attr:`problem` if there is one."""
        with self._changed:
            self._close_by = time.monotonic() + self._patience_s
            self._changed.notify_all()
        self._thread.join()
        if self.problem is not None:
            raise self.problem

    # ---- the thread ----

    def _run(self) -> None:
        wait = EVERY_S
        while True:
            with self._changed:
                self._changed.wait_for(self._called, wait)
                wanted, closing = self._wanted, self._close_by is not None
            try:
                self._round(everything=closing or wanted > self._done)
            except StorageError as error:
                wait = min(2 * wait, _LONGEST_WAIT_S) if self._failing_since else EVERY_S / 2
                if self._failed(error):
                    return
            except Exception as error:  # noqa: BLE001 - a training that waits for this thread must hear of it
                self._give_up(error)
                return
            else:
                wait = EVERY_S
                self._succeeded(wanted)
                if closing:
                    return

    def _called(self) -> bool:
        """Whether there is a reason not to wait for the next round; none while the storage fails."""
        return not self._failing_since and (self._close_by is not None or self._wanted > self._done)

    def _failed(self, error: StorageError) -> bool:
        """Note a failure; True where patience has come to its end."""
        first = self._failing_since is None
        if self._failing_since is None:
            self._failing_since = time.monotonic()
        with self._changed:
            self._changed.notify_all()
        if first:
            self._say(
                f"{error}; meanwhile the run goes on, is kept on this node, and uploads are tried again for "
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
            self._say(f"{self.remote.server} answers again after {seconds:.0f} s, and all of the run is uploaded")
        with self._changed:
            self._failing_since = None
            self._done = wanted
            self._changed.notify_all()

    def _give_up(self, error: Exception) -> None:
        with self._changed:
            self.problem = error
            self._changed.notify_all()

    def _round(self, everything: bool) -> None:
        self._check()
        for name in self._incoming:
            self._fetch(name)
        here = dict(self._here())
        now = time.monotonic()
        for name in sorted(self._sent.keys() - here.keys()):
            remove(self.remote / name)
            del self._sent[name]
        for name, signature in here.items():
            if self._sent.get(name) == signature:
                continue
            large = len(signature) == _FILE and signature[0] > LARGE_BYTES
            if large and not everything and now - self._sent_at.get(name, 0.0) < LARGE_EVERY_S:
                continue
            if send(self.local / name, self.remote / name):
                self._sent[name], self._sent_at[name] = signature, now

    def _fetch(self, name: str) -> None:
        remote = self.remote / name
        stamp = remote.stamp()
        if stamp is None:
            if self._got.pop(name, None):
                (self.local / name).unlink(missing_ok=True)
        elif self._got.get(name) != stamp:
            try:
                remote.download(self.local / name)
            except FileNotFoundError:
                return
            self._got[name] = stamp

    def _outgoing_paths(self) -> Iterator[Path]:
        for pattern in self._outgoing:
            for path in self.local.glob(pattern):
                yield from _walk(path)

    def _here(self) -> Iterator[tuple[str, _Signature]]:
        """What is to be uploaded, with what tells whether it changed: files first, then checkpoints, oldest first."""
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
    """Files and checkpoints below a path, or itself; what is being written aside has a name with a dot."""
    if path.name.startswith("."):
        return
    if not path.is_dir() or (path / SUMS).exists():
        if path.exists():
            yield path
        return
    for inner in sorted(path.iterdir()):
        yield from _walk(inner)


def send(path: Path, remote: Remote) -> bool:
    """Upload a file or a checkpoint; False where it is gone, or was replaced meanwhile.

    Raises:
        StorageError: it is not there, or not complete, as whoever reads it will see.
    """
    with ExitStack() as stack:
        try:
            if not path.is_dir():
                remote.upload(stack.enter_context(path.open("rb")))
                return True
            before = path.stat().st_ino
            files = {name: stack.enter_context((path / name).open("rb")) for name in (STATE, TENSORS, SUMS)}
            if path.stat().st_ino != before:
                return False
        except FileNotFoundError:
            return False
        # Open files stay those of one checkpoint, whatever becomes of the folder's name from here on.
        (remote / SUMS).delete()
        for name, file in files.items():
            (remote / name).upload(file)
    return True


def remove(remote: Remote) -> None:
    """Delete an object, or a checkpoint with its SHA256SUMS first."""
    names = remote.files()
    if names:
        (remote / SUMS).delete()
        remote.delete_folder()
    else:
        remote.delete()


def receive(remote: Remote, target: Path) -> bool:
    """Download a checkpoint, unless the same one is here; False where there is no complete one.

    Its hashes are verified by whoever loads it.
    """
    try:
        sums = (remote / SUMS).read_bytes()
        if (target / SUMS).is_file() and (target / SUMS).read_bytes() == sums:
            return True
        aside = target.with_name(f".{target.name}.partial-{os.getpid()}")
        shutil.rmtree(aside, ignore_errors=True)
        for name in (STATE, TENSORS):
            (remote / name).download(aside / name)
        (aside / SUMS).write_bytes(sums)
    except FileNotFoundError:
        return False
    shutil.rmtree(target, ignore_errors=True)
    os.rename(aside, target)
    return True
