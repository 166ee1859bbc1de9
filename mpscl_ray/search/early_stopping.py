"""Ray Tune's ASHA, in two ways changed: it goes on after an interruption, and it asks trials to stop, it kills none.

A trial that Ray Tune kills leaves its workers' place reserved. One that is asked writes a checkpoint, ends its workers
and gives the place back itself.

Source: Li et al. 2020, "A system for massively parallel hyperparameter tuning", Algorithm 2, in the variant of Ray
Tune, which stops trials where the paper pauses them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from mpscl_ray.search.ledger import Ledger


@dataclass(frozen=True)
class _Named:
    """What ASHA wants to know of a trial: a name that is the same after an interruption."""

    trial_id: str


class InThisProcess:
    """Mixin of what Ray Tune is given to call, and would pickle for a restoration that the ledger makes needless."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return object, ()


class EarlyStopping(InThisProcess, ASHAScheduler):
    """ASHA over numbered trials (``trial.config["number"]``) that report ``iteration`` and ``score``.

    Args:
        iterations: of a trial that is trained in full.
        grace: first rung.
        reduction: factor between rungs; one trial in so many goes on.
        report: called with number, iteration and values of each result, before anything is decided by it; says
            whether it is a new one.
        ask_to_stop: called with the number and the iteration of a trial that has fallen behind, once.
    """

    def __init__(
        self,
        iterations: int,
        grace: int,
        reduction: float,
        report: Callable[[int, int, dict[str, float]], bool],
        ask_to_stop: Callable[[int, int], None],
    ) -> None:
        super().__init__(
            time_attr="iteration",
            metric="score",
            mode="max",
            max_t=iterations,
            grace_period=min(grace, iterations),
            reduction_factor=reduction,
        )
        self._iterations, self._report, self._ask_to_stop = iterations, report, ask_to_stop
        self._asked: set[int] = set()
        self._known: set[int] = set()

    def replay(self, ledger: Ledger, score: Callable[[dict[str, float]], float]) -> list[tuple[int, int]]:
        """Take note of all reports of an earlier start, in their order.

        Returns:
            Number and iteration of trials that have not ended although they fell behind: the search was interrupted
            between the report and its consequence.
        """
        behind = []
        for number, iteration in ledger.order:
            if self._decide(number, iteration, score(ledger.trials[number].reports[iteration])):
                self._asked.add(number)
                if not ledger.trials[number].ended:
                    behind.append((number, iteration))
        return behind

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Nothing: a trial is known from its first report on."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "score" in result:
            number, iteration = result["number"], result["iteration"]
            values = {key.removeprefix("values/"): value for key, value in result.items() if key[:7] == "values/"}
            if self._report(number, iteration, values) and self._decide(number, iteration, result["score"]):
                self._asked.add(number)
                self._ask_to_stop(number, iteration)
        return TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Nothing: the last result was taken note of when it came."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Nothing, likewise."""

    def _decide(self, number: int, iteration: int, score: float) -> bool:
        """Whether a trial falls behind by a report; never at the end, and never twice."""
        if iteration >= self._iterations or number in self._asked:
            return False
        named = _Named(f"{number:03d}")
        if number not in self._known:
            self._known.add(number)
            super().on_trial_add(None, named)  # type: ignore[arg-type]
        action = super().on_trial_result(None, named, {"iteration": iteration, "score": score})  # type: ignore[arg-type]
        return bool(action == TrialScheduler.STOP)
