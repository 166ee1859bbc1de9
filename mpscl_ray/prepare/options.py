"""Options of ``mpscl_ray.prepare``: from the command line, and back to a command line."""

from __future__ import annotations

import argparse
import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from mpscl_ray.data import SPLITS
from mpscl_ray.data.volumes.recipe import (
    GEOMETRIES,
    NAN_POLICIES,
    RELEASED_RANGES,
    GeometryFrom,
    NanPolicy,
    Recipe,
)
from mpscl_ray.errors import ConfigError
from mpscl_ray.prepare.file_listing import printable
from mpscl_ray.prepare.layouts import LAYOUTS
from mpscl_ray.prepare.source_cases import Flip
from mpscl_ray.runs import cli
from mpscl_ray.runs.storage import S3Path, parse_location

EXAMPLES = """\
examples:
  MM-WHS 2017, as downloaded, with the published test volumes:
    python -m mpscl_ray.prepare MMWHS --layout mmwhs --out DATA --fix-label 421=420
  a source and a target of your own, the target without labels:
    python -m mpscl_ray.prepare HOSPITAL_A --layout folder --out DATA --modality mr \\
        --labels 1=MYO,2=LV \\
        --image-pattern '{case}_image.nii.gz' --label-pattern '{case}_label.nii.gz'
    python -m mpscl_ray.prepare HOSPITAL_B --layout folder --out DATA --modality ct \\
        --labels 1=MYO,2=LV --image-pattern '{case}.nii.gz' --unlabelled --centre image
  the TFRecords of SIFA / PnP-AdaNet:
    python -m mpscl_ray.prepare RECORDS --layout tfrecord --out DATA --group-slices 600
  an nnU-Net dataset, split 80 : 20 by patient, for a small network:
    python -m mpscl_ray.prepare Dataset042_Heart --layout nnunet --out DATA --split 0.8,0.2,0 \\
        --crop 192,192 --size 64,64
"""

SLICE_LAYOUTS = ("tfrecord", "npy")
"""Layouts of inputs that are slices already."""


@dataclass(frozen=True)
class PrepareOptions:
    """Everything that decides what a prepared dataset is. Field names are those of the command's options."""

    input: Path
    out: Path | S3Path | None
    """Each modality becomes a folder in it; None: the input is only checked."""
    layout: str
    modality: str | None = None
    image_pattern: str | None = None
    label_pattern: str | None = None
    patient_pattern: str | None = None
    group_slices: int | None = None
    channel: int = 0
    frames: str | None = None
    labels: str | None = None
    ignore_labels: str | None = None
    not_annotated_labels: str | None = None
    fix_label: str | None = None
    unknown_labels: Literal["error", "background"] | None = None
    split: str | None = None
    fold: int | None = None
    seed: int = 0
    unlabelled: tuple[str, ...] = ()
    transductive: bool = False
    range: str = "auto"
    flip: Flip = "auto"
    assume_spacing: tuple[float, ...] | None = None
    geometry: GeometryFrom | None = None
    nan_policy: NanPolicy = "error"
    fix_geometry: Literal["copy-from-image"] | None = None
    any_modality: bool = False
    allow_missing_classes: bool = False
    overwrite: bool = False
    pictures: bool = True
    workers: int | None = None
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        """Refuse options that are wrong for every input.

        Raises:
            ConfigError: naming the option.
        """
        if self.layout not in LAYOUTS:
            raise ConfigError(f"--layout {self.layout!r}: expected one of {', '.join(LAYOUTS)}")
        wrong = [name for name in self.unlabelled if name not in SPLITS]
        if wrong:
            raise ConfigError(f"--unlabelled {','.join(self.unlabelled)}: {wrong[0]!r} is none of {', '.join(SPLITS)}")
        if self.workers is not None and self.workers < 0:
            raise ConfigError(f"--workers {self.workers}: expected 0 (this process) or more")
        if self.channel < 0:
            raise ConfigError(f"--channel {self.channel}: expected 0 or more")
        if self.seed < 0:
            raise ConfigError(f"--seed {self.seed}: expected 0 or more")
        spacing = self.assume_spacing
        if spacing is not None and not all(size is not None and 0 < size < math.inf for size in spacing):
            raise ConfigError(f"--assume-spacing {_text(spacing)}: expected three sizes in mm above 0")
        if self.modality is not None and not self.modality.replace("_", "").replace("-", "").isalnum():
            raise ConfigError(f"--modality {self.modality!r}: expected a short name such as ct, mr, lge")
        self.given_range(self.modality or "ct")

    @property
    def splits_without_labels(self) -> tuple[str, ...]:
        """Splits that need no labels, and get none."""
        return tuple(name for name in SPLITS if name in self.unlabelled or (name == "train" and self.transductive))

    def given_range(self, modality: str) -> tuple[float, float, str] | None:
        """Lower and upper end and origin of the intensity range by ``--range``; None if it has to be estimated.

        Raises:
            ConfigError: it is neither a known word nor two numbers, the lower one first.
        """
        text = self.range
        published = RELEASED_RANGES.get(modality)
        if text == "auto":
            text = "sifa" if self.layout in SLICE_LAYOUTS and published else "estimate"
        if text == "estimate":
            return None
        if text == "sifa":
            if published is None:
                raise ConfigError(f"--range sifa is published for ct and mr, not for {modality!r}; give --range LO,HI")
            return *published, "published (SIFA, MPSCL)"
        found = numbers(text)
        if found is None or len(found) != 2 or not -1e30 < found[0] < found[1] < 1e30:
            raise ConfigError(
                f"--range {text!r}: expected two numbers, the lower one first, e.g. --range -2.8,3.2, or estimate, or "
                "sifa"
            )
        return found[0], found[1], "given"

    def command(self) -> str:
        """Command line that makes the same dataset; options that do not change it are left out."""
        words = ["python", "-m", "mpscl_ray.prepare", str(self.input.absolute())]
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        defaults = {item.name: item.default for item in fields(self)}
        for name in ("input", "recipe", "workers", "overwrite", "pictures"):
            del values[name]
        values |= self.recipe.to_json()
        values["out"] = self.out.absolute() if isinstance(self.out, Path) else self.out
        defaults |= Recipe().to_json()
        for name, value in values.items():
            if value == defaults.get(name):
                continue
            flag = "--" + name.replace("_", "-")
            words += [flag] if value is True else [flag, _text(value)]
        return printable(shlex.join(words))


def numbers(text: str) -> list[float] | None:
    """Comma-separated numbers; None if the text is something else."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return None


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join("keep" if part is None else str(part) for part in value)
    return "none" if value is None else str(value)


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
    add("--seed", type=int, default=0, help="seed of the random split by fractions")


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
