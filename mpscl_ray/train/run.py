"""One training from its start, or its last checkpoint, to the table of its phases: what the train command does."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpscl_ray.config import Config, reads_target, to_yaml
from mpscl_ray.config.titles import phase_title
from mpscl_ray.distributed.ray_session import connect
from mpscl_ray.errors import ConfigError, Interrupted, MpsclError, TrainingError
from mpscl_ray.evaluate.run import PHASES_TABLE, evaluate_phases
from mpscl_ray.prepare import phantom_dataset
from mpscl_ray.runs.control_files import STOP_FILE, WARNINGS_FILE, WORKER_FAILURES_FILE
from mpscl_ray.runs.lifecycle import carry_out
from mpscl_ray.runs.palette import display_order
from mpscl_ray.runs.progress import ProgressLine
from mpscl_ray.runs.run_directory import RunDirectory, open_run
from mpscl_ray.runs.signals import Interruption, signals_end
from mpscl_ray.runs.storage import join_location
from mpscl_ray.train.loop import TrainResult, newest_checkpoint
from mpscl_ray.train.phase_images import draw_phases
from mpscl_ray.train.phases import build_segmenter, load_pretrained_weights
from mpscl_ray.train.ray import launch, resources
from mpscl_ray.train.ray.placement_groups import release_orphaned_placement_groups
from mpscl_ray.train.ray.preflight import check_nodes
from mpscl_ray.train.streams import TrainingData

MAY_CHANGE = (
    "scaling",
    "run.name",
    "run.report_every",
    "run.validate_every",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.restarts",
    "run.storage",
    "run.outage_min",
    "data.source",
    "data.target",
    "data.in_memory",
    "precision.compile",
)
"""Keys that a resumed run may set anew; none of them changes what is computed. The datasets may have moved, but must be
the same: their fingerprints are compared."""

_WORKING_DIR = "_ray_pkg_"
"""So begins the name of the folder into which Ray unpacks the working directory of a job, on each node."""


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
        config: settings.
        command: words of the command line, for the line that resumes.
        dashboard: whether a Ray that is started here serves its dashboard.
        allow_change: whether a run resumes although settings that matter differ from its own.
        fit: what trains; None is Ray Train.
    """
    resources.check_machine(config)
    folder = open_run(join_location(config.run.storage, config.run.name), "command", 60 * config.run.outage_min)
    folder.create()
    words = ["python", "-m", "mpscl_ray.train", *command]
    with folder.lock():
        # A run that has no checkpoint yet begins anew, with whatever settings.
        if folder.exists and folder.store.step_checkpoints():
            changes = _check_resume(folder, config, allow_change)
            if folder.read_status().get("state") == "finished" and not (changes and allow_change):
                print(f"the run {folder.name} is finished; for another one give it a name with run.name=NAME")
                _print_results(folder)
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

        code = carry_out(folder, shlex.join(words), work, lambda: _place(folder))
        if code == 0:
            _print_results(folder)
            _print_next_steps(folder)
    return code


def warn_of_storage(folder: RunDirectory) -> None:
    """Tell whoever keeps results in the working directory of a Ray job that they will be gone with it."""
    if any(part.startswith(_WORKING_DIR) for part in folder.path.absolute().parts):
        print(
            f"warning: run.storage={folder.path.parent} lies in the working directory of this job, which Ray "
            "deletes after it; give a folder that stays and that all nodes share, such as run.storage=/shared/runs",
            flush=True,
        )


def _check_resume(folder: RunDirectory, config: Config, allow_change: bool) -> list[str]:
    """A sentence for each setting that changes on the way; ConfigError where one must not."""
    every_section = tuple(section.name for section in dataclasses.fields(Config))
    return folder.check_config(to_yaml(config), every_section if allow_change else MAY_CHANGE)


def _place(folder: RunDirectory) -> dict[str, Any]:
    """Phase, iteration and global_step of the last record of metrics."""
    try:
        records = folder.read_metrics()
    except MpsclError:
        return {}  # The status has something more urgent to say.
    return {key: records[-1][key] for key in ("phase", "iteration", "global_step")} if records else {}


def _check_before_ray(config: Config, folder: RunDirectory) -> None:
    """Find what is wrong with datasets, checkpoints and pretrained weights while it takes a second, not a minute."""
    found, _ = newest_checkpoint(folder)
    if not _wants_phantom(config):
        domains, _ = _read_domains(config, folder)
        if found is None:
            load_pretrained_weights(build_segmenter(config, len(domains.classes), config.schedule[0][0]), config)


def _wants_phantom(config: Config) -> bool:
    return any(value.startswith(phantom_dataset.PREFIX) for value in (config.data.source, config.data.target))


def _train_and_evaluate(config: Config, folder: RunDirectory, fit: launch.Fit | None) -> None:
    with signals_end("before training began"):
        use_gpu = resources.check_cluster(config)
        config = phantom_dataset.resolve(config)
        domains, warnings = _read_domains(config, folder)
        for warning in warnings:
            print(f"warning: {warning}", flush=True)
        check_nodes(folder.uri, domains.fingerprints())
        data = launch.open_data(config, domains)
        print(_summary(config, folder, domains, data, use_gpu), flush=True)
        training = launch.Launch(config, folder, data, use_gpu, fit=fit)
    with Interruption() as interruption, _Watcher(config, folder, training, interruption) as watcher:
        outcome = training.wait(watcher.look)
    if outcome.state == "non_finite":
        raise TrainingError(_non_finite(config, folder, outcome))
    place = f"iteration {outcome.iteration} of the phase {outcome.phase}"
    if outcome.state == "interrupted":
        asked = interruption.signal_name or f"the file {STOP_FILE} in the run folder"
        raise Interrupted(f"stopped by {asked} at {place}, a checkpoint is written")
    if interruption.requested:
        raise Interrupted(f"stopped by {interruption.signal_name} between training, which is done, and its evaluation")
    with signals_end("during the evaluation"):
        phases = [name for name, _ in config.schedule]
        evaluate_phases(folder, phases)
        draw_phases(folder, phases)


def _non_finite(config: Config, folder: RunDirectory, outcome: TrainResult) -> str:
    losses = ", ".join(f"{name} {value:g}" for name, value in outcome.losses.items())
    found, _ = newest_checkpoint(folder)
    if not reads_target(outcome.phase) and config.phases.source_only_lr is not None:
        setting = f"phases.source_only_lr={config.phases.source_only_lr / 2:g}"
    else:
        setting = f"optim.lr={config.optim.lr / 2:g}"
    advice = (
        f"the checkpoint {found.name} is from before it: go on from there with other settings, for example {setting} "
        "--allow-change"
        if found
        else f"there is no checkpoint yet: start again with other settings, for example {setting}"
    )
    return (
        f"a loss or gradient was not finite, seen at iteration {outcome.iteration} of the phase {outcome.phase} "
        f"({losses}); nothing was changed by that step, and {advice}"
    )


def _read_domains(config: Config, folder: RunDirectory) -> tuple[launch.Domains, list[str]]:
    """Both datasets, kept in model.json for evaluation and prediction; a run that goes on must have the same ones."""
    domains, warnings = launch.load_domains(config)
    description = launch.model_description(config, domains)
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


def _summary(config: Config, folder: RunDirectory, domains: launch.Domains, data: TrainingData, use_gpu: bool) -> str:
    source, target = domains.source, domains.target
    phases = ", ".join(f"{name.replace('_', ' ')} {iterations}" for name, iterations in config.schedule)
    unlabelled = (
        f"{data.unlabelled.files.rows} {target.modality} slices without labels"
        if data.unlabelled
        else "no other slices"
    )
    labelled = target.modality if config.data.labelled == "target" else source.modality
    return (
        f"run {folder.name} in {folder.display_path}: {config.method_name}, {source.modality} to {target.modality}, "
        f"structures {', '.join(display_order(domains.classes[1:]))}\n"
        f"  trains on {data.labelled.files.rows} labelled {labelled} slices and {unlabelled}, "
        f"{config.scaling.describe(use_gpu)}\n"
        f"  iterations: {phases}; the target's labels are not used for training"
        + (" (except here: the supervised bound)" if config.data.labelled == "target" else "")
        + ("; best is chosen with target labels (oracle)" if config.run.select == "oracle" else "")
    )


class _Watcher:
    """Shows how far training is from what it leaves in the run folder, and passes on the wish to stop."""

    def __init__(
        self, config: Config, folder: RunDirectory, training: launch.Launch, interruption: Interruption
    ) -> None:
        self.config, self.folder, self.training, self.interruption = config, folder, training, interruption
        self.phase = ""
        self.line: ProgressLine | None = None
        self.seen = max((record["global_step"] for record in folder.read_metrics()), default=0)
        self.size_read = -1
        self.notices = {
            file: file.stat().st_size if file.exists() else 0
            for file in (folder.logs / WARNINGS_FILE, folder.logs / WORKER_FAILURES_FILE)
        }
        self.stop_passed_on = False

    def __enter__(self) -> _Watcher:
        self.training.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.line is not None:
            self.line.close()

    def look(self) -> None:
        """Called several times a second."""
        if self.interruption.requested and not self.stop_passed_on:
            self.training.request_stop()
            # Whoever stopped the command may not wait for the checkpoint: a job is killed soon after it.
            reason = f"stopped by {self.interruption.signal_name}; goes on from the last complete checkpoint"
            self.folder.write_status(
                "interrupted", exit_code=Interrupted.exit_code, reason=reason, **_place(self.folder)
            )
            self.stop_passed_on = True
        self._show_notices()
        size = self.folder.metrics_file.stat().st_size if self.folder.metrics_file.exists() else 0
        if size == self.size_read:
            return
        self.size_read = size
        records = self.folder.read_metrics()
        if self.seen > (records[-1]["global_step"] if records else 0):
            # The workers went back to a checkpoint.
            self.seen = records[-1]["global_step"] if records else 0
            self._end_line()
        for record in records:
            if record["global_step"] > self.seen:
                self.seen = record["global_step"]
                self._show(record)

    def _show(self, record: Mapping[str, Any]) -> None:
        if record["phase"] != self.phase or self.line is None:
            self._end_line()
            self.phase = record["phase"]
            domains = 2 if reads_target(self.phase) else 1
            self.line = ProgressLine(
                record["iterations"],
                phase_title(self.phase),
                images_per_iteration=domains * self.config.data.batch_size,
                start=record["iteration"],
            )
        self.line.update(record["iteration"], loss=record.get("train/loss_segmentation"))
        parts = [
            f"{domain} Dice {record[f'{prefix}/dice/mean']:.3f}"
            for domain, prefix in (("target", "val"), ("source", "val/source"))
            if f"{prefix}/dice/mean" in record
        ]
        if parts:
            self.line.message(f"  {self.phase.replace('_', ' ')} {record['iteration']}: validation {', '.join(parts)}")

    def _end_line(self) -> None:
        if self.line is not None:
            self.line.close()
            self.line = None

    def _show_notices(self) -> None:
        for file, read in self.notices.items():
            if file.exists() and file.stat().st_size > read:
                self._show_new(file)

    def _show_new(self, file: Path) -> None:
        with file.open("rb") as stream:
            stream.seek(self.notices[file])
            new = stream.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.notices[file] += len(whole)
        for sentence in whole.decode("utf-8", "replace").splitlines():
            if self.line is not None:
                self.line.message(sentence)
            else:
                print(sentence, file=sys.stderr, flush=True)


def _print_results(folder: RunDirectory) -> None:
    table = folder.results / PHASES_TABLE
    if table.exists():
        print(f"\nDice and average surface distance, every slice counted\n\n{table.read_text(encoding='utf-8')}")
    else:
        print("\nno test or validation volume of the target is labelled, so there is no table of scores")


def _print_next_steps(folder: RunDirectory) -> None:
    commands = [
        f"python -m mpscl_ray.predict {folder.display_path} IMAGE.nii.gz --out predictions",
        f"python -m mpscl_ray.report {folder.display_path} --out report",
        f"tensorboard --logdir {join_location(folder.display_path, 'tensorboard')}",
    ]
    if (folder.results / PHASES_TABLE).exists():
        commands.insert(0, f"python -m mpscl_ray.evaluate {folder.display_path}")
    print(
        f"\n{folder.display_path} has the tables (results/), curves (progress.png), TensorBoard events and "
        "checkpoints. Next:\n  " + "\n  ".join(commands)
    )
