"""Room for trainings on a cluster whose nodes come and go."""

from __future__ import annotations

import time

from ray.util.placement_group import PlacementGroup, remove_placement_group

from mpscl_ray.config import Config
from mpscl_ray.distributed.places import worker_slots
from mpscl_ray.train.ray.resources import cluster_shortage, worker_request

_LOOK_S = 2.0
_ASK_AGAIN_S = 10.0


class Room:
    """How many trainings may run at once: as many as the nodes that are there now have room for.

    Where one more would be started and finds no room, a placement group stands for it, so that a cluster which can grow
    does. It is given up as soon as Ray places it, for the training to take, and ends with this process.

    Args:
        config: of a training; of those with the most workers.
        use_gpu: whether each worker gets a GPU.
        at_most: limit of the user; None for none.
    """

    def __init__(self, config: Config, use_gpu: bool, at_most: int | None = None) -> None:
        self._config, self._use_gpu, self._at_most = config, use_gpu, at_most
        self._worker = worker_request(config, use_gpu)
        self._slots = 0
        self._look_at, self._ask_at = 0.0, time.monotonic() + _ASK_AGAIN_S
        self._asked: PlacementGroup | None = None
        self._too_small_since: float | None = None

    @property
    def places(self) -> int:
        """How many fit at once, at least one."""
        places = max(1, self._worker_slots() // self._config.scaling.most_workers)
        return places if self._at_most is None else min(places, self._at_most)

    def has_place(self, running: int) -> bool:
        """Whether one more fits beside those that run. Where none does, the cluster is asked for it."""
        if running < self.places:
            self.close()
            return True
        if self._at_most is None or running < self._at_most:
            self._ask()
        return False

    def shortage(self) -> str | None:
        """A sentence where even one training has not fitted for longer than ``scaling.resource_timeout_s``."""
        if self._worker_slots() >= self._config.scaling.least_workers:
            self._too_small_since = None
        elif self._too_small_since is None:
            self._too_small_since = time.monotonic()
        elif time.monotonic() - self._too_small_since >= self._config.scaling.resource_timeout_s:
            return cluster_shortage(self._config, self._use_gpu)
        return None

    def yield_place(self) -> None:
        """Give up what was asked for once Ray has placed it; to be called every now and then.

        Otherwise it would keep a training waiting that has lost its own place.
        """
        asked = self._asked
        if asked is not None and asked.wait(0):
            self.close()

    def close(self) -> None:
        """Ask for nothing any more."""
        asked, self._asked = self._asked, None  # threads of Ray Tune and of the command call this
        if asked is not None:
            remove_placement_group(asked)

    def _worker_slots(self) -> int:
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at, self._slots = now + _LOOK_S, worker_slots(self._worker)
        return self._slots

    def _ask(self) -> None:
        now, scaling = time.monotonic(), self._config.scaling
        if self._asked is None and now >= self._ask_at:
            self._ask_at = now + _ASK_AGAIN_S
            self._asked = self._worker.reserve(scaling.most_workers, scaling.placement_strategy)
        else:
            self.yield_place()
