"""Splits as datasets of Ray Data: kept in the object store if they fit, otherwise streamed from the files.

Both give the same batches. The blocks of a kept split are read once, in parallel, and all workers of a node share one
copy in memory. Of a streamed one each worker reads the rows of its own batches, in their order, a bounded number of
bytes ahead, on its own node. The reading tasks request no CPU: training workers may hold them all, and a task that
waited for one would wait for ever.

Ray Train passes the datasets to :class:`StepOrderConfig`, and workers get from it what gives any rows: Ray's own split
would give a worker other rows for another number of workers, and cannot start in the middle of an epoch.

Nothing here needs torch, so that the processes of Ray which hand the datasets on start quickly.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
from ray.data import Dataset, Datasource, ExecutionResources, ReadTask
from ray.data.block import BlockMetadata
from ray.data.dataset import MaterializedDataset
from ray.data.exceptions import SystemException
from ray.exceptions import RayError, RayTaskError
from ray.train import DataConfig

from mpscl_ray.data.parquet_reader import Arrays, SplitFiles, table_column
from mpscl_ray.data.sampler import Rows
from mpscl_ray.data.slices import InMemorySlices, LocalSlices, Slices
from mpscl_ray.errors import ClusterError, MpsclError
from mpscl_ray.runs.storage import S3Path

KEPT_FRACTION = 0.3
"""Largest part of a node's object store that one split may fill with ``auto``; this leaves room for two domains."""

SPAN_BYTES = 8 * 2**20
"""Decoded bytes that one reading task of a stream returns, within the limit of batches."""

SPAN_BATCHES = 32
"""Largest number of batches that one reading task of a stream returns."""

AHEAD_BYTES = 4 * SPAN_BYTES
"""Decoded bytes that a stream may read ahead into the object store."""

SPANS_PER_EXECUTION = 256
"""Reading tasks of one execution of Ray Data; the next execution continues from there."""

STREAM_TASKS = 2
"""Concurrent reading tasks of one stream."""


def open_slices(
    folder: Path | S3Path | str,
    split: str,
    *,
    labels: bool,
    in_memory: bool | Literal["auto"] = "auto",
    capacity: int | None = None,
    pairs: int = 1,
    one_worker: bool = False,
) -> Slices:
    """Open a split of a prepared dataset for the workers of a run.

    Ray must be initialised. The result can be sent to other processes. It is valid while the process that opened it
    lives.

    Args:
        folder: the dataset folder, on storage that all nodes see, or in a bucket; nodes then cache its files.
        split: name of the split.
        labels: whether to read the labels. Without, their bytes are never touched.
        in_memory: True keeps the decoded slices in the object store, False streams them from the files, "auto" keeps
            them if they take at most 30 % of the object store of the smallest node.
        capacity: size of that object store in bytes; None asks Ray.
        pairs: number of pairs of datasets that are open at the same time: with "auto" each may fill its part.
        one_worker: whether a single worker reads them. This process then reads those to be kept, instead of processes
            that Ray Data starts.

    Raises:
        DataError: no such dataset or split, labels missing, or a file missing or damaged, which it names.
        ClusterError: slices to be kept do not fit, or Ray fails.
    """
    files = SplitFiles.find(folder, split, labels=labels)
    need, capacity = files.rows * files.slice_bytes, object_store_bytes() if capacity is None else capacity
    if in_memory == "auto":
        in_memory = need <= KEPT_FRACTION * capacity / pairs
    elif in_memory and need > 0.9 * capacity:
        raise ClusterError(
            f"{folder}: the slices of the split {split!r} take {need / 2**20:.0f} MiB in memory, and the object store "
            f"of the smallest node has {capacity / 2**20:.0f} MiB; stream them (in_memory false or auto), or give Ray "
            "a larger object store"
        )
    if not in_memory:
        return StreamedSlices(files)
    if one_worker:
        return LocalSlices(folder, split, labels=labels)
    with _plain_errors(files):
        return ObjectStoreSlices(files, _cases(files).materialize())


def object_store_bytes() -> int:
    """Size of the smallest object store among the nodes that can run workers."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    able = [node for node in resources if node.get("CPU") or node.get("GPU")] or resources
    return int(min(node.get("object_store_memory", 0) for node in able))


class StepOrderConfig(DataConfig):
    """Hands each worker of a trainer its datasets as :class:`~mpscl_ray.data.slices.Slices`.

    From these a worker takes its part of each step by :class:`~mpscl_ray.data.sampler.StepOrder`.

    Args:
        files: the files of each dataset, by the name that the trainer has it under.
    """

    def __init__(self, files: Mapping[str, SplitFiles]) -> None:
        super().__init__()
        self._files = dict(files)

    def configure(  # type: ignore[override]  # a shard may be any object
        self, datasets: dict[str, Dataset], world_size: int, *_: object, **__: object
    ) -> list[dict[str, DatasetSlices]]:
        """The slices of each dataset, for each worker; called by Ray Train whenever workers start."""

        def slices_of(name: str, dataset: Dataset) -> DatasetSlices:
            files = self._files[name]
            return (
                ObjectStoreSlices(files, dataset) if isinstance(dataset, MaterializedDataset) else StreamedSlices(files)
            )

        return [{name: slices_of(name, dataset) for name, dataset in datasets.items()}] * world_size


class DatasetSlices(Slices):
    """Slices of a dataset of Ray Data."""

    @property
    @abstractmethod
    def dataset(self) -> Dataset:
        """The dataset; its blocks are the cases, in the order of the rows."""


class ObjectStoreSlices(InMemorySlices, DatasetSlices):
    """Slices in Ray's object store; all workers of a node share one copy."""

    def __init__(self, files: SplitFiles, dataset: MaterializedDataset[Any]) -> None:
        super().__init__(files)
        self._dataset = dataset
        self._parts: list[tuple[int, Arrays]] | None = None

    @property
    def dataset(self) -> MaterializedDataset[Any]:
        """The dataset, which holds the slices."""
        return self._dataset

    def parts(self) -> Sequence[tuple[int, Arrays]]:
        """Views of the blocks in shared memory; the first call brings them to this node."""
        if self._parts is None:
            with _plain_errors(self.files):
                tables = ray.get(self.dataset.to_arrow_refs())
            starts = [own.start for own in self.files.case_rows()]
            self._parts = [(start, _views(table, self.files)) for start, table in zip(starts, tables, strict=True)]
        return self._parts

    def __getstate__(self) -> dict[str, Any]:
        """Only the references are pickled, never the slices themselves."""
        return {**self.__dict__, "_parts": None}


class StreamedSlices(DatasetSlices):
    """Slices read from the files when they are needed, by Ray Data executions in the order of the batches.

    Args:
        files: the files of the split.
        span_bytes: decoded bytes that one reading task returns.
        spans_per_execution: reading tasks of one execution of Ray Data.
    """

    def __init__(
        self, files: SplitFiles, *, span_bytes: int = SPAN_BYTES, spans_per_execution: int = SPANS_PER_EXECUTION
    ) -> None:
        super().__init__(files)
        self._span_bytes, self._spans_per_execution = span_bytes, spans_per_execution

    @property
    def dataset(self) -> Dataset:
        """The dataset, not read yet."""
        return _cases(self.files)

    def fetch(self, batches: Iterable[Rows]) -> Generator[Arrays, None, None]:
        """Read the batches through Ray Data in the order given, a bounded number of bytes ahead."""
        spans = self._spans(iter(batches))
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        while ahead := list(islice(spans, self._spans_per_execution)):
            source = SplitDatasource(self.files, [np.concatenate(span) for span in ahead])
            dataset = source.dataset(tasks=STREAM_TASKS, ahead_bytes=AHEAD_BYTES, label_selector=here)
            blocks: Any = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
            with _plain_errors(self.files), closing(blocks) as tables:
                for span, table in zip(ahead, tables, strict=True):
                    assert np.array_equal(table.column("row"), np.concatenate(span)), "slices out of order"
                    views, start = _views(table, self.files), 0
                    for rows in span:
                        yield {name: view[start : start + len(rows)].copy() for name, view in views.items()}
                        start += len(rows)

    def _spans(self, batches: Iterator[Rows]) -> Iterator[list[Rows]]:
        """Consecutive batches that one task reads together."""
        span: list[Rows] = []
        for rows in batches:
            span.append(rows)
            if len(span) == SPAN_BATCHES or sum(map(len, span)) * self.files.slice_bytes >= self._span_bytes:
                yield span
                span = []
        if span:
            yield span


def _cases(files: SplitFiles) -> Dataset:
    """A split with its cases as blocks."""
    cpus: float = ray.cluster_resources().get("CPU", 0)  # type: ignore[no-untyped-call]
    cases = [np.asarray(own) for own in files.case_rows()]
    return SplitDatasource(files, cases).dataset(tasks=max(STREAM_TASKS, int(cpus)))


class SplitDatasource(Datasource):
    """A split as a source of Ray Data: one block for each piece, in this order, with the rows of the piece.

    The columns are ``row``, ``image`` and, if the split is read with labels, ``label``.

    Args:
        files: the files of the split.
        pieces: rows of each block.
    """

    def __init__(self, files: SplitFiles, pieces: list[Rows]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._files, self._pieces = files, pieces

    def dataset(
        self, *, tasks: int, ahead_bytes: int | None = None, label_selector: dict[str, str] | None = None
    ) -> Dataset:
        """Dataset of the blocks, not read yet.

        Args:
            tasks: largest number of concurrent reading tasks.
            ahead_bytes: largest size of the blocks that wait in the object store; None keeps all.
            label_selector: labels of the nodes that read; None for any.
        """
        dataset: Dataset = ray.data.read_datasource(
            self,
            num_cpus=0,
            concurrency=min(tasks, len(self._pieces)),
            override_num_blocks=len(self._pieces),
            label_selector=label_selector,
        )
        dataset.set_name(f"{str(self._files.folder).rpartition('/')[2]}_{self._files.split}")
        context = dataset.context
        context.execution_options.preserve_order = True
        if ahead_bytes is not None:
            context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=ahead_bytes)
        context.target_max_block_size = None  # Never split a block: it is the piece that was asked for.
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        # Its log is of no use during training: starts and ends of executions, a warning about busy CPUs that is wrong
        # here, and errors that are raised too.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        return dataset

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None
    ) -> list[ReadTask]:
        """One task for each piece."""
        files = ray.put(self._files)  # once, not with each task

        def task(rows: Rows) -> ReadTask:
            size = len(rows) * self._files.slice_bytes
            return ReadTask(lambda: [_read(ray.get(files), rows)], BlockMetadata(len(rows), size, None, None))

        return [task(rows) for rows in self._pieces]

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all decoded slices."""
        return sum(map(len, self._pieces)) * self._files.slice_bytes


def _read(files: SplitFiles, rows: Rows) -> pa.Table:
    tensors = {name: pa.FixedShapeTensorArray.from_numpy_ndarray(array) for name, array in files.read(rows).items()}
    return pa.table({"row": rows, **tensors})


def _views(table: pa.Table, files: SplitFiles) -> Arrays:
    """Arrays that share the memory of a table's columns."""
    return {name: table_column(table, name) for name in files.columns}


@contextmanager
def _plain_errors(files: SplitFiles) -> Iterator[None]:
    """Raise the error of a reading task unchanged, and a failure of Ray as a cluster error."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, MpsclError):
            # Ray adds lines on its retries.
            raise type(error.cause)(str(error.cause).splitlines()[0]) from None
        raise ClusterError(f"{files.folder}: the split {files.split!r} could not be read: {error.cause!r}") from error
    except (RayError, SystemException) as error:
        raise ClusterError(f"{files.folder}: Ray could not read the split {files.split!r}: {error}") from error
