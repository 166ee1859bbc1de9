"""The lock of a run in a bucket, which has no locks: an object that its owner renews.

A process that starts a run writes its token there and reads it back after a moment. If two do so at once, the token
that is there then has won. The owner increments a count every few seconds. A process that finds the token of another
watches the lease for a minute: if the count changes, the owner is alive; if it does not, the owner is dead. No clocks
are compared. Owner and workers check the token before each round of uploads and stop when it is no longer theirs, so
that an owner that was cut off for a while, and was taken for dead, does no harm when it comes back.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import sys
import time
from typing import Any

from mpscl_ray.errors import ClusterError, ConfigError
from mpscl_ray.runs import safe_json
from mpscl_ray.runs.environment import now
from mpscl_ray.runs.lock import process_alive
from mpscl_ray.runs.storage import S3Path

_SETTLE_S = 1.0
"""Time between writing a token and reading it back; longer than a small request takes."""
_POLL_INTERVAL_S = 1.0


class Lease:
    """The lease object of one run.

    Args:
        remote: where it is, in the folder of the run.
        renew_s: seconds between two renewals.
        dead_after_s: seconds without a renewal after which the owner counts as dead.
    """

    def __init__(self, remote: S3Path, *, renew_s: float = 10.0, dead_after_s: float = 60.0) -> None:
        self._remote, self._run = remote, remote.parent.name
        self._renew_s, self._dead_after_s = renew_s, dead_after_s
        self.token = secrets.token_hex(8)
        """Of the owner; a worker sets that of its command."""
        self._since, self._count, self._renewed = now(), 0, 0.0

    def acquire(self) -> None:
        """Become the owner.

        Raises:
            ConfigError: another process owns the run and is alive.
        """
        found = self._read()
        if found and not self._dead_here(found):
            self._watch(found)
        self._write()
        time.sleep(_SETTLE_S)
        there = self._read()
        if there.get("token") != self.token:
            raise self._in_use(there)

    def check(self) -> None:
        """Raises ClusterError where the lease has another owner by now, or none."""
        there = self._read()
        if there.get("token") != self.token:
            raise ClusterError(
                f"the run {self._run} was taken over by process {there.get('pid', '?')} on {there.get('host', '?')}; "
                "this one stops, and all that it wrote before is kept"
            )

    def renew(self) -> None:
        """Check, and write the lease again if the last renewal is a while ago."""
        self.check()
        if time.monotonic() - self._renewed > self._renew_s:
            self._write()

    def release(self) -> None:
        """Delete the lease."""
        self.check()
        self._remote.delete()

    def owner(self) -> int | None:
        """Pid of the owner on its own host; None where the run has no owner."""
        pid = self._read().get("pid")
        return int(pid) if pid is not None else None

    def _watch(self, found: dict[str, Any]) -> None:
        print(
            f"the run {self._run} was left by process {found.get('pid')} on {found.get('host')}, or is in use: waiting "
            f"for a renewal for up to {self._dead_after_s:g} s",
            file=sys.stderr,
            flush=True,
        )
        deadline = time.monotonic() + self._dead_after_s
        while time.monotonic() < deadline:
            time.sleep(_POLL_INTERVAL_S)
            there = self._read()
            if not there or self._dead_here(there):
                return
            if there != found:
                raise self._in_use(there)

    def _in_use(self, there: dict[str, Any]) -> ConfigError:
        return ConfigError(
            f"the run {self._run} is in use by process {there.get('pid', '?')} on {there.get('host', '?')} since "
            f"{there.get('since', '?')} ({self._remote.parent}); wait for it, stop it, or give this one another "
            "run.name"
        )

    def _dead_here(self, found: dict[str, Any]) -> bool:
        return found.get("host") == platform.node() and not process_alive(str(found.get("pid", "")))

    def _read(self) -> dict[str, Any]:
        try:
            content = safe_json.read(self._remote)
        except (FileNotFoundError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _write(self) -> None:
        self._count += 1
        owner = {"token": self.token, "pid": os.getpid(), "host": platform.node(), "since": self._since}
        self._remote.write_bytes(json.dumps({**owner, "count": self._count}).encode())
        self._renewed = time.monotonic()
