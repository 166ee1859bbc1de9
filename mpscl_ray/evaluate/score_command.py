"""``python -m mpscl_ray.score PREDICTIONS LABELS``: Dice and surface distances of label maps that any program made."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mpscl_ray.data.volumes.recipe import GEOMETRIES
from mpscl_ray.errors import ConfigError
from mpscl_ray.evaluate.label_names import given_names
from mpscl_ray.predict.command import spacing
from mpscl_ray.runs import cli
from mpscl_ray.runs.storage import is_url, parse_location

_EXAMPLES = """\
examples:
  python -m mpscl_ray.score predictions labelsTs --labels 1=MYO,2=LV --out scores
  python -m mpscl_ray.score nnunet_predictions Dataset042_Heart/labelsTs    names: dataset.json
  python -m mpscl_ray.score predictions MMWHS \\
      --labels 205=MYO,500=LVC --prediction-labels 1=MYO,2=LVC \\
      --prediction-pattern '{case}_image_prediction.nii.gz' --label-pattern '{case}_label.nii.gz'
  python -m mpscl_ray.score totalsegmentator labels \\
      --labels 1=MYO,2=LV --prediction-labels 1=MYO,3=LV \\
      --prediction-pattern '{case}/segmentation.nii.gz' --resample nearest --cross-check medpy

Files are paired by name without .nii.gz, .seg.nrrd, and endings such as _seg, _label, _gt, _pred.
Without --labels the names are those of dataset.json or labels.json beside the label maps
(dataset.json also in the folder above labelsTr and labelsTs); predictions without a table of
their own have the ids of the labels. --out writes scores.csv (a line per case and structure),
summary.json and summary.md. With --cross-check, exit code 6 means that a difference was too
large.
"""


def main(arguments: Sequence[str]) -> int:
    """Score label maps and print their table; returns the exit code."""
    options = _parser().parse_args(list(arguments))
    if options.workers is not None and options.workers < 0:
        raise ConfigError(f"--workers is {options.workers}; expected 0 or more")
    for location in (options.predictions, options.label_maps):
        if is_url(location):
            raise ConfigError(f"{location} is in a bucket, and label maps are read from a disk; copy them to a folder")
    if options.out is not None:
        parse_location(options.out)
    given_names("--labels", options.labels)
    given_names("--prediction-labels", options.prediction_labels)
    options.predictions, options.label_maps = Path(options.predictions), Path(options.label_maps)
    # Imported here: help and refused arguments need no numpy and no scipy.
    from mpscl_ray.evaluate.score_run import score_label_maps

    return score_label_maps(options)


def _parser() -> argparse.ArgumentParser:
    parser = cli.CommandParser(
        prog="python -m mpscl_ray.score",
        description="Dice, average surface distance (ASD) and 95th percentile (HD95) of label maps that any program\n"
        "made, against labels, on the grid of the labels and with every voxel.",
        epilog=f"{_EXAMPLES}\n{cli.EXIT_CODES}",
    )
    add = parser.add_argument
    add(
        "predictions",
        metavar="PREDICTIONS",
        help="folder of predicted label maps (NIfTI, NRRD, MetaImage), or one file",
    )
    add("label_maps", metavar="LABELS", help="folder of the true label maps, or one file")
    add("--labels", metavar="TABLE", help="ids and names, e.g. 1=MYO,2=LV, or a JSON file with them")
    add("--prediction-labels", metavar="TABLE", help="the same for the predictions, if their ids are others")
    add("--prediction-pattern", metavar="PATTERN", help="path of a prediction below its folder, with {case} and *")
    add("--label-pattern", metavar="PATTERN", help="the same for a label")
    add("--ignore-label", type=int, metavar="ID", help="voxels that have this id in the label are counted nowhere")
    add("--resample", choices=["nearest"], help="bring predictions on another grid to that of their label")
    add("--geometry", choices=GEOMETRIES, help="which part of a header is right where they contradict each other")
    add("--assume-spacing", type=spacing, metavar="X,Y,Z", help="voxel size in mm for files without a usable geometry")
    add("--allow-missing", action="store_true", help="score the pairs although some files have no counterpart")
    add("--cross-check", choices=["medpy"], help="compute Dice, ASD and HD95 with medpy too, and compare")
    add("--out", metavar="DIR", help="folder for scores.csv, summary.json and summary.md, or its URL")
    add("--workers", type=int, metavar="N", help="cases at a time, on Ray; 0: in this process (default: by number)")
    return parser
