"""ASHA: trials wait at rungs, and whoever is among the best of those that came there goes on first.

Source: Li et al. 2020, "A system for massively parallel hyperparameter tuning", Algorithm 2. Ray Tune's own ASHA is the
variant that never pauses: a trial goes on if it is among the best so far when it arrives, so that the early ones nearly
always do, and one that was stopped is lost however poor the later ones are. Here a trial that is not among the best
writes a checkpoint and gives its place back, and is taken up again once it is.

Differs from the paper in its end, as a search has one: where no trial could go on and none is at its end yet, the best
one on the highest rung goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler


def rungs(iterations: int, grace: int, reduction: float) -> list[float]:
    """Iterations at which trials are compared: grace, and on by a factor, below the last one."""
    found, rung = [], float(grace)
    while rung < iterations:
        found.append(rung)
        rung *= reduction
    return found


class Halving:
    """Which trials go on. All of it follows from the reports and their order, so that nothing else has to be kept.

    Args:
        rungs: iterations at which trials are compared, growing; none if every trial is trained in full.
        reduction: one trial in so many goes on.
        total: trials of the search.
    """

    def __init__(self, rungs: list[float], reduction: float, total: int) -> None:
        self.rungs, self._reduction, self._total = rungs, reduction, total
        self._scores: list[dict[int, float]] = [{} for _ in rungs]
        self._reached: list[dict[int, int]] = [{} for _ in rungs]
        self._passed: list[set[int]] = [set() for _ in rungs]

    def report(self, number: int, iteration: int, score: float) -> bool:
        """Take note of a trial's score; returns whether the trial has to wait there.

        The first report at or behind a rung counts there. A score that is not a number is the lowest.
        """
        arrived = False
        for rung, scores, reached, passed in zip(self.rungs, self._scores, self._reached, self._passed, strict=True):
            if iteration < rung:
                break
            if number in scores:
                if iteration > reached[number]:
                    passed.add(number)
                continue
            scores[number], reached[number] = -math.inf if math.isnan(score) else score, iteration
            arrived = True
        for lower, higher in zip(self._passed, self._scores[1:], strict=False):
            if number in higher:
                lower.add(number)
        if not arrived:
            return False
        level = self._rung_of(number)
        if level is not None and number in self._best(level):
            self._passed[level].add(number)
            return False
        return level is not None

    def waits_at(self, number: int) -> int | None:
        """The iteration at which a trial waits on a rung; None where it does not."""
        rung = self._rung_of(number)
        return None if rung is None else self._reached[rung][number]

    def next(self, waiting: set[int], *, whatever: bool = False) -> int | None:
        """Take the trial that goes on next, from the highest rung that has one; None where no trial may.

        Args:
            waiting: trials to choose from.
            whatever: choose the best one on the highest rung even if it is not good enough.
        """
        for rung in reversed(range(len(self.rungs))):
            order = self._order(rung) if whatever else self._best(rung)
            for number in order:
                if number in waiting and number not in self._passed[rung]:
                    self._passed[rung].add(number)
                    return number
        return None

    def hopeless(self, number: int) -> bool:
        """Whether a trial that waits can never go on, however poor the trials to come are."""
        rung = self._rung_of(number)
        return rung is not None and self._order(rung).index(number) >= max(1, int(self._total / self._reduction))

    def _rung_of(self, number: int) -> int | None:
        for rung in reversed(range(len(self.rungs))):
            if number in self._scores[rung]:
                return None if number in self._passed[rung] else rung
        return None

    def _order(self, rung: int) -> list[int]:
        """Trials that came to a rung, the best first; of equal ones the first."""
        scores = self._scores[rung]
        return sorted(scores, key=lambda number: (-scores[number], number))

    def _best(self, rung: int) -> list[int]:
        order = self._order(rung)
        return order[: int(len(order) / self._reduction)]


class NotPicklable:
    """Mixin of what Ray Tune is given to call, and would pickle for a restoration that the ledger makes needless."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return object, ()


class Listener(NotPicklable, FIFOScheduler):
    """Passes on what trials report, and lets Ray Tune end none: one that it kills leaves its workers' place reserved.

    Args:
        report: called with number, iteration, score and values of each result.
    """

    def __init__(self, report: Callable[[int, int, float, dict[str, float]], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._report = report

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "score" in result:
            values = {key.removeprefix("values/"): value for key, value in result.items() if key[:7] == "values/"}
            self._report(result["number"], result["iteration"], result["score"], values)
        return TrialScheduler.CONTINUE
