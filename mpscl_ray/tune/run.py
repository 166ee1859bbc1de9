"""One search from its start, or from where it stopped, to the best settings: what the tune command does."""

from __future__ import annotations

import shlex
from pathlib import Path

from mpscl_ray.distributed.ray_session import connect
from mpscl_ray.errors import ConfigError, Interrupted, TrainingError
from mpscl_ray.prepare import phantom_dataset
from mpscl_ray.runs.lifecycle import carry_out
from mpscl_ray.runs.run_directory import RunDirectory, open_run
from mpscl_ray.runs.signals import Interruption, signals_end
from mpscl_ray.runs.storage import S3Path, join_location
from mpscl_ray.train import run as train_run
from mpscl_ray.train.domains import load_domains
from mpscl_ray.train.ray import launch
from mpscl_ray.train.ray.concurrent import open_shared
from mpscl_ray.train.ray.placement_groups import release_orphaned_placement_groups
from mpscl_ray.train.ray.resources import check_machine
from mpscl_ray.tune.criteria import CRITERIA
from mpscl_ray.tune.display import Board, short_key, trial_rows
from mpscl_ray.tune.ledger import Ledger
from mpscl_ray.tune.results import PRESET, print_results, write_results
from mpscl_ray.tune.shared_phases import limiting_keys
from mpscl_ray.tune.space import Space
from mpscl_ray.tune.study import LEDGER, Study
from mpscl_ray.tune.warm_start import choose_metric, shared_beginning

MAY_CHANGE = ("search.trials", "search.evaluate", *(key for key in train_run.MAY_CHANGE if key != "run.validate_every"))
"""Keys that a search which goes on may set anew; none of them changes what a trial computes or when it
is compared."""

SPACE = "search.yaml"
"""File in the folder of a search with all that decides on its trials."""


def search(
    space: Space,
    command: list[str],
    *,
    warm_up: Path | S3Path | None = None,
    dashboard: bool = False,
    fit: launch.Fit | None = None,
) -> int:
    """Carry out a search in its folder, from the start or from where it was stopped; returns the exit code."""
    check_machine(space.base)
    run = space.base.run
    own = (SPACE, LEDGER, PRESET, "tensorboard")
    folder = open_run(join_location(run.storage, run.name), "command", 60 * run.outage_min, own)
    if folder.exists:
        raise ConfigError(f"{folder.display_path} is the folder of a training run; give the search another run.name")
    folder.config_file = folder.path / SPACE
    folder.create(("logs", "results"))
    settings = space.to_yaml(warm_up)
    words = ["python", "-m", "mpscl_ray.tune", *command]
    with folder.lock():
        ledger = Ledger(folder.path / LEDGER, folder.store.flush)
        if folder.exists and ledger.trials:
            for change in folder.check_config(settings, MAY_CHANGE):
                print(f"changed for the rest of the search: {change}", flush=True)
        train_run.warn_of_storage(folder)
        folder.write_config(settings)
        folder.write_environment(words)

        def work() -> None:
            with signals_end("before the search began"):
                if not any(value.startswith(phantom_dataset.PREFIX) for value in _datasets(space)):
                    choose_metric(space.search.metric, load_domains(space.base)[0])
                with connect(dashboard=dashboard), release_orphaned_placement_groups(folder):
                    parent = None if warm_up is None else open_run(warm_up)
                    study = _search(space, folder, ledger, parent, fit)
            print_results(study)

        return carry_out(folder, shlex.join(words), work)


def _datasets(space: Space) -> tuple[str, str]:
    return space.base.data.source, space.base.data.target


def _search(
    space: Space, folder: RunDirectory, ledger: Ledger, warm_up: RunDirectory | None, fit: launch.Fit | None
) -> Study:
    """The search on a Ray that runs: shared phases, trials, results."""
    resolved = phantom_dataset.resolve(space.base)
    shared, warnings = open_shared(resolved, folder, fit)
    for warning in warnings:
        print(f"warning: {warning}", flush=True)
    metric = choose_metric(space.search.metric, shared.domains)
    board: Board | None = None

    def say(sentence: str) -> None:
        if board is None:
            print(sentence, flush=True)
        else:
            board.say(sentence)

    study = Study(space, resolved, folder, shared, metric, ledger, say)
    print(_summary(study), flush=True)
    with Interruption() as interruption:
        if study.remaining():
            parent = shared_beginning(resolved, space.keys, folder, shared, warm_up, interruption, say)
            if not interruption.requested:
                board = Board(lambda: _table(study))
                try:
                    study.run(parent, interruption, board.look)
                finally:
                    board.close()
        if interruption.requested and study.remaining():
            ended = sum(trial.ended for trial in ledger.trials.values())
            raise Interrupted(
                f"stopped by {interruption.signal_name}; {ended} of {study.draws.total} trials have ended, "
                "those that ran have checkpoints"
            )
    with signals_end("during the evaluation"):
        write_results(study)
    failed = [trial for trial in ledger.trials.values() if trial.state == "failed"]
    if len(failed) == len(ledger.trials):
        raise TrainingError(f"all {len(failed)} trials failed, the first because: {failed[0].reason}")
    return study


def _table(study: Study) -> list[str]:
    return trial_rows(
        list(study.ledger.trials.values()),
        {key: short_key(key) for key in study.space.keys},
        study.started,
        study.draws.total,
        study.iterations,
        study.score,
        study.metric.replace("_", " "),
    )


def _summary(study: Study) -> str:
    """What will be done, before it is."""
    space, total, max_concurrent = study.space, study.draws.total, study.shared.max_concurrent
    before = sum(length for _, length in study.common)
    last = study.resolved.schedule[-1][0].replace("_", " ")
    lines = [
        f"search {study.folder.name} in {study.folder.display_path}: {space.search.method}, {total} trials over "
        f"{', '.join(space.keys)}",
        f"  {max_concurrent} trial{'s' * (max_concurrent > 1)} at a time with "
        f"{study.resolved.scaling.describe(study.shared.use_gpu)} each; "
        f"compared by {CRITERIA[study.metric]}" + (" (ORACLE)" if study.metric == "oracle" else ""),
    ]
    if before:
        names = " and ".join(name.replace("_", " ") for name, _ in study.common)
        lines.append(
            f"  {names} ({before} iterations) are trained once for all trials: {(total - 1) * before} iterations less"
        )
    limits = limiting_keys(study.resolved, space.keys)
    if limits:
        lines.append(f"  {', '.join(limits)} act before the {last}, so trials share no more than that")
    if study.rungs:
        rungs = ", ".join(f"{rung:g}" for rung in study.rungs)
        share = f"1/{space.search.reduction:g}"
        lines.append(f"  trials wait at iterations {rungs} of the {last}; the best {share} of those there go on")
    return "\n".join(lines)
