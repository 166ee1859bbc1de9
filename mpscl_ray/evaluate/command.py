"""``python -m mpscl_ray.evaluate RUN``: Dice and surface distance of a trained segmenter on labelled volumes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mpscl_ray.data import SPLITS
from mpscl_ray.errors import ConfigError
from mpscl_ray.runs import cli

_EXAMPLES = """\
examples:
  python -m mpscl_ray.evaluate runs/mpscl
      last checkpoint, test split of the target
  python -m mpscl_ray.evaluate runs/mpscl --checkpoint source_only
      the end of the first phase
  python -m mpscl_ray.evaluate runs/mpscl --data DATA/ct --split val
      another dataset or split
  python -m mpscl_ray.evaluate runs/mpscl --checkpoint mr2ct.pth --protocol released
      released weights, scored as the released code does
  python -m mpscl_ray.evaluate runs/mpscl --choose-postprocessing
      choose the postprocessing of each structure, then score every phase with it
  python -m mpscl_ray.evaluate runs/mpscl --calibrate-quality
      let predict estimate the Dice of each label map that it makes

Writes per_volume.csv, summary.csv, summary.md and summary.json to RUN/results/NAME/.
"""


def main(arguments: Sequence[str]) -> int:
    """Evaluate one checkpoint and print its table; returns the exit code."""
    parser = cli.CommandParser(
        prog="python -m mpscl_ray.evaluate",
        description="Dice and surface distances of what predict gives for labelled volumes.",
        epilog=f"{_EXAMPLES}\n{cli.EXIT_CODES}",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of the run, a model file that export wrote, or the URL of either")
    add("--checkpoint", default="last", help="last (default), best, a phase, a name in RUN/checkpoints, or a path")
    add("--data", metavar="FOLDER", help="prepared dataset, or its URL (default: the run's target)")
    add("--split", default="test", choices=SPLITS, help="which volumes (default: test)")
    add(
        "--out",
        metavar="DIR",
        help="folder for the tables, or its URL (default: RUN/results/NAME; a model file has none)",
    )
    parser.add_workers()
    parser.add_ray()
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_postprocessing()
    add(
        "--choose-postprocessing",
        action="store_true",
        help="first choose, on validation volumes, which parts of each structure predict keeps and whether it fills "
        "holes: for the end of every phase and for best, or for --checkpoint alone",
    )
    add(
        "--calibrate-quality",
        action="store_true",
        help="calibrate predict's quality estimate on labelled validation volumes of the source, for the same "
        "checkpoints; nothing is scored",
    )
    add(
        "--protocol",
        choices=("file", "prepared", "released"),
        help="what is scored: file (default where the dataset has it): label maps as predict writes them; to compare "
        "with papers: prepared (the prepared slices) or released (these as the released code does)",
    )
    options = parser.parse_args(list(arguments))
    if options.choose_postprocessing and options.calibrate_quality:
        raise ConfigError("give --choose-postprocessing first, then --calibrate-quality, which counts with its rules")
    if options.choose_postprocessing or options.calibrate_quality:
        _check_own_volumes(options)
    # Imported here: help and refused arguments need no torch.
    from mpscl_ray.evaluate.run import evaluate

    return evaluate(options)


def _check_own_volumes(options: argparse.Namespace) -> None:
    """Raises ConfigError for options that choosing the postprocessing, or calibrating, does not take."""
    what = "--choose-postprocessing" if options.choose_postprocessing else "--calibrate-quality"
    other = {
        "--data": options.data,
        "--out": options.out,
        "--protocol": options.protocol,
        f"--split {options.split}": options.split != "test",
        "--no-postprocessing and --largest-component": options.postprocessing != "chosen",
    }
    if given := [name for name, value in other.items() if value]:
        raise ConfigError(
            f"{what} takes the validation volumes of the run's own datasets; leave out "
            f"{', '.join(given)} here, and evaluate once more with it"
        )
