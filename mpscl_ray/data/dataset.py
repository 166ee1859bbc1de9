"""The prepared dataset: a folder with one manifest and one Parquet file for each case of one modality.

``FOLDER/manifest.json`` says what the files hold, how they were made and what their SHA-256 is. They are written by
:mod:`mpscl_ray.data.parquet_writer` and read by :mod:`mpscl_ray.data.parquet_reader`.

Folds for cross-validation are datasets ``FOLDER/fold0``, ``FOLDER/fold1``, ... that have a manifest alone: the files of
all cases are in ``FOLDER/cases`` and ``FOLDER/label_maps/cases``. Their intensities are z-scored only; what becomes -1
and 1 is decided by the training cases of each fold, and applied where a case is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from mpscl_ray.data import SPLITS
from mpscl_ray.errors import DataError
from mpscl_ray.runs import safe_json
from mpscl_ray.runs.atomic_files import write_atomically
from mpscl_ray.runs.storage import S3Path, parse_location

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LABEL_MAPS = "label_maps"
"""Folder of the label maps on the grids of the image files."""
CASES = "cases"
"""In the place of a split in the paths of files that folds share."""
_BESIDE = "../"
"""Begins the path of a file that folds share: it is beside the folder of the fold."""
Size = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""Size of a voxel in mm."""
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Side = Annotated[int, Field(ge=1, le=1 << 13)]
_MOST_VOXELS = 1 << 31
"""Of a case."""
_MOST_BYTES = 1 << 28
"""Of a manifest, which has about 3,000 for each case."""
_PREPARE = "python -m mpscl_ray.prepare INPUT --layout LAYOUT --out DIR"


@dataclass(frozen=True)
class Scaling:
    """Intensity range that is mapped to [-1, 1]: ``2 (x - low) / (high - low) - 1``, x being z-scored."""

    __pydantic_config__ = ConfigDict(extra="forbid", ser_json_inf_nan="constants")
    low: float
    high: float
    origin: str
    """Where the range comes from: estimated (from which cases), given, or published."""


@dataclass(frozen=True)
class StoredFile:
    """A file of the dataset besides the Parquet files."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    file: str
    """Path as :func:`label_map_file` gives it."""
    sha256: str
    bytes: Count


@dataclass(frozen=True)
class Case:
    """One prepared case: a volume, or a group of slices that belong together.

    ``id`` is unique within a split; splits are made by ``patient``. Tuples by class have one entry for each
    class of the manifest, background first, and are None if the case is not labelled. Voxels that are not annotated
    are in no number here.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    id: Annotated[str, Field(pattern="^[^/]+$")]
    patient: str
    split: Annotated[str, Field(pattern="^(train|val|test)$")]
    file: str
    """Path of the Parquet file as :func:`case_file` gives it."""
    slices: Annotated[int, Field(ge=1, le=1 << 20)]
    labelled: bool
    sha256: str
    """SHA-256 of the Parquet file."""
    bytes: Count
    content_sha256: str
    """SHA-256 of the voxels as read, before any step: equal for the same image under two names."""
    geometry: dict[str, Any]
    """What maps a prediction back to the original image; empty if the input was slices already."""
    spacing_mm: tuple[Size, Size, Size] | None
    """Size of the prepared voxels, (slice, row, column); None if the input does not say."""
    class_voxels: tuple[Count, ...] | None
    class_centres: tuple[tuple[float, float] | None, ...] | None
    """Mean (row, column) of each class as fractions of height and width; None for an absent class."""
    structure_width: float | None
    """Side in pixels of a square as large as all structures together in the slice that shows most of them."""
    cropped_around_labels: bool
    """Whether the crop was placed by the labels of this case, which for a test case is a mild leak."""
    sources: dict[str, str]
    """Names and SHA-256 of the input files."""
    notices: tuple[str, ...]
    label_map: StoredFile | None = None
    """Class indices on the grid of the image file, a NIfTI file that scores are taken on; None for an unlabelled case
    and for input that was slices already."""
    scale_by: tuple[float, float] | None = None
    """What becomes -1 and 1 where the case is read, the scaling of the manifest; only in a fold, whose files are
    z-scored alone. None: the file is scaled."""


@dataclass(frozen=True)
class Manifest:
    """What a dataset folder holds and how it was made."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    version: int
    modality: str
    classes: tuple[str, ...]
    """Names in the order of the label values, background first; empty if no label table was given."""
    size: tuple[Side, Side]
    """Height and width of every slice."""
    scaling: Scaling
    recipe: dict[str, Any]
    """Steps from a volume to slices; with the scaling, enough to prepare a new volume in the same way."""
    splitting: dict[str, Any]
    labels: dict[str, Any]
    """Raw label ids: the class of each, those that are background on purpose, and those that nobody annotated."""
    steps: tuple[str, ...]
    notices: tuple[str, ...]
    command: str
    """Command that makes this dataset again."""
    product_version: str
    cases: tuple[Case, ...]

    def split(self, name: str) -> tuple[Case, ...]:
        """Cases of one split, in the order of their ids."""
        if name not in SPLITS:
            raise DataError(f"no split is called {name!r}; there are {', '.join(SPLITS)}")
        return tuple(case for case in self.cases if case.split == name)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over classes, size, scaling and the hash of every case: equal for equal data."""
        parts = [
            self.modality,
            list(self.classes),
            list(self.size),
            [self.scaling.low, self.scaling.high],
            sorted([case.split, case.id, case.sha256] for case in self.cases),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


_MANIFEST_TYPE = TypeAdapter(Manifest)


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``, the last step of preparing a dataset: only now the folder is one."""
    content = _MANIFEST_TYPE.dump_python(manifest, mode="json")
    content["checksum"] = _checksum(content)
    text = json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True)
    write_atomically(folder / MANIFEST, text.encode())


def load_manifest(folder: Path | S3Path | str) -> Manifest:
    """Read and check ``manifest.json`` of a dataset folder, given by its path or URL.

    Raises:
        StorageError: a bucket that cannot be read.
        DataError: there is no dataset, or it is damaged or of another format version. The message ends with the
            command that prepares it (again).
    """
    folder = parse_location(folder)
    path = folder / MANIFEST
    try:
        content = safe_json.read(path, _MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(_no_dataset(folder)) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: damaged, no longer JSON ({error}); prepare it again: {_PREPARE}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: not the manifest of a prepared dataset; prepare one: {_PREPARE}")
    command = content.get("command")
    again = f"prepare it again: {command if isinstance(command, str) and command else _PREPARE}"
    version = content.get("version")
    if version != FORMAT_VERSION:
        age = "a newer" if isinstance(version, int) and version > FORMAT_VERSION else "an older or unknown"
        raise DataError(
            f"{path}: the dataset has {age} format (version {version!r}), this program reads version {FORMAT_VERSION}; "
            f"{again}"
        )
    checksum = content.pop("checksum", None)
    if checksum != _checksum(content):
        raise DataError(f"{path}: damaged or edited: its contents do not match its checksum; {again}")
    try:
        manifest = _MANIFEST_TYPE.validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: {where}: {first['msg']}; {again}") from None
    if not manifest.scaling.low < manifest.scaling.high:
        raise DataError(f"{path}: scaling.low is not below scaling.high; {again}")
    for case in manifest.cases:
        if case.slices * math.prod(manifest.size) > _MOST_VOXELS:
            raise DataError(
                f"{path}: case {case.id!r} has {case.slices} slices of {manifest.size[0]} x {manifest.size[1]} pixels, "
                f"more than {_MOST_VOXELS} voxels; {again}"
            )
        if case.scale_by not in (None, (manifest.scaling.low, manifest.scaling.high)):
            raise DataError(f"{path}: case {case.id!r} is scaled by {case.scale_by}, not as the manifest says; {again}")
        # These names alone: nothing outside the dataset, or the folder of its folds, is ever read.
        beside, kind = ("", case.split) if case.scale_by is None else (_BESIDE, CASES)
        files = [(case.file, beside + case_file(kind, case.id))]
        files += [(case.label_map.file, beside + label_map_file(kind, case.id))] if case.label_map else []
        for file, expected in files:
            if file != expected:
                raise DataError(f"{path}: case {case.id!r} names the file {file!r}, expected {expected!r}; {again}")
    return manifest


def in_fold(case: Case, split: str, scaling: Scaling) -> Case:
    """A case whose files folds share, as the manifest of a fold has it."""
    label_map = case.label_map and replace(case.label_map, file=_BESIDE + case.label_map.file)
    return replace(
        case, split=split, file=_BESIDE + case.file, label_map=label_map, scale_by=(scaling.low, scaling.high)
    )


def stored_file(folder: Path | S3Path | str, file: str) -> Path | S3Path:
    """Where a file of a manifest is, by the address of the dataset."""
    location = parse_location(folder)
    if isinstance(location, S3Path) and file.startswith(_BESIDE):  # In a bucket .. is a name like any other.
        return location.parent / file.removeprefix(_BESIDE)
    return location / file


def fold_folder(number: int) -> str:
    """Name of the folder of a fold."""
    return f"fold{number}"


def fold_numbers(folder: Path | S3Path | str) -> list[int]:
    """The folds in a folder, ascending; [] where it has none. Raises StorageError where a bucket cannot be read."""
    location = parse_location(folder)
    if isinstance(location, S3Path):
        names = location.folders()
    else:
        names = [path.name for path in location.glob("fold*")]
    numbers = (int(found[1]) for name in names if (found := re.fullmatch(r"fold(0|[1-9]\d{0,3})", name)))
    return sorted(number for number in numbers if (location / fold_folder(number) / MANIFEST).exists())


def _no_dataset(folder: Path | S3Path) -> str:
    if isinstance(folder, S3Path):
        inside = [name for name in folder.folders() if (folder / name / MANIFEST).exists()]
        hint = f"; it holds the datasets {', '.join(inside)}, give one of them" if inside else ""
        return f"{folder}: no prepared dataset (it has no {MANIFEST}){hint}; prepare one: {_PREPARE}"
    if not folder.exists():
        return f"{folder}: no such folder; prepare a dataset first: {_PREPARE}"
    if not folder.is_dir():
        return f"{folder}: a file, expected the folder of a prepared dataset; prepare one: {_PREPARE}"
    inside = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}") if not path.parent.name.startswith("."))
    if inside:
        return f"{folder}: holds the datasets {', '.join(inside)}; give one of them, e.g. {folder / inside[0]}"
    return f"{folder}: no prepared dataset (it has no {MANIFEST}); prepare one: {_PREPARE}"


def label_map_file(split: str, case: str) -> str:
    """Path of a case's label map below the dataset folder; ``split`` may be CASES, below the folder of the folds."""
    return f"{LABEL_MAPS}/{split}/{case}.nii.gz"


def case_file(split: str, case: str) -> str:
    """Path of a case's Parquet file below the dataset folder; ``split`` may be CASES, below the folder of the folds."""
    return f"{split}/{case}.parquet"
