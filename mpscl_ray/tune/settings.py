"""How a space is searched: the settings below ``search`` in a space file and on the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from mpscl_ray.config.load import expected
from mpscl_ray.runs.cli import did_you_mean
from mpscl_ray.tune.criteria import CRITERIA


@dataclass(frozen=True)
class SearchConfig:
    """How a space is searched and when a trial is stopped early."""

    method: Literal["random", "grid", "optuna"] = "random"
    """random: independent draws; grid: every combination of choices; optuna: draws that learn from trials that ended
    (needs pip install mpscl_ray[optuna])."""
    num_samples: Annotated[int, Field(ge=1)] = 12
    """Trials of a random or an Optuna search, the first with the preset's own values; a grid has as many as points."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    """Seed of the draws; the trials' own is run.seed."""
    metric: str = "auto"
    """What trials are compared by: oracle (target validation Dice) or a label-free criterion; auto: oracle where the
    target's validation cases are labelled, else the label-free default."""
    scheduler: Literal["asha", "pausing_asha", "fifo"] = "asha"
    """asha: Ray Tune's ASHAScheduler, which stops a trial that is not among the best at a rung; pausing_asha: the trial
    waits there and may continue later; fifo: each trial is trained to its end."""
    grace_period: Annotated[int, Field(ge=1)] | None = None
    """Iterations of the last phase up to the first rung; null: a tenth of the phase."""
    reduction_factor: Annotated[float, Field(gt=1)] = 4
    """From each rung the best 1/reduction_factor of the trials continue, and those with the same score; rungs are this
    factor apart."""
    max_t: Annotated[int, Field(ge=1)] | None = None
    """Iterations of the last phase after which a trial is stopped; null: none."""
    evaluate: Literal["best", "all", "none"] = "best"
    """Trials that are evaluated on the target's test volumes when the search is over; no choice depends on that."""


def search_config(values: Mapping[str, tuple[Any, str]]) -> tuple[SearchConfig, list[str]]:
    """Check settings of a search, given by name with where each was written, such as ``in small.yaml:4``.

    Returns:
        The settings, defaults where something is wrong, and a sentence for each thing that is.
    """
    problems = []
    names = [field.name for field in dataclasses.fields(SearchConfig)]
    known = {}
    for name, (value, origin) in values.items():
        if name in names:
            known[name] = value
            continue
        hint = did_you_mean(name, names, prefix="search.") or f"there are {', '.join(names)}"
        problems.append(f"'search.{name}' {origin} is not a setting of a search; {hint}")
    try:
        config = TypeAdapter(SearchConfig).validate_python(known)
    except ValidationError as error:
        for detail in error.errors():
            name = str(detail["loc"][0])
            problems.append(f"search.{name}={values[name][0]} {values[name][1]}: {expected(detail)}")
        return SearchConfig(), list(dict.fromkeys(problems))
    if config.metric != "auto" and config.metric not in CRITERIA:
        problems.append(
            f"search.metric={config.metric} {values['metric'][1]} is not one of auto, {', '.join(CRITERIA)}"
        )
    return config, problems
