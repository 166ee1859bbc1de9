"""Which trials continue, by ``search.scheduler``: a scheduler of Ray Tune, or ASHA that pauses trials.

Decisions follow from the reports and their order alone, so a search that resumes makes them again from its ledger: what
a scheduler of Ray Tune knows is not in the state that Ray Tune restores.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from mpscl_ray.tune.asha import PausingASHA, rungs
from mpscl_ray.tune.settings import SearchConfig


class StoppingScheduler:
    """A scheduler of Ray Tune that answers CONTINUE or STOP, with the methods of :class:`PausingASHA`.

    A trial whose score is NaN is stopped.

    Args:
        scheduler: compares ``score``, the higher the better, by ``iteration``.
    """

    def __init__(self, scheduler: TrialScheduler) -> None:
        self._scheduler = scheduler
        scheduler.set_search_properties("score", "max")
        self._trials: dict[int, Any] = {}
        self._stopped: dict[int, int] = {}

    def report(self, number: int, iteration: int, score: float) -> bool:
        """Record a trial's score; returns whether the trial has to end there."""
        if number not in self._trials:
            # Of a trial these schedulers read the id alone.
            self._trials[number] = SimpleNamespace(trial_id=str(number))
            self._scheduler.on_trial_add(None, self._trials[number])  # type: ignore[arg-type]
        result = {"iteration": iteration, "score": score}
        answer = self._scheduler.on_trial_result(None, self._trials[number], result)  # type: ignore[arg-type]
        if answer == TrialScheduler.STOP or math.isnan(score):
            self._stopped[number] = iteration
        return number in self._stopped

    def waits_at(self, number: int) -> int | None:
        """The iteration at which a trial was stopped; None where it may run."""
        return self._stopped.get(number)

    def promote(self, waiting: set[int], *, force: bool = False) -> int | None:
        """None: what is stopped stays so."""
        return None

    def cannot_be_promoted(self, number: int) -> bool:
        """Whether a trial was stopped."""
        return number in self._stopped


def make_scheduler(
    search: SearchConfig, iterations: int, total: int
) -> tuple[StoppingScheduler | PausingASHA, list[float]]:
    """The scheduler that the settings name.

    Args:
        iterations: of the last phase, at most.
        total: trials of the search.

    Returns:
        The scheduler, and the iterations at which it compares trials.
    """
    grace = search.grace_period or max(1, iterations // 10)
    compared_at = rungs(iterations, grace, search.reduction_factor)
    if search.scheduler == "fifo" or not compared_at:
        return StoppingScheduler(FIFOScheduler()), []  # type: ignore[no-untyped-call]
    if search.scheduler == "pausing_asha":
        return PausingASHA(compared_at, search.reduction_factor, total), compared_at
    asha = ASHAScheduler("iteration", max_t=iterations, grace_period=grace, reduction_factor=search.reduction_factor)
    return StoppingScheduler(asha), compared_at
