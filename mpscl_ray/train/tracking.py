"""What trackers (run.loggers) show of a training: its settings, its metrics, and the scores of its phases."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mpscl_ray
from mpscl_ray.config import Config, to_dict
from mpscl_ray.errors import Interrupted
from mpscl_ray.runs.config_diff import flatten
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.runs.trackers import TrackedRun, Tracking

_MEASURES = ("dice", "asd_mm", "hd95_mm")


def tracking_of(
    config: Config, run: RunDirectory, home: RunDirectory, warn: Callable[[str], None], name: str = ""
) -> Tracking:
    """Of a run, by the command whose directory is ``home``; that of the run itself where it is no other.

    Args:
        name: of the run in its search or comparison.
    """
    about = TrackedRun(
        name=name or run.name,
        group=home.name if home is not run else "",
        settings=dict(flatten(to_dict(config))),
        tags={"mpscl_ray": mpscl_ray.__version__, "method": config.method_name, "folder": run.display_path},
    )
    return Tracking(run, home, about, config.run.loggers, warn)


@dataclass
class TrackedTraining:
    """A training that is passed on while a block runs."""

    tracking: Tracking
    scores: dict[str, float] = field(default_factory=dict)
    """Of the whole run; set before the block ends."""


@contextmanager
def tracked(config: Config, run: RunDirectory, warn: Callable[[str], None]) -> Iterator[TrackedTraining]:
    """Pass on a training, and how the block ends: finished, interrupted or failed."""
    training = TrackedTraining(tracking_of(config, run, run, warn))
    try:
        yield training
    except BaseException as error:
        stopped = isinstance(error, (Interrupted, KeyboardInterrupt, SystemExit))
        training.tracking.close("interrupted" if stopped else "failed")
        raise
    training.tracking.close("finished", training.scores)


def final_scores(phase: str, summary: Mapping[str, Any]) -> dict[str, float]:
    """Means over the test volumes at the end of a phase, as ``final/PHASE/MEASURE/STRUCTURE``.

    Args:
        summary: of an evaluation, as JSON.
    """
    return {
        f"final/{phase}/{measure}/{structure}": float(values[measure]["mean"])
        for structure, values in summary["structures"].items()
        for measure in _MEASURES
        if values[measure]["mean"] is not None and math.isfinite(values[measure]["mean"])
    }
