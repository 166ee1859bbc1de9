"""Commands that are printed for the user to give next: they work in a shell as they are printed."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from mpscl_ray.runs.storage import S3Path


def command_line(command: str, *words: str | Path | S3Path) -> str:
    """A command of this package, its words quoted for a shell."""
    return shlex.join(["python", "-m", f"mpscl_ray.{command}", *map(str, words)])


def tensorboard_lines(events: Path | S3Path) -> list[str]:
    """How to look at event files; nothing where they are in a bucket, which TensorBoard does not read as it is.

    TensorBoard itself is not among the packages that are always installed.
    """
    if isinstance(events, S3Path):
        return []
    line = shlex.join(["tensorboard", "--logdir", str(events)])
    return [line] if shutil.which("tensorboard") else [f'{line}  # first: pip install "mpscl_ray[tensorboard]"']
