"""A training in this process, for Python programs: one worker, no Ray, nothing printed unless asked for.

It writes the same run folder as the train command, which can resume it, evaluate it and predict with it.
"""

from __future__ import annotations

import json
import logging
import math
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpscl_ray.config import Config, load_config, override, reads_target, to_yaml
from mpscl_ray.config.titles import phase_title
from mpscl_ray.data.loader import LocalSlices, Slices
from mpscl_ray.errors import ConfigError, Interrupted, MpsclError, TrainingError
from mpscl_ray.evaluate.run import evaluate_phases
from mpscl_ray.predict.predictor import choose_device
from mpscl_ray.prepare import phantom_dataset
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.plots import panel, plot_progress
from mpscl_ray.runs.progress import ProgressLine
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.runs.storage import is_url
from mpscl_ray.runs.tensorboard import TensorBoard
from mpscl_ray.train import loop
from mpscl_ray.train.domains import open_data
from mpscl_ray.train.phase_images import draw_phases
from mpscl_ray.train.run import MAY_CHANGE, read_domains

log = logging.getLogger(__name__)

_MEASURES = ("dice", "asd_mm", "hd95_mm")


@dataclass(frozen=True)
class TrainingResult:
    """What a training has left."""

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
    """The one that validation chose (``run.select``); None where there was nothing to choose by."""


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
        ConfigError: wrong settings or device, datasets that do not fit the settings, or a run of that name which was
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
    on = choose_device({"cpu": "cpu", "gpu": "cuda"}.get(settings.scaling.device) if device is None else device)
    folder = RunDirectory(Path(settings.run.storage) / settings.run.name)
    folder.create()
    with folder.lock():
        if folder.exists and folder.store.step_checkpoints():
            folder.check_config(to_yaml(settings), MAY_CHANGE)
            if folder.read_status().get("state") == "finished":
                return _result(folder, settings)
        folder.write_config(to_yaml(settings))
        folder.write_environment()
        # Training seeds torch; the caller's random state comes back.
        with _status_written(folder), torch.random.fork_rng([on] if on.type == "cuda" else []):
            _train_and_evaluate(settings, folder, on, progress)
        return _result(folder, settings)


@contextmanager
def _status_written(folder: RunDirectory) -> Iterator[None]:
    """Write status.json: running, then finished, interrupted or failed. What the block raises is raised."""
    command = shlex.join(["python", "-m", "mpscl_ray.train", str(folder.config_file)])
    folder.write_status("running", resume_command=command)
    try:
        yield
    except KeyboardInterrupt:
        reason = "stopped by KeyboardInterrupt"
        folder.write_status("interrupted", exit_code=Interrupted.exit_code, reason=reason, **_position(folder))
        raise
    except MpsclError as error:
        folder.write_status("failed", exit_code=error.exit_code, reason=str(error), **_position(folder))
        raise
    except BaseException as error:
        folder.write_status("failed", exit_code=1, reason=f"{type(error).__name__}: {error}", **_position(folder))
        raise
    folder.write_status("finished", exit_code=0, **_position(folder))


def _train_and_evaluate(config: Config, folder: RunDirectory, device: torch.device, progress: bool) -> None:
    config = phantom_dataset.resolve(config, progress=progress)
    domains, sentences = read_domains(config, folder)
    for sentence in sentences:
        warnings.warn(sentence, stacklevel=3)  # shown at the line that calls train_segmenter
    data = open_data(config, domains, _open_slices)
    callback = _RunCallback(folder, domains.classes, config.data.global_batch_size, progress)
    try:
        with folder.store.worker_lock(folder.store.fencing_token, rank=0):
            outcome = loop.train(config, data, folder, device, callback)
    finally:
        callback.close()
    if outcome.state == "non_finite":
        losses = ", ".join(f"{name} {value:g}" for name, value in outcome.losses.items())
        raise TrainingError(
            f"a loss or gradient was not finite at iteration {outcome.iteration} of the phase {outcome.phase} "
            f"({losses}); start another run with other settings, for example optim.lr={config.optim.lr / 2:g}"
        )
    phases = [name for name, _ in config.schedule]
    evaluate_phases(folder, phases, device=str(device), workers=0, progress=progress)
    draw_phases(folder, phases)


def _open_slices(folder: Any, split: str, *, labels: bool, in_memory: object) -> Slices:
    return LocalSlices(folder, split, labels=labels)


def _position(folder: RunDirectory) -> dict[str, Any]:
    try:
        records = folder.read_metrics()
    except MpsclError:
        return {}  # the status says what is more urgent
    return {key: records[-1][key] for key in ("phase", "iteration", "global_step")} if records else {}


def _result(folder: RunDirectory, config: Config) -> TrainingResult:
    newest, _ = checkpoint.latest(folder.checkpoints)
    assert newest is not None
    scores: dict[str, dict[str, dict[str, float]]] = {}
    table = folder.results / "phases.json"
    if table.exists():
        rows = json.loads(table.read_text(encoding="utf-8"))["rows"].values()
        for (phase, _), row in zip(config.schedule, rows, strict=True):
            scores[phase] = {
                structure: {measure: _number(values[measure]["mean"]) for measure in _MEASURES}
                for structure, values in row["structures"].items()
            }
    best = folder.best if folder.best.is_dir() else None
    return TrainingResult(folder.path, config, scores, folder.read_metrics(), newest, best)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


class _RunCallback(loop.Callback):
    """Keeps TensorBoard, curves and notices of the run folder up to date, and shows progress lines if asked to."""

    def __init__(self, folder: RunDirectory, classes: tuple[str, ...], batch_size: int, progress: bool) -> None:
        self.folder, self.classes, self.batch_size, self.progress = folder, classes, batch_size, progress
        self.board: TensorBoard | None = None
        self.line: ProgressLine | None = None
        self.phase = ""

    def on_start(self, step: int) -> None:
        self.board = TensorBoard(self.folder.tensorboard, resume_step=step, warn=self.on_warning)

    def on_warning(self, text: str) -> None:
        log.info("%s", text)
        self.folder.add_warning(text)
        if self.line is not None:
            self.line.message(text)

    def on_metrics(self, record: Mapping[str, Any], validated: bool) -> None:
        if self.board is not None:
            self.board.record(record)
        if validated:
            plot_progress(self.folder.read_metrics(), self.folder.progress_image, self.folder.name)
        if self.progress:
            self._show(record)

    def on_images(self, step: int, images: Tensor, predictions: Tensor, labels: Tensor | None) -> None:
        maps = {"prediction": predictions.numpy()} | ({} if labels is None else {"label": labels.numpy()})
        if self.board is not None:
            self.board.panel(step, "target", panel(images.numpy(), maps, self.classes))

    def close(self) -> None:
        """Close the event file and end the progress line."""
        if self.board is not None:
            self.board.close()
        if self.line is not None:
            self.line.close()

    def _show(self, record: Mapping[str, Any]) -> None:
        if self.line is None or record["phase"] != self.phase:
            if self.line is not None:
                self.line.close()
            self.phase = record["phase"]
            self.line = ProgressLine(
                record["iterations"],
                phase_title(self.phase),
                images_per_iteration=self.batch_size * (2 if reads_target(self.phase) else 1),
                start=record["iteration"],
            )
        self.line.update(record["iteration"], loss=record.get("train/loss_segmentation"))
