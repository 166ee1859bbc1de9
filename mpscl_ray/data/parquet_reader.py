"""Reading a dataset's Parquet files: one whole case, or chosen slices of a split. Every page's checksum is verified.

For chosen slices only the row groups and columns asked for are read: an unlabelled stream never touches the bytes of
the labels. Nothing here needs torch, so a process that only reads starts quickly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mpscl_ray.data.dataset import FORMAT_VERSION, Case, load_manifest, stored_file
from mpscl_ray.data.label_values import show_a_structure
from mpscl_ray.data.parquet_writer import METADATA_KEY
from mpscl_ray.data.sampler import Rows
from mpscl_ray.data.scaling import scale
from mpscl_ray.errors import DataError
from mpscl_ray.runs import safe_json
from mpscl_ray.runs.storage import S3Path, cached_file, parse_location

Arrays = dict[str, NDArray[Any]]
"""``image`` (B, H, W) float32 and, if labels were asked for, ``label`` (B, H, W) uint8, class indices or
``NOT_ANNOTATED``."""

_DTYPES: dict[str, type[np.generic]] = {"image": np.float32, "label": np.uint8}
_AGAIN = "prepare the dataset again"
_LZ4_LIMIT = 256
"""No LZ4 block holds more than this many bytes per compressed byte."""
_LARGEST_OVERHEAD = 1 << 24
"""Bytes of names, indices and page headers."""


@dataclass(frozen=True)
class SplitFiles:
    """The files of one split. Its slices are rows 0..N-1: the cases in the manifest's order, slice by slice."""

    folder: Path | S3Path
    """The dataset folder, local or in a bucket."""
    split: str
    cases: tuple[Case, ...]
    """At least one."""
    size: tuple[int, int]
    """Height and width of a slice in pixels."""
    classes: tuple[str, ...]
    """Names of the label values."""
    labels: bool
    """Whether labels are read."""

    @classmethod
    def find(cls, folder: Path | S3Path | str, split: str, *, labels: bool) -> SplitFiles:
        """Look up the files of a split in the manifest.

        Raises:
            DataError: no such dataset or split, an empty split, or labels asked for although a case has none.
        """
        manifest = load_manifest(folder)
        cases = manifest.split(split)
        if not cases:
            raise DataError(f"{folder}: the split {split!r} has no cases; prepare the dataset with some in it")
        unlabelled = [case.id for case in cases if not case.labelled]
        if labels and unlabelled:
            raise DataError(
                f"{folder}: the split {split!r} is to be read with labels, and {len(unlabelled)} of its {len(cases)} "
                f"cases have none ({', '.join(unlabelled[:5])}); prepare it with labels"
            )
        location = parse_location(folder)
        if isinstance(location, Path):
            location = location.absolute()
        return cls(location, split, cases, manifest.size, manifest.classes, labels)

    @property
    def rows(self) -> int:
        """Number of slices."""
        return sum(case.slices for case in self.cases)

    @property
    def columns(self) -> dict[str, type[np.generic]]:
        """Names and voxel types of the arrays that are read."""
        return _columns(self.labels)

    @property
    def slice_bytes(self) -> int:
        """Bytes of one decoded slice."""
        return sum(np.dtype(dtype).itemsize for dtype in self.columns.values()) * self.size[0] * self.size[1]

    def case_rows(self) -> list[range]:
        """Rows of each case."""
        stops = np.cumsum([case.slices for case in self.cases]).tolist()
        return [range(stop - case.slices, stop) for stop, case in zip(stops, self.cases, strict=True)]

    def empty(self, count: int) -> Arrays:
        """Arrays for a number of slices, their values not set."""
        return {name: np.empty((count, *self.size), dtype) for name, dtype in self.columns.items()}

    def read(self, rows: Rows) -> Arrays:
        """Read slices, in the order given; each row group that holds some of them is read once.

        Raises:
            DataError: naming the file that is missing, damaged or not what the manifest says.
        """
        arrays = self.empty(len(rows))
        for case, own in zip(self.cases, self.case_rows(), strict=True):
            positions = np.flatnonzero((own.start <= rows) & (rows < own.stop))
            if len(positions):
                _read_case_slices(self, case, rows[positions] - own.start, arrays, positions)
        return arrays

    def foreground_rows(self) -> Rows:
        """Rows that show a structure; reads the labels alone.

        Raises:
            DataError: as :meth:`read`.
        """
        assert self.labels, "the split was opened without labels"
        found = []
        for case, own in zip(self.cases, self.case_rows(), strict=True):
            label = np.empty((case.slices, *self.size), np.uint8)
            whole = np.arange(case.slices)
            _read_case_slices(self, case, whole, {"label": label}, whole)
            found.append(own.start + show_a_structure(label))
        return np.concatenate(found)


def table_column(table: pa.Table, name: str) -> NDArray[Any]:
    """(B, H, W) values of a tensor column: a view if the column is one piece."""
    pieces = [chunk.to_numpy_ndarray() for chunk in table.column(name).chunks]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def read_case(
    folder: Path | S3Path | str, case: Case, columns: Iterable[str] = ("image", "label")
) -> dict[str, NDArray[Any]]:
    """Arrays (D, H, W) of one case. A column that the case does not have is left out.

    The file's SHA-256, its page checksums, types and shapes are all checked before anything is returned.

    Raises:
        DataError: naming the file, if it is missing, damaged or not the one that was prepared.
    """
    path = stored_file(folder, case.file)
    data = _read_verified(folder, case)
    expected = _columns(case.labelled)
    with (
        _readable(path),
        # Not pq.read_table: a single file needs no dataset scanner, and a worker wants one thread per reader.
        pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file,
    ):
        _check(file, path, case, expected)
        table = file.read(columns=[name for name in expected if name in columns], use_threads=False)
    return {name: _column(table, name, case) for name in table.column_names}


def _column(table: pa.Table, name: str, case: Case) -> NDArray[Any]:
    """Values of a column; images of a fold are scaled here."""
    values = table_column(table, name)
    return values if name != "image" or case.scale_by is None else scale(values, *case.scale_by)


def _columns(labels: bool) -> dict[str, type[np.generic]]:
    return {name: dtype for name, dtype in _DTYPES.items() if labels or name != "label"}


def _read_case_slices(files: SplitFiles, case: Case, wanted: Rows, arrays: Arrays, positions: Rows) -> None:
    """Read slices of one case into their positions in the arrays."""
    path = stored_file(files.folder, case.file)
    with (
        _readable(path),
        pq.ParquetFile(_local_file(files.folder, case), page_checksum_verification=True) as file,
    ):
        _check(file, path, case, files.columns, files.size)
        lengths = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        stops = np.cumsum(lengths)
        groups = np.searchsorted(stops, wanted, side="right")
        for group in np.unique(groups):
            start = int(stops[group]) - lengths[group]
            table = file.read_row_group(int(group), columns=["slice_index", *arrays], use_threads=False)
            if table.column("slice_index").to_pylist() != list(range(start, start + lengths[group])):
                raise DataError(f"{path}: the slices from {start} on are not in order; {_AGAIN}")
            members = groups == group
            for name, array in arrays.items():
                array[positions[members]] = _column(table, name, case)[wanted[members] - start]


# ------------------------------------------------------------------------------------------------- verification


def _local_file(folder: Path | S3Path | str, case: Case) -> Path:
    """The Parquet file of a case on this node, its size checked.

    A file in a bucket is downloaded once and compared with its SHA-256.
    """
    path = stored_file(folder, case.file)
    local = cached_file(path, case.sha256, case.bytes) if isinstance(path, S3Path) else path
    found = local.stat().st_size
    if found != case.bytes:
        raise DataError(f"{path}: {found} bytes, the manifest says {case.bytes}: cut short or replaced; {_AGAIN}")
    return local


def _read_verified(folder: Path | S3Path | str, case: Case) -> bytes:
    """Content of a case's file, its SHA-256 compared with the manifest."""
    path = stored_file(folder, case.file)
    with _readable(path):
        data = _local_file(folder, case).read_bytes()
    if hashlib.sha256(data).hexdigest() != case.sha256:
        raise DataError(f"{path}: damaged or replaced: its SHA-256 is not the manifest's; {_AGAIN}")
    return data


@contextmanager
def _readable(path: Path | S3Path) -> Iterator[None]:
    """Turn what goes wrong while a file is read into an error that names it."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: missing, though the manifest lists it; {_AGAIN}") from None
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: damaged or unreadable ({reason}); {_AGAIN}") from error


def _check(
    file: pq.ParquetFile,
    path: Path | S3Path,
    case: Case,
    columns: Mapping[str, type[np.generic]],
    size: tuple[int, int] | None = None,
) -> None:
    """Check format version, number of slices, and the type of every column.

    Args:
        file: the opened file.
        path: its name in messages.
        case: its entry in the manifest.
        columns: names and voxel types that it must have.
        size: height and width of a slice; None for those of the first column.
    """
    schema = file.schema_arrow
    about = safe_json.loads((schema.metadata or {}).get(METADATA_KEY, b"{}"))
    version = about.get("version") if isinstance(about, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(f"{path}: format version {version!r}, this program reads {FORMAT_VERSION}; {_AGAIN}")
    if file.metadata.num_rows != case.slices:
        raise DataError(f"{path}: {file.metadata.num_rows} slices, the manifest says {case.slices}; {_AGAIN}")
    for name in ("slice_index", *columns):
        if name not in schema.names:
            raise DataError(f"{path}: has no column {name!r}; {_AGAIN}")
        found = schema.field(name).type
        if size is None and isinstance(found, pa.FixedShapeTensorType):
            size = tuple(found.shape)
        if name == "slice_index":
            expected: Any = pa.int32()
        elif size is None:
            expected = f"slices of {np.dtype(columns[name])}"
        else:
            expected = pa.fixed_shape_tensor(pa.from_numpy_dtype(columns[name]), size)
        if isinstance(expected, str) or found != expected:
            raise DataError(f"{path}: column {name!r} is {found}, expected {expected}; {_AGAIN}")
    assert size is not None
    _check_room(file.metadata, path, case, size)


def _check_room(about: pq.FileMetaData, path: Path | S3Path, case: Case, size: tuple[int, int]) -> None:
    """Refuse a file whose pages say that they unpack to much more than its slices are, before any is unpacked."""
    voxels = case.slices * size[0] * size[1] * sum(np.dtype(dtype).itemsize for dtype in _DTYPES.values())
    # Not of the columns one by one: to ask a damaged file for these ends the process, in C++.
    unpacked = sum(about.row_group(index).total_byte_size for index in range(about.num_row_groups))
    if voxels > case.bytes * _LZ4_LIMIT or not 0 <= unpacked <= 2 * voxels + _LARGEST_OVERHEAD:
        raise DataError(
            f"{path}: {case.bytes} bytes that unpack to {unpacked}, expected {voxels} for {case.slices} slices of "
            f"{size[0]} x {size[1]} pixels; {_AGAIN}"
        )
