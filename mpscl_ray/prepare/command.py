"""Images to a dataset for training: ``python -m mpscl_ray.prepare INPUT --layout mmwhs --out DIR``."""

from __future__ import annotations

from collections.abc import Sequence

from mpscl_ray.prepare.options import parse


def main(arguments: Sequence[str]) -> int:
    """The command line; returns its exit code."""
    options = parse(arguments)
    # Imported here: help and refused arguments need no scipy and no pyarrow.
    from mpscl_ray.prepare.run import next_command, prepare, summary

    folders = prepare(options)
    for folder in folders.values():
        print(summary(folder))
    print(f"next: {next_command(folders)}")
    return 0
