"""Images to a dataset for training: ``python -m mpscl_ray.prepare INPUT --layout mmwhs --out DIR``."""

from __future__ import annotations

from collections.abc import Sequence

from mpscl_ray.prepare.arguments import parse
from mpscl_ray.runs import json_output
from mpscl_ray.runs.signals import first_signal_ends


def main(arguments: Sequence[str]) -> int:
    """The command line; returns its exit code."""
    options = parse(arguments)
    # Imported here: help and refused arguments need no scipy and no pyarrow.
    from mpscl_ray.prepare.pictures.page import PICTURES
    from mpscl_ray.prepare.run import prepare
    from mpscl_ray.prepare.summary import datasets_of, next_command, summary, summary_json

    with first_signal_ends("before the dataset was finished; nothing was written, give the same command again"):
        folders = prepare(options)
    for folder in folders.values():
        print(summary(folder))
        if options.pictures:
            print(f"  pictures: {folder / PICTURES}")
    following = next_command(folders)
    print(f"next: {following}")
    datasets = [dataset for folder in folders.values() for dataset in datasets_of(folder)]
    json_output.report(datasets=list(map(summary_json, datasets)), next=[following])
    return 0
