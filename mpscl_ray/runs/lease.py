"""The right to write a run in a bucket, which has no locks: an object that its owner renews.

Who starts a run puts its token there and reads it back after a moment; of two that do so at once, the token that is
there then has won. The owner counts a number up every few seconds. Whoever finds another's token watches it for a
minute: a number that moves is a living owner, one that stands still is a dead one. No clocks are compared. Owner and
workers look at the token before each round of uploads and stop when it is not theirs, so that one who was taken for
dead, being cut off for a while, does no harm when it comes back.
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
from mpscl_ray.runs.environment import now
from mpscl_ray.runs.lock import alive
from mpscl_ray.runs.storage import Remote

RENEW_S = 10.0
"""Seconds between two renewals, by default."""
DEAD_AFTER_S = 60.0
"""Seconds after which a lease that stands still belongs to nobody, by default."""
SETTLE_S = 1.0
"""Time between writing a token and reading it back; longer than a small request takes."""
_LOOK_S = 1.0


class Lease:
    """The lease object of one run.

    Args:
        remote: where it is.
        run: name of the run.
        token: of the owner; a new one by default.
        renew_s: seconds between two renewals.
        dead_after_s: a lease that stands still for so many seconds belongs to nobody.
    """

    def __init__(
        self, remote: Remote, run: str, token: str = "", *, renew_s: float = RENEW_S, dead_after_s: float = DEAD_AFTER_S
    ) -> None:
        self.remote, self.run = remote, run
        self._renew_s, self._dead_after_s = renew_s, dead_after_s
        self.token = token or secrets.token_hex(8)
        self._count = 0
        self._renewed = 0.0

    def take(self) -> None:
        """Become the owner.

        Raises:
            ConfigError: another process owns the run and lives.
        """
        found = self._read()
        if found and not self._dead_here(found):
            self._watch(found)
        self._write()
        time.sleep(SETTLE_S)
        there = self._read()
        if there.get("token") != self.token:
            raise self._in_use(there)

    def check(self) -> None:
        """Raises ClusterError where the lease has another owner by now, or none."""
        there = self._read()
        if there.get("token") != self.token:
            raise ClusterError(
                f"the run {self.run} was taken over by process {there.get('pid', '?')} on {there.get('host', '?')}; "
                "this one stops and has left everything up to then in place"
            )

    def renew(self) -> None:
        """Check, and show that the owner lives if the last time is a while ago."""
        self.check()
        if time.monotonic() - self._renewed > self._renew_s:
            self._write()

    def release(self) -> None:
        """Give the run free."""
        self.check()
        self.remote.delete()

    def holder(self) -> int | None:
        """Pid of the owner, on its own host; None where nobody owns the run, as far as the lease tells."""
        pid = self._read().get("pid")
        return int(pid) if pid is not None else None

    def _watch(self, found: dict[str, Any]) -> None:
        print(
            f"the run {self.run} was left by process {found.get('pid')} on {found.get('host')}, or is in use: looking "
            f"for a sign of life for up to {self._dead_after_s:g} s",
            file=sys.stderr,
            flush=True,
        )
        deadline = time.monotonic() + self._dead_after_s
        while time.monotonic() < deadline:
            time.sleep(_LOOK_S)
            there = self._read()
            if not there or self._dead_here(there):
                return
            if there != found:
                raise self._in_use(there)

    def _in_use(self, there: dict[str, Any]) -> ConfigError:
        return ConfigError(
            f"the run {self.run} is in use by process {there.get('pid', '?')} on {there.get('host', '?')} since "
            f"{there.get('since', '?')} ({self.remote.parent}); wait for it, stop it, or give this one another run.name"
        )

    def _dead_here(self, found: dict[str, Any]) -> bool:
        return found.get("host") == platform.node() and not alive(str(found.get("pid", "")))

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.remote.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _write(self) -> None:
        self._count += 1
        owner = {"token": self.token, "pid": os.getpid(), "host": platform.node(), "since": _STARTED}
        self.remote.write_bytes(json.dumps({**owner, "count": self._count}).encode())
        self._renewed = time.monotonic()


_STARTED = now()
