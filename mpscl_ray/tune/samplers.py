"""Which settings the trials of a search get: fixed by the seed, or learnt by Optuna from trials that ended."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from mpscl_ray.errors import ConfigError
from mpscl_ray.tune.ledger import Trial
from mpscl_ray.tune.space import Distribution, Space

DIGITS = 4
"""Significant digits of a drawn number."""


class Sampler:
    """Gives each trial its settings: random or grid. They depend on the seed and the number of the trial alone."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self._grid = grid(space) if space.search.method == "grid" else None
        self.total = len(self._grid) if self._grid is not None else space.search.num_samples

    def settings(self, number: int) -> dict[str, Any]:
        """Values of the searched keys for the trial with this number, from 1."""
        if self._grid is not None:
            return self._grid[number - 1]
        default = self._space.default()
        if number == 1 and default is not None:
            return default
        rng = np.random.default_rng([self._space.search.seed, number])
        return _by_key(self._space, [draw(entry, rng) for entry in self._space.distributions])

    def ended(self, trial: Trial, score: float | None) -> None:
        """A trial is over; ``score`` is its last, None where it has none."""


def grid(space: Space) -> list[dict[str, Any]]:
    """All combinations of choices, the last key changing fastest."""
    points = itertools.product(*(entry.values for entry in space.distributions))
    return [_by_key(space, point) for point in points]


def draw(distribution: Distribution, rng: np.random.Generator) -> Any:
    """One value."""
    if distribution.kind == "choice":
        return distribution.values[int(rng.integers(len(distribution.values)))]
    low, high = distribution.values
    if distribution.kind == "integer":
        return int(rng.integers(int(low), int(high), endpoint=True))
    if distribution.kind == "loguniform":
        return _rounded(float(np.exp(rng.uniform(np.log(low), np.log(high)))), low, high)
    return _rounded(float(rng.uniform(low, high)), low, high)


def _rounded(value: float, low: float, high: float) -> float:
    return float(min(max(float(f"{value:.{DIGITS}g}"), low), high))


def _by_key(space: Space, values: Any) -> dict[str, Any]:
    """A value for each key, from one for each distribution."""
    return {key: value for entry, value in zip(space.distributions, values, strict=True) for key in entry.keys}


class OptunaSampler(Sampler):
    """Optuna's tree-structured Parzen estimator over all trials that ended, those of the ledger included."""

    def __init__(self, space: Space, known: Mapping[int, Trial], scores: Mapping[int, float | None]) -> None:
        try:
            import optuna
        except ImportError as error:
            raise ConfigError(
                'search.method=optuna needs the package optuna, which is missing: pip install "mpscl_ray[optuna]", '
                "or use search.method=random"
            ) from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        super().__init__(space)
        self._optuna = optuna
        ended = sum(trial.ended for trial in known.values())
        self._study = optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=space.search.seed + ended, constant_liar=True),
        )
        self._distributions = {entry.name: self._distribution(entry) for entry in space.distributions}
        self._asked: dict[int, Any] = {}
        for number, trial in sorted(known.items()):
            if trial.ended:
                self._add(trial, scores.get(number))

    def settings(self, number: int) -> dict[str, Any]:
        default = self._space.default()
        if number == 1 and default is not None:
            self._study.enqueue_trial({entry.name: default[entry.keys[0]] for entry in self._space.distributions})
        asked = self._asked[number] = self._study.ask(self._distributions)
        values = []
        for entry in self._space.distributions:
            value = asked.params[entry.name]
            values.append(_rounded(value, *entry.values) if entry.kind in ("uniform", "loguniform") else value)
        return _by_key(self._space, values)

    def ended(self, trial: Trial, score: float | None) -> None:
        asked = self._asked.pop(trial.number, None)
        if asked is None:
            self._add(trial, score)
        elif score is None:
            self._study.tell(asked, state=self._optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(asked, score)

    def _add(self, trial: Trial, score: float | None) -> None:
        if score is None:
            return
        params = {entry.name: trial.settings[entry.keys[0]] for entry in self._space.distributions}
        self._study.add_trial(
            self._optuna.trial.create_trial(params=params, distributions=self._distributions, value=score)
        )

    def _distribution(self, entry: Distribution) -> Any:
        kinds = self._optuna.distributions
        if entry.kind == "choice":
            return kinds.CategoricalDistribution(entry.values)
        if entry.kind == "integer":
            return kinds.IntDistribution(int(entry.values[0]), int(entry.values[1]))
        return kinds.FloatDistribution(*map(float, entry.values), log=entry.kind == "loguniform")


def make_sampler(space: Space, known: Mapping[int, Trial], scores: Mapping[int, float | None]) -> Sampler:
    """The sampler that a space asks for, given the trials of the ledger and their last scores by number.

    Raises:
        ConfigError: Optuna is asked for and not installed.
    """
    return OptunaSampler(space, known, scores) if space.search.method == "optuna" else Sampler(space)
