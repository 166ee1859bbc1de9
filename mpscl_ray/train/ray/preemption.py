"""Preemption: a node that is going to be taken away asks for a checkpoint while there is time for one.

Ray Train watches for nodes that Ray drains, as cloud providers announce for spot machines and ``ray drain-node`` does
by hand, and tells the workers. Training continues until the deadline, when Ray Train replaces the workers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import ray.train

from mpscl_ray.distributed.ray_session import PREEMPTION_WATCHER

_EVERY = 4
"""Polls between two questions, each of which takes some milliseconds, because all workers meet for it."""


class PreemptionNotice:
    """Whether a node of this run is about to be taken away, said once for each notice.

    Called on all workers at the same steps, as :func:`mpscl_ray.train.loop.train` does with ``save_requested``.

    Args:
        warn: called with a sentence for the user.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._watched = os.environ.get(PREEMPTION_WATCHER, "1") != "0"
        self._polls = 0
        self._nodes: set[str] = set()

    def __call__(self) -> bool:
        self._polls += 1
        if not self._watched or self._polls % _EVERY:
            return False
        info = ray.train.get_preemption_info()
        if info is None or self._nodes.issuperset(info.preempted_node_ids):
            return False
        self._nodes.update(info.preempted_node_ids)
        workers = ", ".join(map(str, info.preempted_ranks))
        until = "" if info.deadline_ms is None else f" in {max(info.deadline_ms / 1000 - time.time(), 0):.0f} s"
        self._warn(f"the node of worker {workers} will be taken away{until}; a checkpoint is written now")
        return True
