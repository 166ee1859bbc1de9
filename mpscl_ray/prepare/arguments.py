"""The command line of ``mpscl_ray.prepare``, and of ``mpscl_ray.check`` as far as they share it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from mpscl_ray.data import SPLITS
from mpscl_ray.data.volumes.recipe import GEOMETRIES, NAN_POLICIES, Recipe
from mpscl_ray.prepare.layouts import LAYOUTS
from mpscl_ray.prepare.options import PrepareOptions
from mpscl_ray.runs import cli
from mpscl_ray.runs.storage import parse_location

EXAMPLES = """\
examples:
  MM-WHS 2017, as downloaded, with the published test volumes:
    python -m mpscl_ray.prepare MMWHS --layout mmwhs --out DATA --fix-label 421=420
  a source and a target of your own, the target without labels:
    python -m mpscl_ray.prepare HOSPITAL_A --layout folder --out DATA --modality mr \\
        --labels 1=MYO,2=LV \\
        --image-pattern '{case}_image.nii.gz' --label-pattern '{case}_label.nii.gz'
    python -m mpscl_ray.prepare HOSPITAL_B --layout folder --out DATA --modality ct \\
        --labels 1=MYO,2=LV --image-pattern '{case}.nii.gz' --unlabelled
  the TFRecords of SIFA / PnP-AdaNet:
    python -m mpscl_ray.prepare RECORDS --layout tfrecord --out DATA --group-slices 600
  an nnU-Net dataset, split 80 : 20 by patient, for a small network:
    python -m mpscl_ray.prepare Dataset042_Heart --layout nnunet --out DATA --split 0.8,0.2,0 \\
        --crop 192,192 --size 64,64
  five folds for cross-validation, which share their files; then compare --folds:
    python -m mpscl_ray.prepare MMWHS --layout mmwhs --out FOLDS --fix-label 421=420 --folds 5
"""


def _list(convert: Callable[[str], Any], count: int, example: str) -> Callable[[str], Any]:
    def parse(text: str) -> tuple[Any, ...] | None:
        if text == "none":
            return None
        try:
            parts = tuple(None if part.strip() == "keep" else convert(part) for part in text.split(","))
        except ValueError:
            parts = ()
        if len(parts) != count:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {count} comma-separated numbers, e.g. {example}")
        return parts

    return parse


def _splits(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parser() -> argparse.ArgumentParser:
    """The command line of ``mpscl_ray.prepare``."""
    top = cli.CommandParser(
        prog="python -m mpscl_ray.prepare",
        description="Make a dataset for training from images: checked, turned, cropped, normalised, split by patient.",
        epilog=f"{EXAMPLES}\n{cli.EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("input", type=Path, metavar="INPUT", help="folder with the images")
    top.add_argument("--layout", required=True, choices=LAYOUTS, help="how its files are named")
    top.add_argument(
        "--out",
        required=True,
        type=parse_location,
        metavar="DIR",
        help="each modality becomes DIR/<modality>; a folder or a URL",
    )
    top.add_argument("--modality", help="name of the modality (folder, nnunet), or the only one to prepare (others)")
    top.add_argument(
        "--hash-ids",
        type=Path,
        metavar="FILE",
        help="hashes instead of the names of cases, patients and files; FILE is private and says what each stands for",
    )
    top.add_argument("--overwrite", action="store_true", help="replace a finished dataset of the same name")
    top.add_argument("--no-pictures", dest="pictures", action="store_false", help="write no page of pictures")
    top.add_argument(
        "--workers", type=int, metavar="N", help="volumes at a time, with Ray; 0: one by one in this process"
    )
    _add_files(top.add_argument_group("files").add_argument)
    _add_labels(top.add_argument_group("labels").add_argument)
    splits = top.add_argument_group("splits, always by patient").add_argument
    _add_splits(splits)
    _add_transductive(splits)
    steps = top.add_argument_group("from volume to slices").add_argument
    _add_slices(steps)
    _add_sizes(steps)
    _add_geometry(steps)
    _add_scaling(steps)
    _add_intensities(steps)
    return top


def add_input(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``mpscl_ray.prepare`` that describe its input."""
    parser.add_argument("--modality", help="name of the modality (folder, nnunet), or the only one to check (others)")
    _add_files(parser.add_argument_group("files").add_argument)
    labels = parser.add_argument_group("labels and patients").add_argument
    _add_labels(labels)
    _add_transductive(labels)
    volumes = parser.add_argument_group("volumes").add_argument
    _add_slices(volumes)
    _add_geometry(volumes)
    _add_intensities(volumes)


def _add_files(add: Callable[..., Any]) -> None:
    add("--image-pattern", metavar="PATTERN", help="layout folder: path of an image, with {case}, {patient}, * and **/")
    add("--label-pattern", metavar="PATTERN", help="layout folder: path of its label")
    add("--patient-pattern", metavar="REGEX", help="finds the patient in a case id (first group)")
    add("--group-slices", type=int, metavar="N", help="slice files: N consecutive numbers make a case")
    add("--channel", type=int, default=0, help="layout nnunet: which channel to read")
    add("--frames", metavar="WHICH", help="time points of 4-D volumes: labelled, all, or numbers from 0, e.g. 0,9")
    add(
        "--flip",
        choices=("auto", "none", "both"),
        default="auto",
        help="npz volumes: flip rows and columns; auto: those named like the released test volumes",
    )


def _add_labels(add: Callable[..., Any]) -> None:
    add("--labels", metavar="TABLE", help="raw ids, or names of mask files, and class names, e.g. 200=MYO,500=LV")
    add("--ignore-labels", metavar="IDS", help="raw ids that are background on purpose, e.g. 550,600: trained as such")
    add("--not-annotated-labels", metavar="IDS", help="raw ids that nobody annotated, e.g. 5: they count nowhere")
    add("--fix-label", metavar="WRONG=MEANT", help="wrong ids in label files, e.g. 421=420 in MM-WHS")
    add(
        "--unknown-labels",
        choices=("error", "background"),
        help="other ids: an error (default for volumes), or reported and background (default for released slices)",
    )
    add(
        "--unlabelled",
        nargs="?",
        const=SPLITS,
        default=(),
        type=_splits,
        metavar="SPLITS",
        help="splits that need no labels, and get none, e.g. train; without SPLITS all of them",
    )
    add("--allow-missing-classes", action="store_true", help="a class may be absent from training")


def _add_splits(add: Callable[..., Any]) -> None:
    add(
        "--split",
        metavar="HOW",
        help="mmwhs (published test volumes; default of that layout), released (by file name; default for slices), "
        "fractions of train,val,test (default 0.7,0.1,0.2), or a JSON file {train: [ids], val: [...], test: [...]}, "
        "or nnU-Net's splits_final.json (--fold)",
    )
    add(
        "--fold", type=int, metavar="N", help="which split of a FILE with one for each fold (splits_final.json), from 0"
    )
    add(
        "--folds",
        type=int,
        metavar="K",
        help="K splits for cross-validation, DIR/<modality>/fold0 and so on, each patient for test in one of them; "
        "--split TRAIN,VAL,0 divides the others (default 0.875,0.125,0)",
    )
    add("--seed", type=int, default=0, help="seed of the random split by fractions, and of the folds")


def _add_transductive(add: Callable[..., Any]) -> None:
    add(
        "--transductive",
        action="store_true",
        help="patients may be in train, without their labels, and in val or test as well (e.g. MS-CMRSeg)",
    )


def _add_slices(add: Callable[..., Any]) -> None:
    default = Recipe()
    add("--orientation", choices=("canonical", "stored"), default=default.orientation)
    add("--slice-axis", default=default.slice_axis, help="coronal, axial, sagittal; with --orientation stored 0, 1, 2")


def _add_sizes(add: Callable[..., Any]) -> None:
    default = Recipe()
    add(
        "--spacing-mm",
        type=_list(float, 3, "keep,1,1"),
        metavar="D,H,W",
        help="resample to this voxel size (slice, row, column); `keep` leaves an axis as it is; default: none",
    )
    add(
        "--crop",
        type=_list(int, 2, "256,256"),
        default=default.crop,
        metavar="H,W",
        help="rows and columns cut out around the heart, default 256,256; none: whole slices",
    )
    add("--crop-depth", type=int, metavar="D", help="largest number of slices")
    add(
        "--centre",
        choices=("image", "labels", "auto"),
        default=default.centre,
        help="centre of the crop: found in the image (default), as for a new patient; from the labels, as published; "
        "auto: from the labels if all splits have them",
    )
    add("--size", type=_list(int, 2, "80,80"), metavar="H,W", help="resize the crop; default: keep it")


def _add_geometry(add: Callable[..., Any]) -> None:
    add(
        "--assume-spacing",
        type=_list(float, 3, "1,1,1"),
        metavar="X,Y,Z",
        help="voxel size in mm of volumes whose header has no usable geometry",
    )
    add(
        "--geometry",
        choices=GEOMETRIES,
        help="which part of a header is right where they contradict each other; pixdim: its voxel sizes, along the "
        "axes of sform or qform if there are any",
    )
    add("--fix-geometry", choices=("copy-from-image",), help="if a label's geometry differs, use that of its image")


def _add_scaling(add: Callable[..., Any]) -> None:
    add(
        "--clip-percentile",
        type=float,
        default=Recipe().clip_percentile,
        help="brighter voxels are set to this percentile",
    )
    add(
        "--range",
        default="auto",
        metavar="LO,HI",
        help="z-scored intensities that become -1 and 1; estimate: from the training cases; sifa: the published ones; "
        "auto: sifa for released slices of ct and mr, else estimate",
    )


def _add_intensities(add: Callable[..., Any]) -> None:
    add(
        "--nan-policy",
        choices=NAN_POLICIES,
        default="error",
        help="voxels that are NaN or infinite: an error (default), set to the lowest finite intensity, or to 0",
    )
    add("--any-modality", action="store_true", help="accept images whose intensities look like another modality")


def parse(arguments: Sequence[str]) -> PrepareOptions:
    """Options from the command line.

    Raises:
        ConfigError: a value is out of range.
        SystemExit: with code 2 for wrong usage, 0 after ``--help``.
    """
    return from_values(vars(parser().parse_args(with_negative_values(arguments))))


def with_negative_values(arguments: Sequence[str]) -> list[str]:
    """The arguments, ``--range -2.8,3.2`` as ``--range=-2.8,3.2``: argparse takes the value for an option."""
    joined: list[str] = []
    for argument in arguments:
        if re.match(r"-[\d.]", argument) and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def from_values(values: dict[str, Any]) -> PrepareOptions:
    """Options from parsed arguments; steps of the recipe that are not among them are the default ones."""
    names = [item.name for item in fields(Recipe) if item.name in values]
    recipe = Recipe(**{name: values[name] for name in names})
    return PrepareOptions(**{name: value for name, value in values.items() if name not in names}, recipe=recipe)
