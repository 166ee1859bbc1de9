"""A worker that stops answering: its stack goes to its own log, and the others name it.

After ``scaling.collective_timeout_s`` the collectives of the others fail. That does not say whose part was missing; but
the workers that failed do not hang, so that it is one of the rest (:func:`mpscl_ray.train.ray.failures.causes`).
"""

from __future__ import annotations

import faulthandler
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import ray

from mpscl_ray.distributed import collectives

_TIMED_OUT = re.compile(r"Timed out waiting|collective operation timeout", re.IGNORECASE)
"""What gloo and NCCL say of a collective that some worker did not join."""

_EARLY = 0.9
"""Part of the timeout after which stacks are written: the worker is replaced soon after it."""


class StepWatch:
    """The step that this worker is in. Where none follows for long, its log gets the stacks of all its threads."""

    def __init__(self, log_file: Path, timeout_s: float) -> None:
        self._log_file, self._timeout_s = log_file, timeout_s
        self._file: TextIO | None = None
        self._nodes: list[str] = []
        self._step = -1  # steps done; one that begins says that the one before it is
        self._armed = 0.0

    def start(self, step: int) -> None:
        """Training starts after this step; every worker calls it."""
        self.close()
        self._step = step - 1
        if collectives.world_size() > 1:
            address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
            self._nodes = collectives.gather_objects(address)
            self._file = self._log_file.open("a", encoding="utf-8")

    def step_begins(self) -> None:
        """The next step begins."""
        self._step += 1
        now = time.monotonic()
        if self._file is not None and now - self._armed > min(1.0, self._timeout_s / 100):
            self._armed = now
            faulthandler.dump_traceback_later(_EARLY * self._timeout_s, file=self._file)

    def explain(self, error: BaseException) -> RuntimeError | None:
        """The error of a collective that another worker did not join, in words; None for any other error."""
        if not _TIMED_OUT.search(str(error)):
            return None
        return RuntimeError(
            f"no answer from another worker within {self._timeout_s:g} s, after step {self._step}; the workers are on "
            + ", ".join(self._nodes)
        )

    def close(self) -> None:
        """Write no stacks any more. Safe to call twice."""
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            with suppress(OSError):
                self._file.close()
            self._file = None
