"""Options of ``mpscl_ray.prepare``, and the command line that gives them."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from mpscl_ray.data import SPLITS
from mpscl_ray.data.volumes.recipe import (
    RELEASED_RANGES,
    GeometryFrom,
    NanPolicy,
    Recipe,
)
from mpscl_ray.errors import ConfigError
from mpscl_ray.prepare.file_listing import printable
from mpscl_ray.prepare.layouts import LAYOUTS
from mpscl_ray.prepare.source_cases import Flip
from mpscl_ray.runs.storage import S3Path

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
    folds: int | None = None
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
    hash_ids: Path | None = None
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
        if self.folds is not None:
            self._check_folds(self.folds)
        spacing = self.assume_spacing
        if spacing is not None and not all(size is not None and 0 < size < math.inf for size in spacing):
            raise ConfigError(f"--assume-spacing {_text(spacing)}: expected three sizes in mm above 0")
        if self.modality is not None and not self.modality.replace("_", "").replace("-", "").isalnum():
            raise ConfigError(f"--modality {self.modality!r}: expected a short name such as ct, mr, lge")
        self.given_range(self.modality or "ct")

    def _check_folds(self, folds: int) -> None:
        if not 2 <= folds <= 1000:
            raise ConfigError(f"--folds {folds}: expected 2 or more, usually 5, and at most 1000")
        fractions = None if self.split is None else numbers(self.split)
        if self.fold is not None or (self.split is not None and fractions is None):
            given = f"--split {self.split}" if self.fold is None else f"--fold {self.fold}"
            raise ConfigError(f"--folds {folds} draws the patients of all folds itself; leave out {given}")
        if fractions is not None and (len(fractions) != 3 or fractions[2] != 0):
            raise ConfigError(
                f"--split {self.split}: with --folds {folds} each fold tests on 1 patient in {folds}, and --split "
                "divides the others into train and val alone, e.g. --split 0.9,0.1,0"
            )
        if self.transductive:
            raise ConfigError(
                f"--folds {folds} with --transductive: the test patients of a fold would be in its training; leave "
                "out one of the two"
            )
        if self.unlabelled and set(self.unlabelled) != set(SPLITS):
            raise ConfigError(
                f"--unlabelled {','.join(self.unlabelled)}: with --folds {folds} a case is in another split of each "
                "fold; leave it out (labels of a target are never read in training), or name no split"
            )

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
