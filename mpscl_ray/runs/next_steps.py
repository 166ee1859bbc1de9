"""Commands that are printed for the user to give next: they work in a shell as they are printed."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from mpscl_ray.runs.storage import S3Path


def command_line(command: str, *words: str | Path | S3Path) -> str:
    """A command of this package, its words quoted for a shell."""
    return shlex.join(["python", "-m", f"mpscl_ray.{command}", *map(str, words)])


def logger_lines(folder: Path | S3Path, loggers: Sequence[str]) -> list[str]:
    """How to look at what run.loggers have of the runs of a command, whose folder this is."""
    lines = tensorboard_lines(folder / "tensorboard") if "tensorboard" in loggers else []
    if isinstance(folder, S3Path):
        return lines
    if "mlflow" in loggers and "MLFLOW_TRACKING_URI" not in os.environ:
        lines.append(shlex.join(["mlflow", "ui", "--backend-store-uri", f"sqlite:///{folder / 'trackers/mlflow.db'}"]))
    if "wandb" in loggers and os.environ.get("WANDB_MODE", "offline") == "offline":
        lines.append(f"wandb sync {shlex.quote(str(folder / 'trackers/wandb'))}/offline-run-*")
    return lines


def tensorboard_lines(events: Path | S3Path) -> list[str]:
    """How to look at event files; nothing where they are in a bucket, which TensorBoard does not read as it is.

    TensorBoard itself is not among the packages that are always installed.
    """
    if isinstance(events, S3Path):
        return []
    line = shlex.join(["tensorboard", "--logdir", str(events)])
    return [line] if shutil.which("tensorboard") else [f'{line}  # first: pip install "mpscl_ray[tensorboard]"']
