"""What a search comes to: the best trial and its preset, the table of trials, and how much training was saved."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpscl_ray.config import to_yaml
from mpscl_ray.tune.agreement import Agreement, agreement
from mpscl_ray.tune.criteria import CRITERIA, ORACLE, score
from mpscl_ray.tune.ledger import Trial
from mpscl_ray.tune.space import Space


def best_trial(trials: Sequence[Trial], metric: str) -> Trial | None:
    """The trial with the highest last score among those trained in full; among the stopped ones where none was.

    None where no trial has a score.
    """
    scored = [trial for trial in trials if trial.reports and trial.state != "failed"]
    scored = [trial for trial in scored if math.isfinite(score(trial.last, metric))]
    return max(
        scored,
        key=lambda trial: (trial.state == "finished", score(trial.last, metric), -trial.number),
        default=None,
    )


@dataclass(frozen=True)
class Saving:
    """Iterations that a search took, and what training every trial in full and alone would have.

    Attributes:
        done: of the trials' own phases.
        in_full: the same, had no trial been stopped.
        shared: of the phases that all trials share, trained once.
        trials: how many shared them.
    """

    done: int
    in_full: int
    shared: int
    trials: int

    @property
    def fraction(self) -> float:
        """Own iterations done over those in full."""
        return self.done / self.in_full if self.in_full else math.nan

    def sentence(self) -> str:
        """For a person."""
        alone = self.in_full + self.trials * self.shared
        text = (
            f"trials took {self.done} iterations of {self.in_full} had all been trained in full "
            f"({100 * self.fraction:.0f} %)"
        )
        if self.shared:
            text += (
                f"; {self.shared} iterations of earlier phases were trained once instead of {self.trials} times: "
                f"in all {self.done + self.shared} of {alone} ({100 * (self.done + self.shared) / alone:.0f} %)"
            )
        return text


def saving(trials: Sequence[Trial], iterations: int, own_before: int, shared: int) -> Saving:
    """Count iterations.

    Args:
        trials: that have begun; a failed one counts as far as it came, on both sides.
        iterations: of the last phase in full.
        own_before: iterations before the last phase that each trial trained itself.
        shared: iterations that were trained once for all.
    """
    done = sum(own_before + trial.iteration for trial in trials)
    full = sum(own_before + (trial.iteration if trial.state == "failed" else iterations) for trial in trials)
    return Saving(done, full, shared, len(trials))


def agreements(trials: Sequence[Trial]) -> dict[str, Agreement]:
    """How label-free criteria agree with target Dice over the trials trained in full; {} without target labels."""
    records = [trial.last for trial in trials if trial.state == "finished"]
    found = {name: agreement(records, name) for name in CRITERIA if name != ORACLE}
    return {name: value for name, value in found.items() if value is not None}


def preset_text(space: Space, trial: Trial, metric: str) -> str:
    """The best settings as a preset that the train command reads."""
    config = space.config(trial.settings)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, name=f"{space.base.run.name}-best"))
    note = "target validation labels chose it: an oracle" if metric == ORACLE else "no target label was used"
    heading = (
        f"# Trial {trial.number} of the search {space.base.run.name}: {metric} {score(trial.last, metric):.4f} on "
        f"validation volumes ({note}).\n"
    )
    settings = "".join(f"#   {key}: {json.dumps(value)}\n" for key, value in trial.settings.items())
    return heading + settings + to_yaml(config)


def _columns(trials: Sequence[Trial], keys: Sequence[str]) -> tuple[list[str], list[list[Any]]]:
    scores = [name for name in CRITERIA if any(math.isfinite(score(trial.last, name)) for trial in trials)]
    header = ["trial", "state", "iteration", *keys, *scores, "seconds", "reason"]
    rows: list[list[Any]] = []
    for trial in trials:
        values = [score(trial.last, name) for name in scores]
        rows.append(
            [
                trial.number,
                trial.state or "unfinished",
                trial.iteration,
                *(trial.settings[key] for key in keys),
                *("" if math.isnan(value) else value for value in values),
                trial.seconds,
                trial.reason,
            ]
        )
    return header, rows


def trials_csv(trials: Sequence[Trial], keys: Sequence[str]) -> str:
    """A line per trial: state, settings, every criterion at its last validation."""
    buffer = io.StringIO()
    header, rows = _columns(trials, keys)
    csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
    return buffer.getvalue()


def trials_markdown(trials: Sequence[Trial], keys: Sequence[str], metric: str) -> str:
    """The same as a Markdown table, best trials first."""
    ranked = sorted(
        trials,
        key=lambda t: (t.state == "finished", t.iteration, score(t.last, metric) if t.reports else -math.inf),
        reverse=True,
    )
    header, rows = _columns(ranked, keys)
    header = [f"{name} (oracle: target Dice)" if name == ORACLE else name.rpartition(".")[2] for name in header]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell).replace("|", "\\|") for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def agreements_text(found: Mapping[str, Agreement], metric: str) -> str:
    """How far the criteria can be trusted, as lines for a terminal."""
    lines = ["criterion                  rank correlation with target Dice   Dice lost by its pick"]
    for name, value in sorted(found.items(), key=lambda item: -_or_least(item[1].correlation)):
        mark = " (chosen)" if name == metric else ""
        lines.append(f"{name:26s} {value.correlation:33.2f} {value.regret:23.4f}{mark}")
    return "\n".join(lines)


def _or_least(value: float) -> float:
    return -2.0 if math.isnan(value) else value
