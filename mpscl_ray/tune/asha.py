"""ASHA that pauses: trials wait at rungs, and the best trials of a rung are promoted to the next one.

Source: Li et al. 2020, "A system for massively parallel hyperparameter tuning", Algorithm 2. Ray Tune's own ASHA is
the variant that never pauses: a trial continues if it is among the best so far when it arrives. The first trials then
nearly always continue, and a stopped trial is lost however poor later ones are. Here a trial that is not among the best
writes a checkpoint, gives up its workers, and resumes when it is promoted.

Differs from the paper in two ways. Trials whose scores equal that of the last one to be promoted are promoted too: a
number chooses none of them. And where, at the end of a search, no trial can be promoted and none was trained in full,
the best one on the highest rung continues.
"""

from __future__ import annotations

import math


def rungs(iterations: int, grace: int, reduction: float) -> list[float]:
    """Iterations at which trials are compared: ``grace``, each next one ``reduction`` times as far, below the last."""
    found, rung = [], float(grace)
    while rung < iterations:
        found.append(rung)
        rung *= reduction
    return found


class PausingASHA:
    """Decides which trials continue, by the reports and their order alone: a search keeps no other state for it.

    Args:
        rungs: iterations at which trials are compared, growing; none if every trial is trained in full.
        reduction: one of this number of trials is promoted, and those with the same score.
        total: trials of the search.
    """

    def __init__(self, rungs: list[float], reduction: float, total: int) -> None:
        self.rungs, self._reduction, self._total = rungs, reduction, total
        self._scores: list[dict[int, float]] = [{} for _ in rungs]
        self._reached: list[dict[int, int]] = [{} for _ in rungs]
        self._promoted: list[set[int]] = [set() for _ in rungs]

    def report(self, number: int, iteration: int, score: float) -> bool:
        """Record a trial's score; returns whether the trial has to wait there.

        The first report at or after a rung counts there. A score of NaN is the lowest.
        """
        arrived = False
        for rung, scores, reached, promoted in zip(
            self.rungs, self._scores, self._reached, self._promoted, strict=True
        ):
            if iteration < rung:
                break
            if number in scores:
                if iteration > reached[number]:
                    promoted.add(number)
                continue
            scores[number], reached[number] = -math.inf if math.isnan(score) else score, iteration
            arrived = True
        for lower, higher in zip(self._promoted, self._scores[1:], strict=False):
            if number in higher:
                lower.add(number)
        if not arrived:
            return False
        level = self._rung_of(number)
        if level is not None and number in self._best(level):
            self._promoted[level].add(number)
            return False
        return level is not None

    def waits_at(self, number: int) -> int | None:
        """The iteration at which a trial waits on a rung; None where it does not."""
        rung = self._rung_of(number)
        return None if rung is None else self._reached[rung][number]

    def promote(self, waiting: set[int], *, force: bool = False) -> int | None:
        """Promote the next trial, from the highest rung that has one; None where no trial qualifies.

        Args:
            waiting: trials to choose from.
            force: promote the best one on the highest rung even if it does not qualify.
        """
        for rung in reversed(range(len(self.rungs))):
            order = self._order(rung) if force else self._best(rung)
            for number in order:
                if number in waiting and number not in self._promoted[rung]:
                    self._promoted[rung].add(number)
                    return number
        return None

    def cannot_be_promoted(self, number: int) -> bool:
        """Whether a trial that waits can never continue, however poor the trials to come are."""
        rung = self._rung_of(number)
        if rung is None:
            return False
        scores = self._scores[rung]
        better = sum(score > scores[number] for score in scores.values())
        return better >= max(1, int(self._total / self._reduction))

    def _rung_of(self, number: int) -> int | None:
        for rung in reversed(range(len(self.rungs))):
            if number in self._scores[rung]:
                return None if number in self._promoted[rung] else rung
        return None

    def _order(self, rung: int) -> list[int]:
        """Trials that reached a rung, the best first; of equal ones the lower number first."""
        scores = self._scores[rung]
        return sorted(scores, key=lambda number: (-scores[number], number))

    def _best(self, rung: int) -> list[int]:
        order, scores = self._order(rung), self._scores[rung]
        best = order[: int(len(order) / self._reduction)]
        least = scores[best[-1]] if best else math.inf
        return best + [number for number in order[len(best) :] if -math.inf < scores[number] == least]
