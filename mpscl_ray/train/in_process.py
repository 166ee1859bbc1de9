"""A training in this process, for Python programs: one worker, no Ray, nothing printed unless asked for.

It writes the same run folder as the train command, which can resume it, evaluate it and predict with it.
"""

from __future__ import annotations

import logging
import math
import shlex
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mpscl_ray.config import Config, default_settings, load_config, override, to_yaml
from mpscl_ray.data.slices import LocalSlices, Slices
from mpscl_ray.errors import ConfigError, TrainingError
from mpscl_ray.evaluate.run import evaluate_phases
from mpscl_ray.predict.predictor import choose_device
from mpscl_ray.prepare import phantom_dataset
from mpscl_ray.runs import checkpoint, safe_json
from mpscl_ray.runs.lifecycle import record_status
from mpscl_ray.runs.position import training_status
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.runs.storage import is_url
from mpscl_ray.runs.trackers import Tracking, check_installed
from mpscl_ray.train import loop
from mpscl_ray.train.display import ProgressDisplay
from mpscl_ray.train.domains import open_data
from mpscl_ray.train.outcome import TrainResult
from mpscl_ray.train.phase_images import draw_phases
from mpscl_ray.train.run import MAY_CHANGE, read_domains
from mpscl_ray.train.run_callback import RunCallback
from mpscl_ray.train.tracking import TrackedTraining, final_scores, tracked

log = logging.getLogger(__name__)

_MEASURES = ("dice", "asd_mm", "hd95_mm")


@dataclass(frozen=True)
class TrainingResult:
    """What a training leaves."""

    run: Path
    """Folder of the run: for :func:`load_segmenter`, and for the commands evaluate, predict and report."""
    config: Config
    """The settings it was trained with."""
    scores: Mapping[str, Mapping[str, Mapping[str, float]]]
    """Phase -> structure, and ``mean`` -> ``dice`` (0 to 1), ``asd_mm``, ``hd95_mm``: means over the labelled test
    volumes of the target (validation volumes where no test volume is labelled). Empty where none is labelled."""
    history: Sequence[Mapping[str, Any]]
    """Records of metrics.jsonl: ``phase``, ``iteration``, ``global_step``, losses ``train/...``, ``val/...``."""
    last_checkpoint: Path
    """The checkpoint at the end of training."""
    best_checkpoint: Path | None
    """The checkpoint that validation chose (``run.select``); None where no validation gave a score."""


def train_segmenter(
    config: Config | Path | str,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> TrainingResult:
    """Train in this process, from the start or from the last checkpoint of the run, and score every phase.

    There is one worker, whatever ``scaling.num_workers`` says, and the slices of both datasets are held in memory.
    The same call resumes a run that was interrupted, and returns the result of one that is finished.

    Args:
        config: settings, or the preset or YAML file that they start from.
        overrides: settings that differ: ``{"section.key": value}`` or words ``section.key=value``.
        device: ``cpu``, ``cuda`` or ``cuda:N``; None follows ``scaling.device``.
        progress: whether to show progress lines on standard error.

    Returns:
        Run folder, scores, history and checkpoints.

    Raises:
        ConfigError: wrong settings or device, datasets that do not fit the settings, or a run of that name that was
            started with others.
        DataError: a dataset or a checkpoint is missing, damaged, or does not fit.
        StorageError: the run folder cannot be written.
        TrainingError: a loss or gradient was not finite.
        KeyboardInterrupt: as always; the run can be resumed from its last checkpoint.
    """
    settings = override(config, overrides) if isinstance(config, Config) else load_config(config, overrides)
    settings = replace(settings, scaling=replace(settings.scaling, num_workers=1))
    if is_url(settings.run.storage):
        raise ConfigError(
            f"run.storage={settings.run.storage} is a URL; give a folder, or train with python -m mpscl_ray.train"
        )
    check_installed(settings.run.loggers)
    on = choose_device({"cpu": "cpu", "gpu": "cuda"}.get(settings.scaling.device) if device is None else device)
    folder = RunDirectory(Path(settings.run.storage) / settings.run.name)
    folder.create()
    with folder.lock():
        if folder.exists and folder.store.step_checkpoints():
            folder.check_config(to_yaml(settings), MAY_CHANGE, defaults=default_settings(settings.method_name))
            if folder.read_status().get("state") == "finished":
                return _result(folder, settings)
        folder.write_config(to_yaml(settings))
        folder.write_environment()
        command = shlex.join(["python", "-m", "mpscl_ray.train", str(folder.config_file)])
        # Training seeds torch; the caller's random state is restored.
        with record_status(folder, command), torch.random.fork_rng([on] if on.type == "cuda" else []):
            _train_and_evaluate(settings, folder, on, progress)
        return _result(folder, settings)


def _train_and_evaluate(config: Config, folder: RunDirectory, device: torch.device, progress: bool) -> None:
    config = phantom_dataset.resolve(config, progress=progress)
    domains, sentences = read_domains(config, folder)
    for sentence in sentences:
        warnings.warn(sentence, stacklevel=3)  # shown at the line that calls train_segmenter
    data = open_data(config, domains, _open_slices)
    with tracked(config, folder, folder.add_warning) as training:
        with ProgressDisplay(config, folder) if progress else nullcontext() as display:
            callback = _Callback(folder, config, domains.classes, display, training.tracking)
            with closing(callback), folder.store.worker_lock(folder.store.fencing_token, rank=0):
                outcome = loop.train(config, data, folder, device, callback)
        _evaluate(config, folder, outcome, training, device=device, progress=progress)


def _evaluate(
    config: Config,
    folder: RunDirectory,
    outcome: TrainResult,
    training: TrackedTraining,
    *,
    device: torch.device,
    progress: bool,
) -> None:
    if outcome.state == "non_finite":
        raise TrainingError(
            f"{outcome.describe_non_finite()}; start another run with other settings, for example "
            f"optim.lr={config.optim.lr / 2:g}"
        )
    phases = [name for name, _ in config.schedule]
    scored = evaluate_phases(folder, phases, device=str(device), workers=0, progress=progress)
    for phase, evaluation in scored.items():
        training.scores |= final_scores(phase, evaluation.summary.to_json())
    if config.run.images:
        draw_phases(folder, phases)


def _open_slices(folder: Any, split: str, *, labels: bool, in_memory: object) -> Slices:
    return LocalSlices(folder, split, labels=labels)


def _result(folder: RunDirectory, config: Config) -> TrainingResult:
    newest, _ = checkpoint.latest(folder.checkpoints)
    assert newest is not None
    scores: dict[str, dict[str, dict[str, float]]] = {}
    table = folder.results / "phases.json"
    if table.exists():
        rows = safe_json.read_object(table)["rows"].values()
        for (phase, _), row in zip(config.schedule, rows, strict=True):
            scores[phase] = {
                structure: {measure: _number(values[measure]["mean"]) for measure in _MEASURES}
                for structure, values in row["structures"].items()
            }
    best = folder.best if folder.best.is_dir() else None
    return TrainingResult(folder.path, config, scores, folder.read_metrics(), newest, best)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


class _Callback(RunCallback):
    """Keeps the status up to date as well, and shows progress lines if asked to."""

    def __init__(
        self,
        folder: RunDirectory,
        config: Config,
        classes: tuple[str, ...],
        display: ProgressDisplay | None,
        tracking: Tracking,
    ) -> None:
        super().__init__(folder, config, classes)
        self.status = training_status(folder, config.total_iterations)
        self.display, self.tracking = display, tracking

    def on_warning(self, text: str) -> None:
        log.info("%s", text)
        super().on_warning(text)
        self._show()

    def on_metrics(self, record: Mapping[str, Any], validated: bool) -> None:
        super().on_metrics(record, validated)
        self.status.update()
        self.tracking.update()
        self._show()

    def _show(self) -> None:
        if self.display is not None:
            self.display.update()
