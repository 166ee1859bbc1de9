"""What a search results in: the best trial and its preset, tables and figures, and how much training was saved."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpscl_ray.config import override, to_yaml
from mpscl_ray.evaluate.evaluation import PROTOCOLS, write_rows
from mpscl_ray.evaluate.run import evaluate_phases
from mpscl_ray.evaluate.table_files import without_nan, write_tables
from mpscl_ray.evaluate.tables import Summary, csv_text
from mpscl_ray.runs import json_output, safe_json
from mpscl_ray.runs.atomic_files import write_atomically
from mpscl_ray.runs.next_steps import command_line, logger_lines
from mpscl_ray.runs.storage import join_location
from mpscl_ray.runs.wording import counted
from mpscl_ray.train.ray.resources import evaluation_place
from mpscl_ray.tune import figures
from mpscl_ray.tune.agreement import agreements, agreements_text
from mpscl_ray.tune.criteria import CRITERIA, ORACLE, score
from mpscl_ray.tune.display import short_key, short_value
from mpscl_ray.tune.ledger import Trial
from mpscl_ray.tune.space import Space
from mpscl_ray.tune.study import TRIALS, Study

PRESET = "best.yaml"
ENOUGH_TRIALS = 5
"""Rank correlations are shown from this number of trials in full."""

SUMMARY = "summary.json"
"""Best trial, number of trials, iterations, criteria."""

TEST_TABLE = "test.txt"
"""Scores of the evaluated trials on the target's test volumes; ``test.md``, ``.csv`` and ``.json`` have the same."""


def best_trial(trials: Sequence[Trial], metric: str) -> Trial | None:
    """The trial with the highest last score among those trained in full; where none was, among those trained longest.

    None where no trial has a score.
    """
    scored = [t for t in trials if t.state != "failed" and math.isfinite(score(t.last, metric))]
    return max(
        scored, key=lambda t: (t.state == "finished", t.iteration, score(t.last, metric), -t.number), default=None
    )


@dataclass(frozen=True)
class Saving:
    """Iterations that a search took, and those that training every trial in full and alone would have taken."""

    done: int
    """Of the trials' own phases."""
    in_full: int
    """The same, had no trial been stopped; a failed trial counts up to where it failed."""
    shared: int
    """Of the phases that all trials share, trained once."""
    trials: int
    """How many shared them."""

    def sentence(self) -> str:
        """For the terminal."""
        alone, all_done = self.in_full + self.trials * self.shared, self.done + self.shared
        text = (
            f"trials took {self.done} iterations of {self.in_full} had all been trained in full "
            f"({100 * self.done / self.in_full if self.in_full else math.nan:.0f} %)"
        )
        if self.shared:
            text += (
                f"; {self.shared} iterations of earlier phases were trained once instead of {self.trials} times: "
                f"in all {all_done} of {alone} ({100 * all_done / alone:.0f} %)"
            )
        return text


def saving(study: Study) -> Saving:
    """Count the iterations of a search."""
    trials, shared = study.ledger.trials.values(), sum(length for _, length in study.shared_phases)
    own_before = sum(length for _, length in study.resolved.schedule[:-1]) - shared
    done = sum(own_before + trial.iteration for trial in trials)
    full = sum(own_before + (trial.iteration if trial.state == "failed" else study.iterations) for trial in trials)
    return Saving(done, full, shared, len(trials))


def preset_text(space: Space, trial: Trial, metric: str) -> str:
    """The best settings as a preset that the train command reads."""
    config = override(space.config(trial.settings), {"run.name": f"{space.base.run.name}-best"})
    note = "target validation labels chose it: an oracle" if metric == ORACLE else "no target label was used"
    heading = (
        f"# Trial {trial.number} of the search {space.base.run.name}: {metric} {score(trial.last, metric):.4f} on "
        f"validation volumes ({note}).\n"
    )
    settings = "".join(f"#   {key}: {json.dumps(value)}\n" for key, value in trial.settings.items())
    return heading + settings + to_yaml(config)


def _trial_table(trials: Sequence[Trial], keys: Sequence[str]) -> tuple[list[str], list[list[Any]]]:
    scores = [name for name in CRITERIA if any(math.isfinite(score(trial.last, name)) for trial in trials)]
    header = ["trial", "state", "iteration", *keys, *scores, "seconds", "reason"]
    rows: list[list[Any]] = []
    for trial in trials:
        about = [trial.number, trial.state or "unfinished", trial.iteration]
        settings = [trial.settings[key] for key in keys]
        values = ["" if math.isnan(value) else value for value in (score(trial.last, name) for name in scores)]
        rows.append([*about, *settings, *values, trial.seconds, trial.reason])
    return header, rows


def trials_csv(trials: Sequence[Trial], keys: Sequence[str]) -> str:
    """A line per trial: state, settings, every criterion at its last validation."""
    header, rows = _trial_table(trials, keys)
    return csv_text([header, *rows])


def trials_markdown(trials: Sequence[Trial], keys: Sequence[str], metric: str) -> str:
    """The same as a Markdown table, best trials first."""

    def rank(trial: Trial) -> tuple[bool, int, float]:
        return trial.state == "finished", trial.iteration, score(trial.last, metric) if trial.reports else -math.inf

    ranked = sorted(trials, key=rank, reverse=True)
    header, rows = _trial_table(ranked, keys)
    header = [f"{name} (oracle: target Dice)" if name == ORACLE else short_key(name) for name in header]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell).replace("|", "\\|") for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_results(study: Study) -> None:
    """Write the preset, tables and figures of a finished search, and evaluate the trials that search.evaluate names."""
    trials, keys, metric = _trials(study), study.space.keys, study.metric
    best = best_trial(trials, metric)
    results = study.folder.results
    results.mkdir(exist_ok=True)
    found = agreements(trials)
    content = {
        "metric": metric,
        "oracle": metric == ORACLE,
        "best": None if best is None else best.number,
        "settings": None if best is None else best.settings,
        "score": None if best is None else score(best.last, metric),
        "trials": _counts(trials),
        "iterations": asdict(saving(study)),
        "criteria": {name: without_nan(asdict(value)) for name, value in found.items()},
    }
    write_tables(
        results,
        {
            "trials.csv": trials_csv(trials, keys),
            "trials.md": trials_markdown(trials, keys, metric),
            SUMMARY: json.dumps(content, indent=1, allow_nan=False) + "\n",
        },
    )
    figures.curves(trials, metric, study.rungs, best.number if best else None, results / "curves.png")
    figures.parallel_coordinates(trials, study.space.distributions, metric, results / "parallel.png")
    figures.effects(trials, study.space.distributions, metric, results / "effects.png")
    if best is not None:
        write_atomically(study.folder.path / PRESET, preset_text(study.space, best, metric).encode())
    _evaluate(study, trials, best)


def _counts(trials: Sequence[Trial]) -> dict[str, int]:
    return {state: sum(trial.state == state for trial in trials) for state in ("finished", "stopped", "failed")}


def _trials(study: Study) -> list[Trial]:
    return [trial for _, trial in sorted(study.ledger.trials.items())]


def _evaluate(study: Study, trials: list[Trial], best: Trial | None) -> None:
    """Score trials that were trained in full on the target's test volumes."""
    chosen = [trial for trial in trials if trial.state == "finished"]
    if study.space.search.evaluate != "all":
        chosen = [trial for trial in chosen if trial is best and study.space.search.evaluate == "best"]
    phases = [name for name, _ in study.resolved.schedule]
    # Earlier phases are the same for all trials that share them: only a single trial has rows of them.
    wanted = {str(trial.number): phases if len(chosen) == 1 else phases[-1:] for trial in chosen}
    if _evaluated_phases(study.folder.results / "test.json") == wanted:
        return
    rows: dict[str, Summary] = {}
    split = protocol = ""
    place = evaluation_place(study.resolved, study.shared.use_gpu)
    for trial in chosen:
        run = study.trial_folder(trial.number).uri
        done = evaluate_phases(run, wanted[str(trial.number)], progress=False, place=place)
        for phase, evaluation in done.items():
            label = phase if phase != phases[-1] else _label(study, trial)
            rows[label], split, protocol = evaluation.summary, evaluation.split, evaluation.protocol
    if rows:
        volumes = next(iter(rows.values())).volumes
        kind = "test" if split == "test" else "validation"
        heading = f"{counted(volumes, f'labelled {kind} volume')} of the target, " + (
            "also used to compare trials" if split == "val" and study.metric == ORACLE else "not used for any choice"
        )
        heading += f"; scored: {PROTOCOLS[protocol]}"
        write_rows(study.folder.results, "test", heading, rows, {"trials": wanted})


def _evaluated_phases(file: Path) -> dict[str, list[str]]:
    """Phases of each trial that an earlier evaluation has scored; {} where there was none."""
    try:
        return dict(safe_json.read(file)["trials"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _label(study: Study, trial: Trial) -> str:
    """A trial by its settings, such as ``trial 2: margin_source = margin_target = 0.2``."""
    parts = [
        " = ".join([*map(short_key, entry.keys), short_value(trial.settings[entry.keys[0]])])
        for entry in study.space.distributions
    ]
    return f"trial {trial.number}" if len(parts) > 3 else f"trial {trial.number}: {', '.join(parts)}"


def print_results(study: Study) -> None:
    """Print the best trial, how well its criterion agrees with target Dice, and what to do next."""
    trials = _trials(study)
    best = best_trial(trials, study.metric)
    counts = _counts(trials)
    print(
        f"\n{counted(len(trials), 'trial')}: {counts['finished']} trained in full, {counts['stopped']} stopped early, "
        f"{counts['failed']} failed; {saving(study).sentence()}"
    )
    for trial in trials:
        if trial.state == "failed":
            print(f"  trial {trial.number:03d} failed: {trial.reason}")
    if best is not None:
        own = f"{study.metric} {score(best.last, study.metric):.4f} ({CRITERIA[study.metric]})"
        print(f"best: trial {best.number:03d}, {own}")
        for key, value in best.settings.items():
            print(f"  {key} = {short_value(value)}")
    found = agreements(trials)
    number = max((value.trials for value in found.values()), default=0)
    if number >= ENOUGH_TRIALS:
        print(f"\nlabel-free criteria against target Dice, {counted(number, 'trial')} in full")
        print(agreements_text(found, study.metric))
    table = study.folder.results / TEST_TABLE
    if table.exists():
        print(f"\n{table.read_text(encoding='utf-8')}")
    location = study.folder.display_path
    following = {}
    if best is not None:
        following[command_line("train", join_location(location, PRESET))] = "  # the best settings, from scratch"
        if best.state == "finished":
            run = join_location(location, TRIALS, f"{best.number:03d}")
            following[command_line("predict", run, "IMAGE.nii.gz", "--out", "predictions")] = "  # with the best trial"
    following |= dict.fromkeys(logger_lines(join_location(location), study.resolved.run.loggers), "")
    print(f"\n{location} has tables and figures (results/), and the trials. Next:")
    for line, remark in following.items():
        print(f"  {line}{remark}")
    json_output.report(
        folder=location,
        preset=None if best is None else join_location(location, PRESET),
        **safe_json.read_object(study.folder.results / SUMMARY),
        next=list(following),
    )
