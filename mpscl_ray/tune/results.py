"""The files that a search leaves when it is over, and what it prints."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpscl_ray.evaluate.evaluation import json_text, write_tables
from mpscl_ray.evaluate.run import evaluate_phases
from mpscl_ray.evaluate.tables import Summary, format_table, summary_csv
from mpscl_ray.runs.atomic_files import write_atomically
from mpscl_ray.runs.storage import join_location
from mpscl_ray.tune import figures
from mpscl_ray.tune.criteria import CRITERIA, ORACLE, score
from mpscl_ray.tune.display import short, short_key
from mpscl_ray.tune.ledger import Trial
from mpscl_ray.tune.study import TRIALS, Study
from mpscl_ray.tune.summary import (
    Saving,
    agreements,
    agreements_text,
    best_trial,
    preset_text,
    saving,
    trials_csv,
    trials_markdown,
)

PRESET = "best.yaml"
ENOUGH_TRIALS = 5
"""From so many trials in full on, rank correlations are shown."""

TEST_TABLE = "test.txt"
"""Scores of the evaluated trials on the target's test volumes; ``test.md``, ``.csv`` and ``.json`` have the same."""
_TEST_JSON = "test.json"


def write_results(study: Study) -> None:
    """Write the preset, tables and pictures of a search that is over, and evaluate what search.evaluate asks for."""
    trials, keys, metric = _trials(study), study.space.keys, study.metric
    best = best_trial(trials, metric)
    results = study.folder.results
    results.mkdir(exist_ok=True)
    found = agreements(trials)
    summary = {
        "metric": metric,
        "oracle": metric == ORACLE,
        "best": None if best is None else best.number,
        "settings": None if best is None else best.settings,
        "score": None if best is None else score(best.last, metric),
        "trials": {state: sum(t.state == state for t in trials) for state in ("finished", "stopped", "failed")},
        "iterations": asdict(search_saving(study)),
        "criteria": {name: {k: _plain(v) for k, v in asdict(value).items()} for name, value in found.items()},
    }
    write_tables(
        results,
        {
            "trials.csv": trials_csv(trials, keys),
            "trials.md": trials_markdown(trials, keys, metric),
            "summary.json": json.dumps(summary, indent=1, allow_nan=False) + "\n",
        },
    )
    figures.curves(trials, metric, study.rungs, best.number if best else None, results / "curves.png")
    figures.parallel_coordinates(trials, study.space.distributions, metric, results / "parallel.png")
    figures.effects(trials, study.space.distributions, metric, results / "effects.png")
    if best is not None:
        write_atomically(study.folder.path / PRESET, preset_text(study.space, best, metric).encode())
    _evaluate(study, trials, best)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _trials(study: Study) -> list[Trial]:
    return [trial for _, trial in sorted(study.ledger.trials.items())]


def search_saving(study: Study) -> Saving:
    """Iterations of a search."""
    schedule, common = study.resolved.schedule, sum(length for _, length in study.common)
    own_before = sum(length for _, length in schedule[:-1]) - common
    return saving(_trials(study), study.iterations, own_before, common)


def _evaluate(study: Study, trials: list[Trial], best: Trial | None) -> None:
    """Score trials that were trained in full on the target's test volumes."""
    chosen = [trial for trial in trials if trial.state == "finished"]
    if study.space.search.evaluate != "all":
        chosen = [trial for trial in chosen if trial is best and study.space.search.evaluate == "best"]
    phases = [name for name, _ in study.resolved.schedule]
    # The phases before the last are the same for all that share them, and only the best trial shows them.
    wanted = {str(trial.number): phases if len(chosen) == 1 else phases[-1:] for trial in chosen}
    if _evaluated(study.folder.results / _TEST_JSON) == wanted:
        return
    rows: dict[str, Summary] = {}
    split = ""
    for trial in chosen:
        done = evaluate_phases(study.trial_folder(trial.number).uri, wanted[str(trial.number)], progress=False)
        for phase, evaluation in done.items():
            label = phase.replace("_", " ") if phase != phases[-1] else _label(study, trial)
            rows[label], split = evaluation.summary, evaluation.split
    if rows:
        volumes = next(iter(rows.values())).volumes
        heading = f"{volumes} labelled {'test' if split == 'test' else 'validation'} volumes of the target, " + (
            "by which trials were compared too"
            if split == "val" and study.metric == ORACLE
            else "by which nothing was chosen"
        )
        write_tables(
            study.folder.results,
            {
                TEST_TABLE: f"{heading}\n\n{format_table(rows)}\n",
                "test.md": f"{heading}\n\n{format_table(rows, style='markdown')}\n",
                "test.csv": summary_csv(rows),
                _TEST_JSON: json_text(
                    {"trials": wanted, "rows": {label: row.to_json() for label, row in rows.items()}}
                ),
            },
        )


def _evaluated(file: Path) -> dict[str, list[str]]:
    """Phases of each trial that an earlier evaluation has scored; {} before the first."""
    try:
        found: dict[str, list[str]] = json.loads(file.read_bytes())["trials"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found


def _label(study: Study, trial: Trial) -> str:
    """A trial by its settings, such as ``trial 2: margin_source = margin_target = 0.2``."""
    parts = [
        " = ".join([*map(short_key, entry.keys), short(trial.settings[entry.keys[0]])])
        for entry in study.space.distributions
    ]
    return f"trial {trial.number}" if len(parts) > 3 else f"trial {trial.number}: {', '.join(parts)}"


def print_results(study: Study) -> None:
    """Tell what was found, how far it can be trusted, and what to do next."""
    trials = _trials(study)
    best = best_trial(trials, study.metric)
    counts = {state: sum(trial.state == state for trial in trials) for state in ("finished", "stopped", "failed")}
    print(
        f"\n{len(trials)} trials: {counts['finished']} trained in full, {counts['stopped']} stopped early, "
        f"{counts['failed']} failed; {search_saving(study).sentence()}"
    )
    for trial in trials:
        if trial.state == "failed":
            print(f"  trial {trial.number:03d} failed: {trial.reason}")
    if best is not None:
        own = f"{study.metric} {score(best.last, study.metric):.4f} ({CRITERIA[study.metric]})"
        print(f"best: trial {best.number:03d}, {own}")
        for key, value in best.settings.items():
            print(f"  {key} = {short(value)}")
    found = agreements(trials)
    number = max((value.trials for value in found.values()), default=0)
    if number >= ENOUGH_TRIALS:
        print(f"\nlabel-free criteria against target Dice, {number} trials in full")
        print(agreements_text(found, study.metric))
    table = study.folder.results / TEST_TABLE
    if table.exists():
        print(f"\n{table.read_text(encoding='utf-8')}")
    place = study.folder.display_path
    print(f"\n{place} has tables and pictures (results/), TensorBoard events with HParams, and the trials. Next:")
    if best is not None:
        print(f"  python -m mpscl_ray.train {join_location(place, PRESET)}          the best settings, trained anew")
        if best.state == "finished":
            run = join_location(place, TRIALS, f"{best.number:03d}")
            print(
                f"  python -m mpscl_ray.predict {run} IMAGE.nii.gz --out predictions          the best trial as it is"
            )
    print(f"  tensorboard --logdir {join_location(place, 'tensorboard')}")
