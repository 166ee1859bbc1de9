"""``python -m mpscl_ray.tune``: search for the settings of a method, on this machine or on a Ray cluster."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

import yaml

from mpscl_ray import cli, launch, phantom_dataset, train
from mpscl_ray.bucket_run import open_run
from mpscl_ray.capacity import check_machine
from mpscl_ray.cluster_session import connect
from mpscl_ray.config import describe_keys, preset_names
from mpscl_ray.errors import ConfigError, Interrupted, MpsclError, TrainingError
from mpscl_ray.interruption import Interruption, signals_end
from mpscl_ray.places import places_of_killed_commands_given_back
from mpscl_ray.run_folder import RunFolder
from mpscl_ray.search.beginning import choose_metric, shared_beginning
from mpscl_ray.search.criteria import CRITERIA, LABEL_FREE
from mpscl_ray.search.ledger import Ledger
from mpscl_ray.search.results import PRESET, print_results, write_results
from mpscl_ray.search.settings import describe_search
from mpscl_ray.search.sharing import limiting_keys, shared_phases
from mpscl_ray.search.space import EXAMPLE, Space, describe_spaces, load_space
from mpscl_ray.search.study import LEDGER, Study
from mpscl_ray.search.terminal import Board, short_key, trial_rows
from mpscl_ray.storage import child
from mpscl_ray.trial import open_shared

MAY_CHANGE = ("search.trials", "search.evaluate", *(key for key in train.MAY_CHANGE if key != "run.validate_every"))
"""Keys that a search which goes on may set anew; none of them changes what a trial computes or when it
is compared."""

SPACE = "search.yaml"
"""File in the folder of a search with all that decides on its trials."""

_EXAMPLES = """\
examples:
  python -m mpscl_ray.tune                                   a small space on the phantom hearts
  python -m mpscl_ray.tune mpscl data.source=data/mr data.target=data/ct search.trials=32
  python -m mpscl_ray.tune contrastive preset=small/mpscl data.source=data/bssfp data.target=data/lge
  python -m mpscl_ray.tune contrastive data.source=data/mr data.target=data/ct --warm-up runs/mr2ct
  python -m mpscl_ray.tune my_space.yaml --metric information --show
  ray job submit --working-dir . -- python -m mpscl_ray.tune mpscl run.storage=/shared/runs
  python -m mpscl_ray.tune mpscl data.source=s3://hearts/mr data.target=s3://hearts/ct run.storage=s3://hearts/runs

The same command again goes on with a search that was stopped: no trial is run twice. Trials run side by side as far as
the cluster goes; scaling.workers is what one of them takes.
"""


def main(arguments: Sequence[str], fit: launch.Fit = launch.fit_on_ray) -> int:
    """Search, and leave the best settings as a preset, with tables and pictures.

    Args:
        arguments: of the command line.
        fit: what trains.

    Returns:
        The exit code: 0, or 130 when the search was stopped and can go on.
    """
    spaces = "spaces:\n" + "\n".join(f"  {name:14s} {text}" for name, text in describe_spaces())
    criteria = "\n".join(f"  {name:24s} {text}" for name, text in CRITERIA.items())
    parser = argparse.ArgumentParser(
        prog="python -m mpscl_ray.tune",
        description="Search for the settings of a method; the best trials go on, others are stopped (ASHA).",
        epilog=(
            f"{_EXAMPLES}\n{spaces}\n\na space is a YAML file such as\n{EXAMPLE}\n"
            f"criteria (search.metric), larger is better; label-free default: {LABEL_FREE}\n{criteria}\n\n"
            f"settings of a search, with their defaults:\n{describe_search()}\n\n"
            f"presets: {', '.join(preset_names())}\n\n"
            f"settings of the trials, with their defaults:\n{describe_keys()}\n\n{cli.EXIT_CODES}"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("settings", nargs="*", metavar="SPACE | key=value", help="space (default: phantom), preset=NAME and settings")
    add("--metric", help="what trials are compared by, short for search.metric")
    add("--warm-up", metavar="RUN", help="folder, or URL, of a run whose first phases all trials go on from")
    add("--show", action="store_true", help="print the checked search as YAML and what trials share, and stop")
    add("--dashboard", action="store_true", help="serve the Ray dashboard of a Ray started here")
    options = parser.parse_intermixed_args(list(arguments))
    words = list(options.settings)
    spaces_given = [word for word in words if "=" not in word]
    if len(spaces_given) > 1:
        raise ConfigError(f"{' and '.join(spaces_given)} are two spaces, expected one; settings are written key=value")
    overrides = [word for word in words if "=" in word]
    if options.metric is not None:
        overrides.append(f"search.metric={options.metric}")
    space = load_space(spaces_given[0] if spaces_given else "phantom", overrides)
    given = None if options.warm_up is None else open_run(options.warm_up)
    if options.show:
        shared = ", ".join(name for name, _ in shared_phases(space.base, space.keys)) or "nothing"
        print(f"# shared by all trials: {shared}\n{_yaml(space, given)}", end="")
        return 0
    return search(space, list(arguments), warm_up=given, dashboard=options.dashboard, fit=fit)


def search(
    space: Space,
    command: list[str],
    *,
    warm_up: RunFolder | None = None,
    dashboard: bool = False,
    fit: launch.Fit = launch.fit_on_ray,
) -> int:
    """Carry out a search in its folder, from the start or from where it was stopped; returns the exit code."""
    check_machine(space.base)
    run = space.base.run
    own = (SPACE, LEDGER, PRESET, "tensorboard")
    folder = open_run(child(run.storage, run.name), "command", 60 * run.outage_min, own)
    if folder.exists:
        raise ConfigError(f"{folder.place} is the folder of a training run; give the search another run.name")
    folder.config_file = folder.path / SPACE
    folder.create(("logs", "results"))
    words = ["python", "-m", "mpscl_ray.tune", *command]
    resume = shlex.join(words)
    with folder.lock():
        ledger = Ledger(folder.path / LEDGER, folder.settle)
        if folder.exists and ledger.trials:
            for change in folder.check_config(_yaml(space, warm_up), MAY_CHANGE):
                print(f"changed for the rest of the search: {change}", flush=True)
        train.warn_of_storage(folder)
        folder.write_config(_yaml(space, warm_up))
        folder.write_environment(words)
        folder.write_status("running", resume_command=resume)
        try:
            with signals_end("before the search began"):
                if not any(value.startswith(phantom_dataset.PREFIX) for value in _datasets(space)):
                    choose_metric(space.search.metric, launch.load_domains(space.base)[0])
                with connect(dashboard=dashboard), places_of_killed_commands_given_back(folder):
                    study = _search(space, folder, ledger, warm_up, fit)
        except (Interrupted, SystemExit) as stop:
            reason = str(stop) if isinstance(stop, Interrupted) else "stopped by SIGTERM while Ray started or ended"
            folder.write_status("interrupted", exit_code=Interrupted.exit_code, reason=reason)
            print(f"{reason}; to go on:\n  {resume}", flush=True)
            return Interrupted.exit_code
        except MpsclError as error:
            folder.write_status("failed", exit_code=error.exit_code, reason=str(error))
            raise
        except BaseException as error:
            folder.write_status("failed", exit_code=1, reason=f"{type(error).__name__}: {error}")
            raise
        folder.write_status("finished", exit_code=0)
        print_results(study)
    return 0


def _datasets(space: Space) -> tuple[str, str]:
    return space.base.data.source, space.base.data.target


def _yaml(space: Space, warm_up: RunFolder | None) -> str:
    """All that decides on the trials."""
    content = {**space.to_dict(), "warm_up": None if warm_up is None else warm_up.place}
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=100)


def _search(space: Space, folder: RunFolder, ledger: Ledger, warm_up: RunFolder | None, fit: launch.Fit) -> Study:
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
    space, total, at_once = study.space, study.draws.total, study.shared.at_once
    before = sum(length for _, length in study.common)
    last = study.resolved.schedule[-1][0].replace("_", " ")
    lines = [
        f"search {study.folder.name} in {study.folder.place}: {space.search.method}, {total} trials over "
        f"{', '.join(space.keys)}",
        f"  {at_once} trial{'s' * (at_once > 1)} at a time with "
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


if __name__ == "__main__":
    cli.run(main)
