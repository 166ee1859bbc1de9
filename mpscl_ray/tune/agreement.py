"""How well a criterion agrees with target Dice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from mpscl_ray.tune.criteria import ORACLE, score


@dataclass(frozen=True)
class Agreement:
    """How well a criterion stands in for target Dice over some trials.

    Attributes:
        correlation: Spearman's rank correlation with target Dice; NaN where either is the same for all trials.
        regret: target Dice of the best trial less that of the one that the criterion picks.
        trials: how many were compared.
    """

    correlation: float
    regret: float
    trials: int


def agreement(records: Sequence[Mapping[str, Any]], metric: str) -> Agreement | None:
    """Compare a criterion with target Dice over the last validation of each trial.

    Args:
        records: of trials that were trained equally long.
        metric: a key of :data:`CRITERIA`.

    Returns:
        None where fewer than two trials have both values.
    """
    pairs = [(score(record, metric), score(record, ORACLE)) for record in records]
    pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
    if len(pairs) < 2:
        return None
    values, dice = np.array([value for value, _ in pairs]), np.array([dice for _, dice in pairs])
    return Agreement(rank_correlation(values, dice), float(dice.max() - dice[values.argmax()]), len(pairs))


def rank_correlation(one: Sequence[float] | np.ndarray, other: Sequence[float] | np.ndarray) -> float:
    """Spearman's rho, ties with their mean rank; NaN where one side is constant."""
    first, second = (rankdata(values) - (len(values) + 1) / 2 for values in (one, other))
    scale = math.sqrt(float(first @ first) * float(second @ second))
    return float(first @ second) / scale if scale else math.nan
