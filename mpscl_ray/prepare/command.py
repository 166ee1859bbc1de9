"""Images to a dataset for training: ``python -m mpscl_ray.prepare INPUT --layout mmwhs --out DIR``."""

from __future__ import annotations

from collections.abc import Sequence

from mpscl_ray.prepare.arguments import parse
from mpscl_ray.runs.signals import first_signal_ends


def main(arguments: Sequence[str]) -> int:
    """The command line; returns its exit code."""
    options = parse(arguments)
    # Imported here: help and refused arguments need no scipy and no pyarrow.
    from mpscl_ray.prepare.run import prepare, report

    with first_signal_ends("before the dataset was finished; nothing was written, give the same command again"):
        folders = prepare(options)
    report(folders, pictures=options.pictures)
    return 0
