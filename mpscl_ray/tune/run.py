"""One search, new or resumed, up to the best settings: what the tune command does."""

from __future__ import annotations

import shlex
from pathlib import Path

from mpscl_ray.config import default_settings
from mpscl_ray.config.systems import limiting_keys
from mpscl_ray.config.titles import phase_title
from mpscl_ray.distributed.ray_session import connect
from mpscl_ray.errors import ConfigError, Interrupted, TrainingError
from mpscl_ray.prepare import phantom_dataset
from mpscl_ray.runs.control_files import STOP_FILE
from mpscl_ray.runs.lifecycle import carry_out
from mpscl_ray.runs.live_page import LivePage
from mpscl_ray.runs.run_directory import RunDirectory, open_run
from mpscl_ray.runs.signals import Interruption, signals_end
from mpscl_ray.runs.storage import S3Path, join_location
from mpscl_ray.runs.trackers import check_installed
from mpscl_ray.runs.wording import counted
from mpscl_ray.train import run as train_run
from mpscl_ray.train.domains import load_domains
from mpscl_ray.train.ray import launch
from mpscl_ray.train.ray.concurrent import open_shared
from mpscl_ray.train.ray.placement_groups import release_orphaned_placement_groups
from mpscl_ray.train.ray.resources import check_machine
from mpscl_ray.train.ray.room import Room
from mpscl_ray.tune.criteria import CRITERIA
from mpscl_ray.tune.display import TrialTable, trial_rows
from mpscl_ray.tune.ledger import Ledger
from mpscl_ray.tune.ray_tune import run_study
from mpscl_ray.tune.results import PRESET, print_results, write_results
from mpscl_ray.tune.search_page import search_page
from mpscl_ray.tune.space import Space
from mpscl_ray.tune.study import LEDGER, Study
from mpscl_ray.tune.warm_start import choose_metric, train_shared_phases

MAY_CHANGE = (
    "search.num_samples",
    "search.evaluate",
    *(key for key in train_run.MAY_CHANGE if key != "run.validate_every"),
)
"""Keys that may differ when a search resumes: none of them changes what a trial computes or when it is compared."""

SPACE = "search.yaml"
"""File in the folder of a search with every setting that its trials depend on."""


def search(
    space: Space,
    command: list[str],
    *,
    warm_up: Path | S3Path | None = None,
    dashboard: bool = False,
    fit: launch.Fit | None = None,
) -> int:
    """Start or resume a search in its folder; returns the exit code."""
    check_machine(space.base)
    check_installed(space.base.run.loggers)
    run = space.base.run
    own = (SPACE, LEDGER, PRESET, "progress.html", "tensorboard")
    folder = open_run(join_location(run.storage, run.name), "command", 60 * run.storage_retry_minutes, own)
    if folder.exists:
        raise ConfigError(f"{folder.display_path} is the folder of a training run; give the search another run.name")
    folder.config_file = folder.path / SPACE
    folder.create(("logs", "results"))
    settings = space.to_yaml(warm_up)
    words = ["python", "-m", "mpscl_ray.tune", *command]
    with folder.lock():
        ledger = Ledger(folder.path / LEDGER, folder.store.flush)
        if folder.exists and ledger.trials:
            defaults = default_settings(space.base.method_name)
            for change in folder.check_config(settings, MAY_CHANGE, defaults=defaults):
                print(f"changed for the rest of the search: {change}", flush=True)
        train_run.warn_of_storage(folder)
        folder.write_config(settings)
        folder.write_environment(words)

        def work() -> None:
            with signals_end("before the search began"):
                phantom_dataset.check(space.base)
                parent = None if warm_up is None else open_run(warm_up)
                if parent is not None and not ledger.trials:
                    parent.require()
                datasets = space.base.data.source, space.base.data.target
                if not any(dataset.startswith(phantom_dataset.PREFIX) for dataset in datasets):
                    choose_metric(space.search.metric, load_domains(space.base)[0])
                with connect(dashboard=dashboard), release_orphaned_placement_groups(folder):
                    study = _search(space, folder, ledger, parent, fit)
            print_results(study)

        return carry_out(folder, shlex.join(words), work)


def _search(
    space: Space, folder: RunDirectory, ledger: Ledger, warm_up: RunDirectory | None, fit: launch.Fit | None
) -> Study:
    """The search once Ray runs: shared phases, trials, results."""
    folder.control_files.clear(STOP_FILE)  # of an earlier start
    resolved = phantom_dataset.resolve(space.base)
    shared, warnings = open_shared(resolved, folder, fit)
    for warning in warnings:
        print(f"warning: {warning}", flush=True)
    metric = choose_metric(space.search.metric, shared.domains)
    table: TrialTable | None = None

    def log(sentence: str) -> None:
        if table is None:
            print(sentence, flush=True)
        else:
            table.log(sentence)

    study = Study(space, resolved, folder, shared, metric, ledger, log)
    room = Room(resolved, shared.use_gpu)
    print(_summary(study, room.places), flush=True)
    with Interruption() as interruption:
        if study.remaining():
            parent = train_shared_phases(study, warm_up, room.places, interruption)
            if not interruption.requested:
                table = TrialTable(lambda: trial_rows(study))
                page = search_page(study) if resolved.run.progress_page else None
                try:
                    run_study(study, parent, room, interruption, lambda: _show(table, page))
                finally:
                    table.close()
                    if page is not None:
                        page.update(at_once=True)
        if interruption.requested and study.remaining():
            ended = sum(trial.ended for trial in ledger.trials.values())
            raise Interrupted(
                f"stopped by {interruption.signal_name}; {ended} of {study.sampler.total} trials have ended, "
                "those that had started have checkpoints"
            )
    with signals_end("during the evaluation"):
        write_results(study)
    failed = [trial for trial in ledger.trials.values() if trial.state == "failed"]
    if len(failed) == len(ledger.trials):
        raise TrainingError(f"all {len(failed)} trials failed, the first one because: {failed[0].reason}")
    return study


def _show(table: TrialTable, page: LivePage | None) -> None:
    table.redraw()
    if page is not None:
        page.update()


def _summary(study: Study, places: int) -> str:
    """What the search is going to do; ``places`` is how many trials fit at once on the nodes there are."""
    space, total = study.space, study.sampler.total
    before = sum(length for _, length in study.shared_phases)
    last = phase_title(study.resolved.schedule[-1][0])
    lines = [
        f"search {study.folder.name} in {study.folder.display_path}: {space.search.method}, "
        f"{counted(total, 'trial')} over "
        f"{', '.join(space.keys)}",
        f"  {counted(places, 'trial')} at a time with "
        f"{study.resolved.scaling.describe(study.shared.use_gpu)} each; "
        f"compared by {CRITERIA[study.metric]}" + (" (ORACLE)" if study.metric == "oracle" else ""),
    ]
    if before:
        names = " and ".join(phase_title(name) for name, _ in study.shared_phases)
        lines.append(
            f"  {names} ({before} iterations) are trained once for all trials: {(total - 1) * before} iterations less"
        )
    limits = limiting_keys(study.resolved, space.keys)
    if limits:
        lines.append(f"  {', '.join(limits)} act before the {last}, so trials share no more phases")
    search = space.search
    if study.rungs:
        rungs = ", ".join(f"{rung:g}" for rung in study.rungs)
        others = "the others wait" if search.scheduler == "pausing_asha" else "the others are stopped"
        lines.append(
            f"  trials are compared at iterations {rungs} of the {last}: the best 1/{search.reduction_factor:g} "
            f"continue and those that equal them, {others}"
        )
    elif search.scheduler != "fifo":
        lines.append(f"  no rung lies before iteration {study.iterations} of the {last}: no trial is stopped early")
    return "\n".join(lines)
