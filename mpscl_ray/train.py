"""``python -m mpscl_ray.train``: train a method on prepared data, on this machine or on a Ray cluster."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpscl_ray import cli, launch, phantom_dataset
from mpscl_ray.cluster_session import connect
from mpscl_ray.config import ADAPTATION, WARM_UP, Config, describe_keys, load_config, preset_names, to_yaml
from mpscl_ray.errors import ConfigError, Interrupted, MpsclError, TrainingError
from mpscl_ray.evaluate import PHASES_TABLE, evaluate_phases
from mpscl_ray.interruption import Interruption
from mpscl_ray.progress import ProgressLine
from mpscl_ray.run_folder import RunFolder
from mpscl_ray.training import TrainingData

MAY_CHANGE = (
    "scaling",
    "run.report_every",
    "run.validate_every",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.restarts",
    "run.storage",
    "data.in_memory",
    "precision.compile",
)
"""Keys that a resumed run may set anew; none of them changes what is computed."""

_EXAMPLES = """\
examples:
  python -m mpscl_ray.train                                  the phantom hearts, two CPU workers, a few minutes
  python -m mpscl_ray.train mr2ct/mpscl data.source=data/mr data.target=data/ct scaling.workers=2
  python -m mpscl_ray.train small/mpscl data.source=data/bssfp data.target=data/lge run.name=lge
  python -m mpscl_ray.train mr2ct/mpscl method.margin_source=0.3 optim.lr=1e-4 --show
  ray job submit --working-dir . -- python -m mpscl_ray.train mr2ct/mpscl run.storage=/shared/runs

The same command again goes on where the run stopped. Labels of the target's training slices are never read, except by
data.labelled=target, the supervised bound.
"""


def main(arguments: Sequence[str]) -> int:
    """Train, evaluate every phase on the target's test volumes, and say what to do next.

    Returns:
        The exit code: 0, or 130 when the run was stopped and can go on.
    """
    parser = argparse.ArgumentParser(
        prog="python -m mpscl_ray.train",
        description="Train a segmenter on a labelled domain and adapt it to an unlabelled one.",
        epilog=f"{_EXAMPLES}\npresets: {', '.join(preset_names())}\n\nsettings, with their defaults:\n{describe_keys()}\n\n{cli.EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "settings", nargs="*", metavar="PRESET | key=value", help="preset (default: phantom) and settings"
    )
    parser.add_argument(
        "--show", action="store_true", help="print the resolved settings as YAML, which train also reads"
    )
    parser.add_argument("--dashboard", action="store_true", help="serve the Ray dashboard of a Ray started here")
    parser.add_argument(
        "--allow-change", action="store_true", help="go on with a run although settings that matter differ from its own"
    )
    options = parser.parse_intermixed_args(list(arguments))
    config = config_from_arguments(options.settings)
    if options.show:
        print(to_yaml(config), end="")
        return 0
    return train(config, list(arguments), dashboard=options.dashboard, allow_change=options.allow_change)


def config_from_arguments(settings: Sequence[str]) -> Config:
    """Config of a command line: at most one preset, and overrides.

    Raises:
        ConfigError: two presets, or anything wrong with the settings.
    """
    presets = [word for word in settings if "=" not in word]
    if len(presets) > 1:
        raise ConfigError(f"{' and '.join(presets)} are two presets, expected one; settings are written key=value")
    return load_config(presets[0] if presets else "phantom", [word for word in settings if "=" in word])


def train(config: Config, command: list[str], *, dashboard: bool = False, allow_change: bool = False) -> int:
    """Run a training in its folder, from the start or from its last checkpoint; returns the exit code."""
    launch.check_machine(config)
    folder = RunFolder(Path(config.run.storage) / config.run.name)
    folder.create()
    resume = shlex.join(["python", "-m", "mpscl_ray.train", *command])
    with folder.lock():
        if folder.exists:
            _check_resume(folder, config, allow_change)
            if folder.read_status().get("state") == "finished":
                print(f"the run {folder.name} is finished; for another one give it a name with run.name=NAME\n")
                _print_results(folder)
                return 0
        folder.write_config(to_yaml(config))
        folder.write_environment(["python", "-m", "mpscl_ray.train", *command])
        folder.write_status("running", resume_command=resume)
        try:
            with connect(dashboard=dashboard), Interruption() as interruption:
                _train_and_evaluate(config, folder, interruption)
        except Interrupted as stop:
            folder.write_status("interrupted", exit_code=stop.exit_code, reason=str(stop))
            print(f"{stop}; to go on:\n  {resume}", flush=True)
            return stop.exit_code
        except MpsclError as error:
            folder.write_status("failed", exit_code=error.exit_code, reason=str(error))
            raise
        except BaseException as error:
            folder.write_status("failed", exit_code=1, reason=f"{type(error).__name__}: {error}")
            raise
        folder.write_status("finished", exit_code=0)
    _print_results(folder)
    _print_next_steps(folder, config)
    return 0


def _check_resume(folder: RunFolder, config: Config, allow_change: bool) -> None:
    every_section = tuple(field.name for field in dataclasses.fields(Config))
    for change in folder.check_config(to_yaml(config), every_section if allow_change else MAY_CHANGE):
        print(f"changed for the rest of the run: {change}", flush=True)


def _train_and_evaluate(config: Config, folder: RunFolder, interruption: Interruption) -> None:
    config = phantom_dataset.resolve(config)
    domains, warnings = launch.load_domains(config)
    for warning in warnings:
        print(f"warning: {warning}", flush=True)
    _write_model(folder, launch.model_description(config, domains))
    data = launch.open_data(config, domains)
    use_gpu = launch.check_cluster(config)
    print(_summary(config, folder, domains, data, use_gpu), flush=True)
    _stop_if(interruption, "before training began")
    training = launch.Launch(config, folder, data, use_gpu)
    with _Watcher(config, folder, training, interruption) as watcher:
        outcome = training.watch(watcher.look)
    if outcome.state == "non_finite":
        losses = ", ".join(f"{name} {value:g}" for name, value in outcome.losses.items())
        raise TrainingError(
            f"a loss or gradient was not finite at iteration {outcome.iteration} of the phase {outcome.phase} ({losses}); "
            f"nothing was changed by that step and the checkpoint before it is kept: go on from there with other settings, "
            f"for example optim.lr={config.optim.lr / 2:g} --allow-change"
        )
    if outcome.state == "interrupted":
        raise Interrupted(
            f"stopped at iteration {outcome.iteration} of the phase {outcome.phase}, a checkpoint is written"
        )
    evaluate_phases(folder.path, [name for name, _ in config.schedule])
    _stop_if(interruption, "during the evaluation")


def _stop_if(interruption: Interruption, when: str) -> None:
    if interruption.requested:
        raise Interrupted(f"stopped {when}")


def _write_model(folder: RunFolder, description: dict[str, Any]) -> None:
    """Keep what prediction needs; a run that goes on must go on with the same data."""
    if folder.model_file.exists():
        before = folder.read_model()
        for domain in ("source", "target"):
            if before[domain]["fingerprint"] != description[domain]["fingerprint"]:
                raise ConfigError(
                    f"the {domain} dataset {description[domain]['dataset']} is not the one that the run {folder.name} was "
                    "started with; put that one back, or start a new run with another run.name"
                )
    folder.write_model(description)


def _summary(config: Config, folder: RunFolder, domains: launch.Domains, data: TrainingData, use_gpu: bool) -> str:
    source, target = domains.source, domains.target
    phases = ", ".join(f"{name.replace('_', ' ')} {iterations}" for name, iterations in config.schedule)
    unlabelled = (
        f"{data.unlabelled.files.rows} {target.modality} slices without labels"
        if data.unlabelled
        else "no other slices"
    )
    workers = f"{config.scaling.workers} {'GPU' if use_gpu else 'CPU'} worker{'s' * (config.scaling.workers > 1)}"
    labelled = target.modality if config.data.labelled == "target" else source.modality
    return (
        f"run {folder.name} in {folder.path}: {config.method_name}, {source.modality} to {target.modality}, "
        f"structures {', '.join(domains.classes[1:])}\n"
        f"  trains on {data.labelled.files.rows} labelled {labelled} slices and {unlabelled}, {workers}\n"
        f"  iterations: {phases}; the target's labels are not used for training"
        + (" (except here: the supervised bound)" if config.data.labelled == "target" else "")
        + ("; best is chosen with target labels (oracle)" if config.run.select == "oracle" else "")
    )


class _Watcher:
    """Shows how far training is from the records in the run folder, and passes on the wish to stop."""

    def __init__(self, config: Config, folder: RunFolder, training: launch.Launch, interruption: Interruption) -> None:
        self.config, self.folder, self.training, self.interruption = config, folder, training, interruption
        self.seen = folder.read_metrics()[-1]["global_step"] if folder.read_metrics() else 0
        self.phase = ""
        self.line: ProgressLine | None = None
        self.failures = folder.logs / launch.FAILURES_LOG
        self.failures_shown = self.failures.stat().st_size if self.failures.exists() else 0
        self.stop_passed_on = False

    def __enter__(self) -> _Watcher:
        self.training.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.line is not None:
            self.line.close()

    def look(self) -> None:
        """Called twice a second."""
        if self.interruption.requested and not self.stop_passed_on:
            self.training.request_stop()
            self.stop_passed_on = True
        self._show_failures()
        records = self.folder.read_metrics()
        if records and records[-1]["global_step"] < self.seen:
            self.seen = records[-1]["global_step"]  # workers were restarted from a checkpoint
        for record in records:
            if record["global_step"] > self.seen:
                self.seen = record["global_step"]
                self._show(record)

    def _show(self, record: Mapping[str, Any]) -> None:
        if record["phase"] != self.phase or self.line is None:
            if self.line is not None:
                self.line.close()
            self.phase = record["phase"]
            domains = 2 if self.phase in (WARM_UP, ADAPTATION) else 1
            self.line = ProgressLine(
                record["iterations"],
                self.phase.replace("_", " "),
                images_per_iteration=domains * self.config.data.batch_size,
                start=record["iteration"],
            )
        self.line.update(record["iteration"], loss=record.get("train/loss_segmentation"))
        if "val/entropy" in record or "val/source/entropy" in record:
            parts = [
                f"{domain} Dice {record[f'{prefix}/dice/mean']:.3f}"
                for domain, prefix in (("target", "val"), ("source", "val/source"))
                if f"{prefix}/dice/mean" in record
            ]
            self.line.message(f"  {self.phase.replace('_', ' ')} {record['iteration']}: validation {', '.join(parts)}")

    def _show_failures(self) -> None:
        if self.failures.exists() and self.failures.stat().st_size > self.failures_shown:
            text = self.failures.read_text(encoding="utf-8")
            for sentence in text[self.failures_shown :].splitlines():
                print(f"{sentence}; restarting from the last checkpoint", file=sys.stderr, flush=True)
            self.failures_shown = len(text.encode())


def _print_results(folder: RunFolder) -> None:
    table = folder.results / PHASES_TABLE
    if table.exists():
        print(
            f"\nDice and average surface distance on the target's test volumes\n\n{table.read_text(encoding='utf-8')}"
        )


def _print_next_steps(folder: RunFolder, config: Config) -> None:
    print(
        f"\n{folder.path} has the tables (results/), curves (progress.png), TensorBoard events and checkpoints. Next:\n"
        f"  python -m mpscl_ray.evaluate {folder.path}                      per volume and structure\n"
        f"  python -m mpscl_ray.predict {folder.path} IMAGE.nii.gz --out predictions\n"
        f"  tensorboard --logdir {folder.path / 'tensorboard'}"
    )


if __name__ == "__main__":
    cli.run(main)
