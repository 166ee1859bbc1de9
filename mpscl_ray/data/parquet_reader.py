"""Reading chosen slices of a dataset from its Parquet files, every page's checksum verified.

Only the row groups and columns that are asked for are read: an unlabelled stream never touches the bytes of the labels.
Nothing here needs torch, so that a process that only reads starts quickly.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mpscl_ray.data.dataset import FORMAT_VERSION, Case, load_manifest, local_case
from mpscl_ray.data.sampler import Rows
from mpscl_ray.errors import DataError
from mpscl_ray.runs.storage import S3Path, parse_location

Arrays = dict[str, NDArray[Any]]
"""``image`` (B, H, W) float32 and, where labels were asked for, ``label`` (B, H, W) uint8."""

_AGAIN = "prepare the dataset again"


@dataclass(frozen=True)
class SplitFiles:
    """The files of one split; its slices are rows 0..N-1: the cases in the manifest's order, slice by slice.

    Attributes:
        folder: the dataset folder, here or in a bucket.
        split: name of the split.
        cases: its cases, at least one.
        size: height and width of a slice in pixels.
        classes: names of the label values.
        labels: whether the labels are read.
    """

    folder: Path | S3Path
    split: str
    cases: tuple[Case, ...]
    size: tuple[int, int]
    classes: tuple[str, ...]
    labels: bool

    @classmethod
    def find(cls, folder: Path | S3Path | str, split: str, *, labels: bool) -> SplitFiles:
        """Look up the files of a split in the manifest.

        Raises:
            DataError: no such dataset or split, an empty split, or labels wanted where a case has none.
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
        place = parse_location(folder)
        if isinstance(place, Path):
            place = place.absolute()
        return cls(place, split, cases, manifest.size, manifest.classes, labels)

    @property
    def rows(self) -> int:
        """Number of slices."""
        return sum(case.slices for case in self.cases)

    @property
    def columns(self) -> dict[str, type[np.generic]]:
        """Names and voxel types of the arrays that are read."""
        return {"image": np.float32, "label": np.uint8} if self.labels else {"image": np.float32}

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
            places = np.flatnonzero((own.start <= rows) & (rows < own.stop))
            if len(places):
                _read_case_slices(self, case, rows[places] - own.start, arrays, places)
        return arrays


def read_block(piece: pa.Table, files: SplitFiles) -> pa.Table:
    """Read the rows in the one list that column ``rows`` holds, into the columns ``row``, ``image`` and ``label``."""
    rows = piece.column("rows").combine_chunks().flatten().to_numpy()
    tensors = {name: pa.FixedShapeTensorArray.from_numpy_ndarray(array) for name, array in files.read(rows).items()}
    return pa.table({"row": rows, **tensors})


def table_column(table: pa.Table, name: str) -> NDArray[Any]:
    """(B, H, W) values of a tensor column: a view where the column is one piece."""
    pieces = [chunk.to_numpy_ndarray() for chunk in table.column(name).chunks]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _read_case_slices(files: SplitFiles, case: Case, wanted: Rows, arrays: Arrays, places: Rows) -> None:
    """Read slices of one case into their places in the arrays."""
    path = files.folder / case.file
    try:
        local = local_case(files.folder, case)
        found = local.stat().st_size
        if found != case.bytes:
            raise DataError(f"{path}: {found} bytes, the manifest says {case.bytes}: cut short or replaced; {_AGAIN}")
        with pq.ParquetFile(local, page_checksum_verification=True) as file:
            _check_columns(files, file, path, case)
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
                    array[places[members]] = table_column(table, name)[wanted[members] - start]
    except FileNotFoundError:
        raise DataError(f"{path}: missing, though the manifest lists it; {_AGAIN}") from None
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        raise DataError(f"{path}: damaged or unreadable ({error}); {_AGAIN}") from error


def _check_columns(files: SplitFiles, file: pq.ParquetFile, path: Path | S3Path, case: Case) -> None:
    schema = file.schema_arrow
    about = json.loads((schema.metadata or {}).get(b"mpscl_ray", b"{}"))
    if about.get("version") != FORMAT_VERSION:
        raise DataError(
            f"{path}: format version {about.get('version')!r}, this program reads {FORMAT_VERSION}; {_AGAIN}"
        )
    if file.metadata.num_rows != case.slices:
        raise DataError(f"{path}: {file.metadata.num_rows} slices, the manifest says {case.slices}; {_AGAIN}")
    types = {
        name: pa.fixed_shape_tensor(pa.from_numpy_dtype(dtype), files.size) for name, dtype in files.columns.items()
    }
    for name, expected in {"slice_index": pa.int32(), **types}.items():
        if name not in schema.names:
            raise DataError(f"{path}: has no column {name!r}; {_AGAIN}")
        if schema.field(name).type != expected:
            raise DataError(f"{path}: column {name!r} is {schema.field(name).type}, expected {expected}; {_AGAIN}")
