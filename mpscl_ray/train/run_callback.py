"""What a training on Ray and one in this process do with what they measure: TensorBoard, curves and warnings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mpscl_ray.runs.plots import panel, plot_progress
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.runs.tensorboard import TensorBoard
from mpscl_ray.train import loop


class RunCallback(loop.Callback):
    """Keeps TensorBoard, curves and warnings of a run folder up to date.

    Args:
        folder: of the run.
        classes: names, background first.
        writes: whether this worker writes TensorBoard and curves.
        tensorboard: whether event files are wanted (run.loggers).
    """

    def __init__(
        self, folder: RunDirectory, classes: tuple[str, ...], writes: bool = True, tensorboard: bool = True
    ) -> None:
        self.folder, self.classes, self.writes, self.tensorboard = folder, classes, writes, tensorboard
        self.board: TensorBoard | None = None

    def on_start(self, step: int) -> None:
        if self.writes and self.tensorboard:
            self.board = TensorBoard(self.folder.tensorboard, resume_step=step, warn=self.on_warning)

    def on_warning(self, text: str) -> None:
        self.folder.add_warning(text)

    def on_metrics(self, record: Mapping[str, Any], validated: bool) -> None:
        if self.board is not None:
            self.board.record(record)
        if validated and self.writes:
            plot_progress(self.folder.read_metrics(), self.folder.progress_image, self.folder.name)

    def on_images(self, step: int, images: Tensor, predictions: Tensor, labels: Tensor | None) -> None:
        maps = {"prediction": predictions.numpy()} | ({} if labels is None else {"label": labels.numpy()})
        if self.board is not None:
            self.board.panel(step, "target", panel(images.numpy(), maps, self.classes))

    def close(self) -> None:
        """Close the event file. Safe to call twice."""
        if self.board is not None:
            self.board.close()
