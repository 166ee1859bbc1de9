"""How well the criteria agree with target Dice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from mpscl_ray.tune.criteria import CRITERIA, ORACLE, score
from mpscl_ray.tune.ledger import Trial


@dataclass(frozen=True)
class Agreement:
    """How well a criterion replaces target Dice over some trials."""

    correlation: float
    """Spearman's rank correlation with target Dice; NaN where either is the same for all trials."""
    regret: float
    """Target Dice of the best trial minus that of the trial that the criterion picks."""
    trials: int
    """How many are compared."""


def agreement(records: Sequence[Mapping[str, Any]], metric: str) -> Agreement | None:
    """Compare a criterion with target Dice over the last validations of trials that were trained equally long.

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


def agreements(trials: Sequence[Trial]) -> dict[str, Agreement]:
    """How label-free criteria agree with target Dice over the trials trained in full; {} without target labels."""
    records = [trial.last for trial in trials if trial.state == "finished"]
    found = {name: agreement(records, name) for name in CRITERIA if name != ORACLE}
    return {name: value for name, value in found.items() if value is not None}


def agreements_text(found: Mapping[str, Agreement], metric: str) -> str:
    """The agreement of each criterion, as lines for a terminal."""
    lines = ["criterion                  rank correlation with target Dice   Dice lost by its pick"]
    # A correlation of NaN comes last.
    for name, value in sorted(found.items(), key=lambda item: -np.nan_to_num(item[1].correlation, nan=-2.0)):
        mark = " (chosen)" if name == metric else ""
        lines.append(f"{name:26s} {value.correlation:33.2f} {value.regret:23.4f}{mark}")
    return "\n".join(lines)
