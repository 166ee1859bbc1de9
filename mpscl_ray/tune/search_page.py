"""What ``progress.html`` shows of a search."""

from __future__ import annotations

import math
from typing import Any

from mpscl_ray.runs.curves import steps_and_curves
from mpscl_ray.runs.live_page import Content, LivePage, LiveTable
from mpscl_ray.runs.wording import counted
from mpscl_ray.tune.criteria import CRITERIA, score
from mpscl_ray.tune.display import trial_cells
from mpscl_ray.tune.study import TRIALS, Study

_MOST_NOTICES = 20


def search_page(study: Study) -> LivePage:
    """The page of a search, which its caller updates."""
    return LivePage(study.folder.progress_page, lambda: _content(study))


def _content(study: Study) -> Content:
    trials = list(study.ledger.trials.values())
    total, ended = study.sampler.total, sum(trial.ended for trial in trials)
    header, *rows = trial_cells(study)
    scored = [(value, trial) for trial in trials if (value := study.score(trial)) is not None and math.isfinite(value)]
    facts = [("trials", f"{ended} of {total} ended"), ("running", str(len(study.started)))]
    if scored:
        value, best = max(scored, key=lambda pair: pair[0])
        facts.append(("best so far", f"{value:.4f}, trial {best.number:03d} at iteration {best.iteration}"))
    return Content(
        title=f"Search {study.folder.name}",
        state=f"{counted(total, 'trial')}, compared by {CRITERIA[study.metric]}.",
        done=ended / total if total else 1.0,
        facts=facts,
        notices=[f"trial {t.number:03d} failed: {t.reason}" for t in trials if t.state == "failed"][-_MOST_NOTICES:],
        tables=[LiveTable(header, rows, [f"{TRIALS}/{trial.number:03d}/progress.html" for trial in trials])],
        curves=_curves(study),
    )


def _curves(study: Study) -> dict[str, Any]:
    """A curve for each trial."""
    found = {
        f"{trial.number:03d}": {at: score(values, study.metric) for at, values in dict(trial.reports).items()}
        for trial in list(study.ledger.trials.values())
        if trial.reports
    }
    return steps_and_curves(study.metric.replace("_", " "), found)
