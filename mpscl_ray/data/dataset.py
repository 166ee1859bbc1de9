"""The prepared dataset: a folder with one manifest and one Parquet file for each case of one modality.

``FOLDER/manifest.json`` says what the files hold, how they were made and what each must hash to;
``FOLDER/<split>/<case>.parquet`` has one row for each slice: ``case`` (string), ``slice_index`` (int32), ``image``
(float32 tensor [H, W], scaled to [-1, 1]) and, where the case is labelled, ``label`` (uint8 tensor [H, W]).
Any Arrow reader understands the files; pages carry checksums, which are verified here when they are read.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from mpscl_ray.data import SPLITS
from mpscl_ray.data.compatibility import label_statistics
from mpscl_ray.errors import DataError
from mpscl_ray.runs.atomic_files import write_atomically
from mpscl_ray.runs.storage import S3Path, cached_file, parse_location

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
ROW_GROUP_SLICES = 64
"""Most slices in a row group; fewer where they are large, because a stream reads whole groups to get single slices."""
ROW_GROUP_BYTES = 2**16
"""Of images in a row group, one slice at the least: a slice of 256 x 256 has a group of its own."""
_METADATA_KEY = b"mpscl_ray"
Size = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""Of a voxel, in mm."""
_PREPARE = "python -m mpscl_ray.prepare INPUT --layout mmwhs --out DIR"


@dataclass(frozen=True)
class Scaling:
    """Intensity range that is mapped to [-1, 1]: ``2 (x - low) / (high - low) - 1``, x being z-scored."""

    __pydantic_config__ = ConfigDict(extra="forbid", ser_json_inf_nan="constants")
    low: float
    high: float
    origin: str
    """Where the range comes from: estimated (from which cases), given, or published."""


@dataclass(frozen=True)
class Case:
    """One prepared case: a volume, or a group of slices that belong together.

    ``id`` is unique within a split; ``patient`` is what splits are made by. Tuples by class have one entry for each
    class of the manifest, background first, and are None where the case is not labelled.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    id: Annotated[str, Field(pattern="^[^/]+$")]
    patient: str
    split: Annotated[str, Field(pattern="^(train|val|test)$")]
    file: str
    """Path of the Parquet file below the dataset folder."""
    slices: Annotated[int, Field(ge=1)]
    labelled: bool
    sha256: str
    """Of the Parquet file."""
    bytes: int
    content_sha256: str
    """Of the voxels as they were read, before any step: the same image under two names has the same."""
    geometry: dict[str, Any]
    """What puts a prediction back into the original image; empty where the input was slices already."""
    spacing_mm: tuple[Size, Size, Size] | None
    """Of the prepared voxels, (slice, row, column); None where the input does not tell."""
    class_voxels: tuple[int, ...] | None
    class_centres: tuple[tuple[float, float] | None, ...] | None
    """Mean (row, column) of each class as fractions of height and width; None for an absent class."""
    structure_width: float | None
    """Side in pixels of a square as large as all structures together in the slice that shows most of them."""
    cropped_around_labels: bool
    """The crop was placed by the labels of this very case, which for a test case is a mild leak."""
    sources: dict[str, str]
    """Names and SHA-256 of the input files."""
    notices: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """What a dataset folder holds and how it was made."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    version: int
    modality: str
    classes: tuple[str, ...]
    """Names in the order of the label values, background first; empty where no label table was given."""
    size: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    """Height and width of every slice."""
    scaling: Scaling
    recipe: dict[str, Any]
    """Steps from a volume to slices, enough (with the scaling) to prepare a new volume the same way."""
    splitting: dict[str, Any]
    labels: dict[str, Any]
    """Raw label ids: the class of each, and the ones that are background on purpose."""
    steps: tuple[str, ...]
    notices: tuple[str, ...]
    command: str
    """Makes this dataset again."""
    product_version: str
    cases: tuple[Case, ...]

    def split(self, name: str) -> tuple[Case, ...]:
        """Cases of one split, in the order of their ids."""
        if name not in SPLITS:
            raise DataError(f"no split is called {name!r}; there are {', '.join(SPLITS)}")
        return tuple(case for case in self.cases if case.split == name)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over classes, size, scaling and the hash of every case: equal where the data is equal."""
        parts = [
            self.modality,
            list(self.classes),
            list(self.size),
            [self.scaling.low, self.scaling.high],
            sorted([case.split, case.id, case.sha256] for case in self.cases),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


_MANIFEST_TYPE = TypeAdapter(Manifest)


# ----------------------------------------------------------------------------------------------------- manifest


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``, which makes the folder a dataset: the last step of preparing one."""
    content = json.loads(_MANIFEST_TYPE.dump_json(manifest))
    content["checksum"] = _checksum(content)
    text = json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True)
    write_atomically(folder / MANIFEST, text.encode())


def load_manifest(folder: Path | S3Path | str) -> Manifest:
    """Read and check ``manifest.json`` of a dataset folder, given by its path or URL.

    Raises:
        StorageError: a bucket that cannot be read.
        DataError: where there is no dataset, or one that is damaged or of another format version. The sentence ends
            with the command that prepares it (again).
    """
    folder = parse_location(folder)
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(_no_dataset(folder)) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        content = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: damaged, not JSON any more ({error}); prepare it again: {_PREPARE}") from None
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
        if case.file != case_file(case.split, case.id):
            raise DataError(f"{path}: case {case.id!r} names the file {case.file!r} outside its place; {again}")
    return manifest


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


def case_file(split: str, case: str) -> str:
    """Path of a case's Parquet file below the dataset folder."""
    return f"{split}/{case}.parquet"


# -------------------------------------------------------------------------------------------------------- cases


def write_case(
    folder: Path,
    *,
    id: str,
    patient: str,
    split: str,
    image: NDArray[np.float32],
    label: NDArray[np.uint8] | None,
    classes: Sequence[str],
    content_sha256: str,
    geometry: dict[str, Any],
    spacing_mm: tuple[float, float, float] | None,
    cropped_around_labels: bool,
    sources: dict[str, str],
    notices: tuple[str, ...] = (),
) -> Case:
    """Write the Parquet file of one case, synced to disk, and return its entry for the manifest.

    Args:
        image: (D, H, W), scaled to [-1, 1].
        label: (D, H, W) with values below ``len(classes)``, or None.
    """
    assert image.ndim == 3, image.shape
    assert image.dtype == np.float32, image.dtype
    assert label is None or label.shape == image.shape, label.shape
    assert label is None or label.dtype == np.uint8, label.dtype
    assert label is None or int(label.max(initial=0)) < max(len(classes), 1), f"label value without a class in {id}"
    depth = len(image)
    columns: dict[str, pa.Array] = {
        "case": pa.array([id] * depth, pa.string()),
        "slice_index": pa.array(range(depth), pa.int32()),
        "image": pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(image)),
    }
    if label is not None:
        columns["label"] = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(label))
    table = pa.table(columns)
    about = json.dumps({"version": FORMAT_VERSION, "case": id, "split": split})
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), _METADATA_KEY: about.encode()})
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        compression="lz4",
        use_dictionary=False,
        row_group_size=max(1, min(ROW_GROUP_SLICES, ROW_GROUP_BYTES // image[0].nbytes)),
        write_statistics=False,
        write_page_checksum=True,
    )
    path = folder / case_file(split, id)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_synced(path, buffer.getbuffer())
    return Case(
        id=id,
        patient=patient,
        split=split,
        file=case_file(split, id),
        slices=depth,
        labelled=label is not None,
        sha256=hashlib.sha256(buffer.getbuffer()).hexdigest(),
        bytes=buffer.getbuffer().nbytes,
        content_sha256=content_sha256,
        geometry=geometry,
        spacing_mm=spacing_mm,
        **label_statistics(label, len(classes)),
        cropped_around_labels=cropped_around_labels,
        sources=sources,
        notices=notices,
    )


def local_case(folder: Path | S3Path | str, case: Case) -> Path:
    """The Parquet file of a case on this node; from a bucket it is fetched once and checked against its SHA-256.

    Raises:
        FileNotFoundError: it is missing.
        DataError: it is damaged or not the one that was prepared.
        StorageError: the bucket cannot be read.
    """
    path = parse_location(folder) / case.file
    return cached_file(path, case.sha256, case.bytes) if isinstance(path, S3Path) else path


def read_case(
    folder: Path | S3Path | str, case: Case, columns: Iterable[str] = ("image", "label")
) -> dict[str, NDArray[Any]]:
    """Arrays (D, H, W) of one case; a column that the case does not have is left out.

    The file's SHA-256, its page checksums, types and shapes are all checked before anything is returned.

    Raises:
        DataError: naming the file, where it is missing, damaged or not the one that was prepared.
    """
    path = parse_location(folder) / case.file
    data = _read_verified(folder, case)
    try:
        # Not pq.read_table: a single file needs no dataset scanner, and one thread a reader is what workers want.
        table = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}); prepare the dataset again") from error
    return table_arrays(table, path, case, columns)


def table_arrays(table: pa.Table, path: Path | S3Path, case: Case, columns: Iterable[str]) -> dict[str, NDArray[Any]]:
    """Arrays (D, H, W) of the table of one case, after checking that it is what the manifest says.

    Raises:
        DataError: naming the file and what differs.
    """
    about = json.loads((table.schema.metadata or {}).get(_METADATA_KEY, b"{}"))
    if about.get("version") != FORMAT_VERSION:
        raise DataError(
            f"{path}: format version {about.get('version')!r}, this program reads {FORMAT_VERSION}; "
            "prepare the dataset again"
        )
    if table.num_rows != case.slices:
        raise DataError(f"{path}: {table.num_rows} slices, the manifest says {case.slices}; prepare the dataset again")
    arrays: dict[str, NDArray[Any]] = {}
    for name, dtype in (("image", np.float32), ("label", np.uint8)):
        if name not in table.column_names:
            if name == "image" or case.labelled:
                raise DataError(f"{path}: has no column {name!r}; prepare the dataset again")
            continue
        kind = table.schema.field(name).type
        if not isinstance(kind, pa.FixedShapeTensorType) or kind.value_type != pa.from_numpy_dtype(dtype):
            raise DataError(
                f"{path}: column {name!r} has the type {kind}, expected slices of {np.dtype(dtype)}; "
                "prepare the dataset again"
            )
        if name in columns:
            chunks = [chunk.to_numpy_ndarray() for chunk in table.column(name).chunks]
            arrays[name] = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) > 1:
        raise DataError(f"{path}: image and label have different shapes {sorted(shapes)}; prepare the dataset again")
    return arrays


def verify(folder: Path | S3Path | str, cases: Iterable[Case]) -> dict[str, str]:
    """SHA-256 of each case's file, compared with the manifest.

    Raises:
        DataError: naming every file that is missing or differs.
    """
    hashes: dict[str, str] = {}
    bad: list[str] = []
    for case in cases:
        try:
            _read_verified(folder, case)
            hashes[case.file] = case.sha256
        except DataError as error:
            bad.append(str(error))
    if bad:
        raise DataError("; ".join(bad))
    return hashes


def _read_verified(folder: Path | S3Path | str, case: Case) -> bytes:
    path = parse_location(folder) / case.file
    try:
        data = local_case(folder, case).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: missing, though the manifest lists it; prepare the dataset again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) != case.bytes:
        raise DataError(f"{path}: {len(data)} bytes, the manifest says {case.bytes}; prepare the dataset again")
    if hashlib.sha256(data).hexdigest() != case.sha256:
        raise DataError(f"{path}: damaged or replaced: its SHA-256 is not the manifest's; prepare the dataset again")
    return data


def _write_synced(path: Path, data: bytes | memoryview) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
