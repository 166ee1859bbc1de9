"""What the train command does: one training, from its start or last checkpoint to the table of its phases."""

from __future__ import annotations

import dataclasses
import functools
import shlex
import sys

from mpscl_ray.config import Config, default_settings, reads_target, to_yaml
from mpscl_ray.data.preflight import check_nodes
from mpscl_ray.data.ray_source import open_slices
from mpscl_ray.distributed.places import TaskPlace
from mpscl_ray.distributed.ray_session import connect
from mpscl_ray.errors import ConfigError, Interrupted, TrainingError
from mpscl_ray.evaluate.run import evaluate_phases
from mpscl_ray.prepare import phantom_dataset
from mpscl_ray.runs.control_files import STOP_FILE
from mpscl_ray.runs.lifecycle import carry_out
from mpscl_ray.runs.position import position, training_status
from mpscl_ray.runs.run_directory import RunDirectory, open_run
from mpscl_ray.runs.signals import Interruption, signals_end
from mpscl_ray.runs.storage import join_location
from mpscl_ray.runs.trackers import check_installed
from mpscl_ray.train import bf16
from mpscl_ray.train.checkpointing import newest_checkpoint
from mpscl_ray.train.display import ProgressDisplay, print_next_steps, print_results, summary
from mpscl_ray.train.domains import Domains, load_domains, model_description, open_data
from mpscl_ray.train.outcome import TrainResult
from mpscl_ray.train.phase_images import draw_phases
from mpscl_ray.train.phases import build_segmenter, load_pretrained_weights
from mpscl_ray.train.ray import launch, resources
from mpscl_ray.train.ray.one_process import fit_in_one_worker, needs_no_ray_train
from mpscl_ray.train.ray.placement_groups import release_orphaned_placement_groups
from mpscl_ray.train.tracking import TrackedTraining, final_scores, tracked

MAY_CHANGE = (
    "scaling",
    "run.name",
    "run.log_every",
    "run.validate_every",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.max_failures",
    "run.progress_page",
    "run.loggers",
    "run.profile",
    "run.choose_postprocessing",
    "run.calibrate_quality",
    "optim.recompute",
    "run.storage",
    "run.storage_retry_minutes",
    "data.source",
    "data.target",
    "data.in_memory",
    "data.mirror_axes",
    "precision.compile",
)
"""Keys that a resumed run may change; none of them changes what is computed. The datasets may have moved, but must be
the same: their fingerprints are compared."""

_OF_MANY = {"search.yaml": "a search", "cells.json": "a comparison"}
"""Files by which the folder of many trainings is known."""

_WORKING_DIR = "_ray_pkg_"
"""Start of the name of the folder into which Ray unpacks the working directory of a job, on each node."""


def train(
    config: Config,
    command: list[str],
    *,
    dashboard: bool = False,
    allow_change: bool = False,
    fit: launch.Fit | None = None,
) -> int:
    """Run a training in its folder, from the start or from its last checkpoint; returns the exit code.

    Args:
        command: words of the command line, for the line that resumes.
        dashboard: whether a Ray that is started here serves its dashboard.
        allow_change: whether a run resumes although settings that change what is computed differ from its own.
        fit: what trains; None is Ray Train, or one worker without it where that does.
    """
    resources.check_machine(config)
    check_installed(config.run.loggers)
    folder = open_run(
        join_location(config.run.storage, config.run.name), "command", 60 * config.run.storage_retry_minutes
    )
    _check_not_of_many(folder)
    folder.create()
    words = ["python", "-m", "mpscl_ray.train", *command]
    with folder.lock():
        # A run without a checkpoint starts from scratch, with any settings.
        if folder.exists and folder.store.step_checkpoints():
            every_section = tuple(section.name for section in dataclasses.fields(Config))
            may_change = every_section if allow_change else MAY_CHANGE
            defaults = default_settings(config.method_name)
            changes = folder.check_config(to_yaml(config), may_change, "--allow-change", defaults)
            if folder.read_status().get("state") == "finished" and not (changes and allow_change):
                print(f"the run {folder.name} is finished; for another one give it a name with run.name=NAME")
                print_results(folder)
                print_next_steps(folder, config.run.loggers)
                return 0
            for change in changes:
                print(f"changed for the rest of the run: {change}", flush=True)
        warn_of_storage(folder)
        folder.write_config(to_yaml(config))
        folder.write_environment(words)

        def work() -> None:
            with signals_end("before training began"):
                _check_before_ray(config, folder)
                with connect(dashboard=dashboard), release_orphaned_placement_groups(folder):
                    _train_and_evaluate(config, folder, fit)

        code = carry_out(folder, shlex.join(words), work)
        if code == 0:
            print_results(folder)
            print_next_steps(folder, config.run.loggers)
    return code


def _check_not_of_many(folder: RunDirectory) -> None:
    """Raises ConfigError where the folder is that of a search or a comparison, which a training would make useless."""
    for file, kind in _OF_MANY.items():
        if folder.store.has(folder.path / file):
            raise ConfigError(f"{folder.display_path} is the folder of {kind}; give the training another run.name")


def warn_of_storage(folder: RunDirectory) -> None:
    """Warn where the results are in the working directory of a Ray job, which Ray deletes."""
    if any(part.startswith(_WORKING_DIR) for part in folder.path.absolute().parts):
        print(
            f"warning: run.storage={folder.path.parent} lies in the working directory of this job, which Ray "
            "deletes after it; give a folder that stays and that all nodes share, such as run.storage=/shared/runs",
            flush=True,
        )


def _check_before_ray(config: Config, folder: RunDirectory) -> None:
    """Find errors in datasets, checkpoints and pretrained weights before Ray takes its time to start."""
    phantom_dataset.check(config)
    found, _ = newest_checkpoint(folder)
    if any(value.startswith(phantom_dataset.PREFIX) for value in (config.data.source, config.data.target)):
        return  # that dataset is not made yet
    domains, _ = read_domains(config, folder)
    if found is None:
        load_pretrained_weights(build_segmenter(config, len(domains.classes), config.schedule[0][0]), config)


def _train_and_evaluate(config: Config, folder: RunDirectory, fit: launch.Fit | None) -> None:
    with signals_end("before training began"):
        use_gpu = resources.check_cluster(config)
        config = phantom_dataset.resolve(config)
        domains, warnings = read_domains(config, folder)
        for warning in warnings:
            print(f"warning: {warning}", flush=True)
        check_nodes(folder.uri, domains.fingerprints())
        alone = fit is None and needs_no_ray_train(config)
        data = open_data(config, domains, functools.partial(open_slices, one_worker=alone))
        print(summary(config, folder, domains, data, use_gpu), flush=True)
        advice = bf16.advice(config, use_gpu)
        if advice and not folder.store.step_checkpoints():  # a resumed run cannot change its precision
            print(advice, flush=True)
        training = launch.Launch(config, folder, data, use_gpu, fit=fit_in_one_worker if alone else fit)
    with tracked(config, folder, functools.partial(print, file=sys.stderr, flush=True)) as tracking:
        _wait_and_evaluate(config, folder, training, resources.evaluation_place(config, use_gpu), tracking)


def _wait_and_evaluate(
    config: Config, folder: RunDirectory, training: launch.Launch, place: TaskPlace | None, tracked: TrackedTraining
) -> None:
    with Interruption() as interruption:
        result = _wait(config, folder, training, interruption, tracked)
    if result.state == "non_finite":
        raise TrainingError(_non_finite(config, folder, result))
    if result.state == "interrupted":
        cause = interruption.signal_name or f"the file {STOP_FILE} in the run folder"
        raise Interrupted(
            f"stopped by {cause} at iteration {result.iteration} of the phase {result.phase}, a checkpoint is written"
        )
    if interruption.requested:
        raise Interrupted(f"stopped by {interruption.signal_name} between training, which is done, and its evaluation")
    with signals_end("during the evaluation"):
        phases = [name for name, _ in config.schedule]
        for phase, evaluation in evaluate_phases(folder, phases, place=place).items():
            tracked.scores |= final_scores(phase, evaluation.summary.to_json())
        if config.run.images:
            draw_phases(folder, phases)


def _wait(
    config: Config,
    folder: RunDirectory,
    training: launch.Launch,
    interruption: Interruption,
    tracked: TrackedTraining,
) -> TrainResult:
    """Start a training, show its progress, and let a signal stop it after a checkpoint."""
    status = training_status(folder, config.total_iterations)
    with ProgressDisplay(config, folder) as display:

        def poll() -> None:
            if interruption.requested and not training.stop_requested:
                training.request_stop()
                # Written before the checkpoint is: a job is killed soon after it was asked to stop.
                reason = f"stopped by {interruption.signal_name}; resumes from the last complete checkpoint"
                folder.write_status("interrupted", exit_code=Interrupted.exit_code, reason=reason, **position(folder))
            display.update()
            status.update()
            tracked.tracking.update()

        training.start()
        return training.wait(poll)


def _non_finite(config: Config, folder: RunDirectory, result: TrainResult) -> str:
    found, _ = newest_checkpoint(folder)
    lower = 0.5 * (config.optim.retry_lr_factor or 1 if result.retried else 1)
    if not reads_target(result.phase) and config.phases.source_only_lr is not None:
        setting = f"phases.source_only_lr={lower * config.phases.source_only_lr:g}"
    else:
        setting = f"optim.lr={lower * config.optim.lr:g}"
    advice = (
        f"the checkpoint {found.name} is from before it: resume from it with other settings, for example {setting} "
        "--allow-change"
        if found
        else f"there is no checkpoint yet: start again with other settings, for example {setting}"
    )
    return f"{result.describe_non_finite()}; nothing was changed by that step, and {advice}"


def read_domains(config: Config, folder: RunDirectory) -> tuple[Domains, list[str]]:
    """Read both datasets and describe them in model.json; a resumed run must have the same ones."""
    domains, warnings = load_domains(config)
    description = model_description(config, domains)
    if folder.model_file.exists() and folder.store.step_checkpoints():
        before = folder.read_model()
        for domain in ("source", "target"):
            if before[domain]["fingerprint"] != description[domain]["fingerprint"]:
                raise ConfigError(
                    f"the {domain} dataset {description[domain]['dataset']} is not the one that the run {folder.name} "
                    "was started with; put that one back, or start a new run with another run.name"
                )
    folder.write_model(description)
    return domains, warnings
