"""A run in a bucket: a folder of this node, and what keeps the bucket up to date with it.

Command and workers may be on different nodes, so each has a folder of its own (below the cache folder, see
:mod:`mpscl_ray.runs.storage`) and uploads what it writes: the command config, model, environment, status and results;
worker 0 metrics, checkpoints, TensorBoard events, curves and its log; every other worker its log. They meet in the
bucket alone. The layout there is that of :mod:`mpscl_ray.runs.run_directory`; for ``.lock`` it has ``.lease``
(:mod:`mpscl_ray.runs.lease`).

A checkpoint is in the bucket when :meth:`RunFolder.settle` returns, which worker 0 waits for after each: as on a shared
disk, a killed run repeats at most the steps since the last one. While the storage does not answer nobody waits, and the
bucket has the last checkpoint from before.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpscl_ray.errors import DataError, StorageError
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.atomic_files import storage_errors
from mpscl_ray.runs.lease import Lease
from mpscl_ray.runs.lock import alive
from mpscl_ray.runs.run_directory import (
    FAILURE_FILE,
    LOSSES_FILE,
    NOTICES_FILE,
    PARTS,
    PLACE_FILE,
    STOP_FILE,
    RunFolder,
    State,
)
from mpscl_ray.runs.storage import Remote, cache_folder, locate
from mpscl_ray.runs.sync import Mirror, receive, send

log = logging.getLogger(__name__)

_LAST_UPLOADS_S = 60.0
"""How long a command that ends waits for a storage that does not answer."""

LEASE = ".lease"
"""The lease object in the folder of a run."""

_AGAIN_S = 2.0

_LOOK_S = 2.0

_OF_THE_COMMAND = ("config.yaml", "model.json", "environment.json", "status.json", "results", STOP_FILE)
_OF_WORKER_0 = tuple(
    "checkpoints best phases metrics.jsonl features.jsonl pseudo_labels progress.png tensorboard".split()
)
_LARGE = ("checkpoints", "best", "phases", "tensorboard", "trials", "shared", "cells")
"""Folders that are not fetched as a whole; the last three hold the runs of a search or a comparison."""


def open_run(
    place: RunFolder | Path | Remote | str,
    role: str = "reader",
    patience_s: float = 0.0,
    also: Sequence[str] = (),
) -> RunFolder:
    """The folder of a run by its path or URL.

    Args:
        place: where it is; what is a run folder already is returned as it is.
        role: who opens it, which is part of the name of a node's own copy of a run in a bucket.
        patience_s: how long a bucket may fail to answer.
        also: patterns of what its command writes beside what that of a training does.

    Raises:
        ConfigError: a URL that cannot be used.
    """
    if isinstance(place, RunFolder):
        return place
    found = locate(place)
    return BucketRun(found, role, patience_s, also) if isinstance(found, Remote) else RunFolder(found)


class BucketRun(RunFolder):
    """A run by URL. Making the object does not touch the bucket."""

    look_s = _LOOK_S

    def __init__(
        self, remote: Remote, role: str, patience_s: float, also: Sequence[str] = (), lease: Lease | None = None
    ) -> None:
        super().__init__(_copy_folder(remote, role))
        self.remote, self.role, self.patience_s, self._also = remote, role, patience_s, also
        self.name = remote.name
        self._lease = lease or Lease(remote / LEASE, remote.name)
        self._mirror: Mirror | None = None
        self._looked = False

    @property
    def exists(self) -> bool:
        """Whether a run was started there before; what there is of small files is fetched to see."""
        if not super().exists or (self.role == "reader" and not self._looked):
            self._fetch_small()
            self._looked = True
        return super().exists

    @property
    def place(self) -> str:
        """The URL."""
        return str(self.remote)

    @property
    def address(self) -> str:
        """The URL."""
        return str(self.remote)

    @property
    def token(self) -> str:
        """Of the lease."""
        return self._lease.token

    @property
    def problem(self) -> Exception | None:
        """Why the mirror has given up."""
        return self._mirror.problem if self._mirror else None

    def create(self, parts: Collection[str] = PARTS) -> None:
        """Make the local folder, and try that objects can be written, read and deleted."""
        self.prepare_worker()
        probe = self.remote / f".probe-{platform.node()}-{os.getpid()}"
        probe.write_bytes(b"written")
        try:
            if probe.read_bytes() != b"written":
                raise StorageError(f"{probe} does not read as it was written; check the storage")
        except FileNotFoundError:
            raise StorageError(f"{probe} was written and is not there; check the storage") from None
        finally:
            probe.delete()

    def _beside(self) -> list[str]:
        around = self.remote.parent
        around.require_bucket()
        return [name for name in around.folders() if (around / name / "config.yaml").exists()]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this command by its lease, and upload what the command writes inside the block.

        Raises:
            ConfigError: another process holds it.
            StorageError: the storage does not answer, or has failed at the end until patience was over.
        """
        self._lease.take()
        for name in (STOP_FILE, FAILURE_FILE):
            (self.remote / name).delete()
        self._fetch_small()
        mirror = self._start(
            (*_OF_THE_COMMAND, f"logs/{LOSSES_FILE}", "logs/environment-*.json", *self._also),
            ("metrics.jsonl", FAILURE_FILE, PLACE_FILE, f"logs/{NOTICES_FILE}"),
            self._lease.renew,
            max(_LAST_UPLOADS_S, self.patience_s),
            lambda text: print(text, file=sys.stderr, flush=True),
        )
        try:
            yield
        finally:
            mirror.close()
            self._mirror = None
            (self.remote / PLACE_FILE).delete()
            self._lease.release()
            shutil.rmtree(self.path, ignore_errors=True)

    def holder(self) -> int | None:
        """Pid of the owner of the lease, on its own host; None where nobody has it."""
        return self._lease.holder()

    def settle(self) -> None:
        """Wait for the mirror."""
        if self._mirror is not None:
            self._mirror.settle()

    def publish(self, path: Path) -> None:
        """Upload what was written."""
        for file in sorted(path.rglob("*")) if path.is_dir() and not (path / checkpoint.SUMS).exists() else [path]:
            if file.is_file() or file == path:
                send(file, self.remote / file.relative_to(self.path))

    def fetched(self, path: Path) -> Path:
        """Download a checkpoint of the run, unless the same one is here."""
        target = self.path / path
        if target.is_relative_to(self.path) and not receive(self.remote / self.relative(target), target):
            raise DataError(
                f"{self.remote / self.relative(target)} is no complete checkpoint: it has no {checkpoint.SUMS}"
            )
        return target

    def fetch_newest(self) -> None:
        """Download checkpoints from the newest on until one is intact."""
        for name in reversed(self.steps()):
            target = self.checkpoints / name
            try:
                if receive(self.remote / "checkpoints" / name, target):
                    checkpoint.verify(target)
                    return
            except checkpoint.CheckpointDamaged:
                continue

    def steps(self) -> list[str]:
        """Names of the complete checkpoints in the bucket."""
        return [name for name in self._complete("checkpoints") if re.fullmatch(r"step-\d{7,}", name)]

    def checkpoint_names(self) -> list[str]:
        """Of the complete checkpoints in the bucket."""
        best = ["best"] if (self.remote / "best" / checkpoint.SUMS).exists() else []
        return [*self.steps(), *self.finished_phases(), *best]

    def finished_phases(self) -> list[str]:
        """Those whose checkpoint is complete in the bucket."""
        return self._complete("phases")

    def _complete(self, folder: str) -> list[str]:
        sealed = (name.split("/") for name in (self.remote / folder).files())
        return [parts[0] for parts in sealed if len(parts) == 2 and parts[1] == checkpoint.SUMS]

    def discard_weights(self) -> None:
        """Remove all checkpoints from the bucket."""
        for part in ("checkpoints", "phases", "best"):
            (self.remote / part).delete_folder()

    def leave(self, name: str, text: str) -> None:
        """Put an object, as long as patience allows."""
        self._patiently(lambda: (self.remote / name).write_bytes(text.encode()))

    def left(self, name: str) -> str | None:
        """Read an object."""
        try:
            return (self.remote / name).read_bytes().decode("utf-8", "replace")
        except FileNotFoundError:
            return None

    def take_away(self, name: str) -> None:
        """Delete an object."""
        (self.remote / name).delete()

    def write_status(self, state: State, **told: Any) -> None:
        """Replace status.json; who does not hold the run puts it in the bucket at once."""
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        super().write_status(state, **told)
        if self._mirror is None:
            self.publish(self.status_file)

    def read_status(self) -> dict[str, Any]:
        """status.json; who does not hold the run looks at it anew."""
        self._look_at(self.status_file)
        return super().read_status()

    def read_metrics(self) -> list[dict[str, Any]]:
        """All records; who does not hold the run looks at them anew."""
        self._look_at(self.metrics_file)
        return super().read_metrics()

    def _look_at(self, file: Path) -> None:
        if self._mirror is None:
            try:
                (self.remote / self.relative(file)).download(file)
            except FileNotFoundError:
                file.unlink(missing_ok=True)

    def prepare_worker(self) -> None:
        """Make the local folder, with the small files that there are."""
        with storage_errors(self.path):
            for part in PARTS:
                (self.path / part).mkdir(parents=True, exist_ok=True)
        if self.role != "command":
            self._patiently(self._fetch_small)

    @contextmanager
    def training(self, token: str, rank: int) -> Iterator[None]:
        """Upload what this worker writes, as long as the command that started it holds the run."""
        self._lease.token = token
        mine = [f"logs/{self.role}.log"]
        if rank == 0:
            self._patiently(self._lease.check)
            mine = [*_OF_WORKER_0, f"logs/{NOTICES_FILE}", *mine]
            self._patiently(self._fetch_checkpoints)
        mirror = self._start(mine, (STOP_FILE,), self._lease.check, self.patience_s, log.warning)
        try:
            yield
        finally:
            mirror.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def _patiently(self, action: Callable[[], None]) -> None:
        """Try again what fails because the storage does not answer, as long as patience allows."""
        deadline = time.monotonic() + self.patience_s
        while True:
            try:
                return action()
            except StorageError as error:
                if time.monotonic() > deadline:
                    raise
                log.warning("%s; tried again", error)
                time.sleep(_AGAIN_S)

    def _fetch_checkpoints(self) -> None:
        """All complete ones, so that old ones are removed in their turn; the rests of uploads that broke off go."""
        complete = self.steps()
        for name in (self.remote / "checkpoints").folders():
            if name not in complete or not receive(self.remote / "checkpoints" / name, self.checkpoints / name):
                (self.remote / "checkpoints" / name).delete_folder()

    def _start(
        self,
        outgoing: tuple[str, ...] | list[str],
        incoming: tuple[str, ...],
        check: Callable[[], None],
        patience_s: float,
        say: Callable[[str], None],
    ) -> Mirror:
        self._mirror = Mirror(
            self.path,
            self.remote,
            outgoing=outgoing,
            incoming=incoming,
            check=check,
            patience_s=patience_s,
            say=say,
        )
        self._mirror.know()
        self._mirror.start()
        return self._mirror

    def _fetch_small(self) -> None:
        for name in self.remote.files():
            if name.split("/")[0] not in _LARGE and (name == PLACE_FILE or not name.startswith(".")):
                (self.remote / name).download(self.path / name)


def _copy_folder(remote: Remote, role: str) -> Path:
    """Folder of this process for a run; those that killed processes have left are removed."""
    runs = cache_folder() / "runs"
    prefix = f"{remote.name}-{hashlib.sha256(str(remote).encode()).hexdigest()[:8]}-{platform.node()}-"
    if runs.is_dir():
        for left in runs.glob(f"{prefix}*"):
            if not alive(left.name.removeprefix(prefix).partition("-")[0]):
                shutil.rmtree(left, ignore_errors=True)
    folder = runs / f"{prefix}{os.getpid()}-{role}"
    if role == "reader":
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
