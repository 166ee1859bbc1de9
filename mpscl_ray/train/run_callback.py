"""What a training on Ray and one in this process do with what they measure: TensorBoard, curves, page and warnings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mpscl_ray.config import Config
from mpscl_ray.runs.plots import panel, plot_progress
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.runs.tensorboard import TensorBoard
from mpscl_ray.train import loop
from mpscl_ray.train.training_page import TrainingPage


class RunCallback(loop.Callback):
    """Keeps TensorBoard, curves and warnings of a run folder up to date.

    Args:
        folder: of the run.
        config: its settings.
        classes: names, background first.
        writes: whether this worker writes TensorBoard, curves and the page.
    """

    def __init__(self, folder: RunDirectory, config: Config, classes: tuple[str, ...], writes: bool = True) -> None:
        self.folder, self.classes, self.writes = folder, classes, writes
        self.tensorboard = "tensorboard" in config.run.loggers
        self.board: TensorBoard | None = None
        self.page = TrainingPage(folder, config, classes) if writes and config.run.progress_page else None

    def on_start(self, step: int) -> None:
        if self.board is not None:  # training has gone back
            self.board.close()
        if self.writes and self.tensorboard:
            self.board = TensorBoard(self.folder.tensorboard, resume_step=step, warn=self.on_warning)
        if self.page is not None:
            self.page.start(step)

    def on_warning(self, text: str) -> None:
        self.folder.add_warning(text)
        if self.page is not None:
            self.page.warn(text)

    def on_metrics(self, record: Mapping[str, Any], validated: bool) -> None:
        if self.board is not None:
            self.board.record(record)
        if validated and self.writes:
            plot_progress(self.folder.read_metrics(), self.folder.progress_image, self.folder.name)
        if self.page is not None:
            self.page.record(record)

    def on_images(self, step: int, images: Tensor, predictions: Tensor, labels: Tensor | None) -> None:
        if not self.writes:
            return
        maps = {"prediction": predictions.numpy()} | ({} if labels is None else {"label": labels.numpy()})
        image = panel(images.numpy(), maps, self.classes)
        if self.board is not None:
            self.board.panel(step, "target", image)
        if self.page is not None:
            self.page.picture(step, image)

    def close(self) -> None:
        """Close the event file, and write the page once more. Safe to call twice."""
        if self.board is not None:
            self.board.close()
        if self.page is not None:
            self.page.close()
