"""Reading slices from a dataset's files, and the stream of batches, without Ray."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.data.augment import AugmentConfig
from mpscl_ray.data.loader import SliceStream
from mpscl_ray.data.parquet_reader import SplitFiles
from mpscl_ray.data.sampler import Foreground
from mpscl_ray.data.slices import LocalSlices, Slices
from mpscl_ray.data.subset import SubsetSlices
from mpscl_ray.errors import DataError
from tests.numbered_slices import DEPTHS, SIZE, write_dataset
from tests.written_dataset import save_plain_manifest, write_plain_case


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return write_dataset(tmp_path_factory.getbasetemp() / "dataset")


@pytest.fixture(scope="module")
def folder(images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "dataset"


@pytest.fixture(scope="module")
def local(folder: Path) -> LocalSlices:
    return LocalSlices(folder, "train", labels=True)


def row_numbers(batch: dict[str, torch.Tensor]) -> list[int]:
    return [int(number) for number in batch["image"][:, 0, 0, 0]]


# ------------------------------------------------------------------------------------------------------ reading


def test_rows_are_read_in_any_order_with_repeats(folder: Path, images: np.ndarray) -> None:
    files = SplitFiles.find(folder, "train", labels=True)
    assert files.rows == sum(DEPTHS)
    rows = np.array([169, 0, 142, 70, 70, 3, 66, 143, 168])
    arrays = files.read(rows)
    np.testing.assert_array_equal(arrays["image"], images[rows])
    whole = files.read(np.arange(files.rows))
    np.testing.assert_array_equal(whole["image"], images)
    np.testing.assert_array_equal(arrays["label"], whole["label"][rows])


def test_rows_with_a_structure_are_those_with_more_than_twenty_pixels_of_it(tmp_path: Path) -> None:
    """Over all cases; pixels that nobody annotated are no structure."""
    cases = []
    for name, pixels in (("a", (0, 20, 21)), ("b", (240,)), ("c", (3, 40))):
        label = np.zeros((len(pixels), SIZE[0] * SIZE[1]), np.uint8)
        for own, count in zip(label, pixels, strict=True):
            own[:count] = 1 + np.arange(count) % 2
            own[100:200][own[100:200] == 0] = NOT_ANNOTATED
        image, classes = np.zeros((len(pixels), *SIZE), np.float32), ("background", "MYO", "LAC")
        cases.append(write_plain_case(tmp_path, name, "train", image, label.reshape(-1, *SIZE), classes))
    save_plain_manifest(tmp_path, "mr", classes, SIZE, cases)
    in_memory = LocalSlices(tmp_path, "train", labels=True)
    for slices in (Slow(in_memory.files), in_memory):
        assert slices.foreground_rows.tolist() == [2, 3, 5]
    with pytest.raises(AssertionError, match="opened without labels"):
        SplitFiles.find(tmp_path, "train", labels=False).foreground_rows()
    chosen = np.array([1, 2, 5])
    assert SubsetSlices(in_memory, chosen).foreground_rows.tolist() == [1, 2]
    assert SubsetSlices(in_memory, chosen, np.ones((3, *SIZE), np.uint8)).foreground_rows.tolist() == [0, 1, 2]


def test_reading_without_labels_never_touches_their_bytes(tmp_path: Path) -> None:
    images = write_dataset(tmp_path)
    for path in tmp_path.glob("train/*.parquet"):
        data = bytearray(path.read_bytes())
        metadata = pq.read_metadata(path)
        for group in range(metadata.num_row_groups):
            columns = [metadata.row_group(group).column(i) for i in range(metadata.num_columns)]
            (label,) = [column for column in columns if column.path_in_schema.startswith("label")]
            start = label.data_page_offset
            data[start : start + label.total_compressed_size] = b"\xff" * label.total_compressed_size
        path.write_bytes(data)
    slices = LocalSlices(tmp_path, "train", labels=False)
    (arrays,) = slices.fetch([np.arange(len(images))])
    assert set(arrays) == {"image"}
    np.testing.assert_array_equal(arrays["image"], images)
    with pytest.raises(DataError, match=r"case-0\.parquet: damaged"):
        LocalSlices(tmp_path, "train", labels=True)


def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    write_dataset(tmp_path, (5,))
    path = tmp_path / "train" / "case-0.parquet"
    intact, files = path.read_bytes(), SplitFiles.find(tmp_path, "train", labels=True)
    expected = files.read(np.arange(5))
    rng = np.random.default_rng(1)
    refused = unchanged = 0
    for _ in range(400):
        damaged = bytearray(intact)
        damaged[rng.integers(len(intact))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            arrays = files.read(np.arange(5))
        except DataError as error:
            refused += str(path) in str(error)
        else:
            unchanged += all(np.array_equal(arrays[name], array) for name, array in expected.items())
    assert refused + unchanged == 400
    assert refused > 300


def test_files_that_are_not_what_the_manifest_says_are_named(tmp_path: Path) -> None:
    write_dataset(tmp_path, (4, 6))
    files = SplitFiles.find(tmp_path, "train", labels=True)
    path = tmp_path / "train" / "case-1.parquet"
    intact, table = path.read_bytes(), pq.read_table(path)

    def refusal(content: bytes | pa.Table | None) -> str:
        if content is None:
            path.unlink()
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            pq.write_table(content, path, compression="lz4", write_page_checksum=True)
            object.__setattr__(files.cases[1], "bytes", path.stat().st_size)
        with pytest.raises(DataError) as caught:
            files.read(np.arange(files.rows))
        assert str(path) in str(caught.value)
        return str(caught.value)

    assert "cut short" in refusal(intact[:-100])
    assert "missing" in refusal(None)
    assert "5 slices, the manifest says 6" in refusal(table.slice(0, 5))
    assert "no column 'label'" in refusal(table.drop_columns(["label"]))
    wrong = pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((6, 12, 19), np.float32))
    assert "column 'image' is" in refusal(table.set_column(2, "image", wrong))
    assert "not in order" in refusal(table.take(pa.array([0, 2, 1, 3, 4, 5])))
    assert "format version None" in refusal(table.replace_schema_metadata(None))


def test_labels_that_are_not_there_and_empty_splits_are_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, (2, 2), labelled=False)
    with pytest.raises(DataError, match=r"2 of its 2 cases have none .*case-0"):
        LocalSlices(tmp_path, "train", labels=True)
    with pytest.raises(DataError, match="'val' has no cases"):
        LocalSlices(tmp_path, "val", labels=False)
    assert LocalSlices(tmp_path, "train", labels=False).files.rows == 4


def test_shards_partition_the_slices_whatever_the_number_of_workers(local: LocalSlices, images: np.ndarray) -> None:
    for world_size in (1, 2, 3, 7):
        shards = [list(local.shard(rank, world_size, batch_size=8)) for rank in range(world_size)]
        assert [row for shard in shards for batch in shard for row in row_numbers(batch)] == list(range(len(images)))
        assert all(len(batch["image"]) == 8 for shard in shards for batch in shard[:-1])
    batch = shards[0][0]
    assert (batch["image"].dtype, batch["label"].dtype) == (torch.float32, torch.int64)
    assert batch["image"].shape == (8, 1, *SIZE)
    assert batch["label"].shape == (8, *SIZE)


def test_volumes_are_whole_cases(local: LocalSlices, images: np.ndarray) -> None:
    seen = {case.id: arrays["image"] for rank in (0, 1, 2) for case, arrays in local.volumes(rank, 3)}
    assert [len(seen[f"case-{number}"]) for number in range(4)] == list(DEPTHS)
    np.testing.assert_array_equal(np.concatenate([seen[f"case-{number}"] for number in range(4)]), images)


# ------------------------------------------------------------------------------------------------------- stream


def batches(slices: Slices, steps: int, **options) -> list[dict[str, torch.Tensor]]:
    with SliceStream(slices, **{"seed": 1, "domain": "source", "global_batch": 8, **options}) as stream:
        return [stream.next() for _ in range(steps)]


def assert_equal_batches(ones: list[dict[str, torch.Tensor]], others: list[dict[str, torch.Tensor]]) -> None:
    for one, other in zip(ones, others, strict=True):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name])


def test_batches_follow_the_order(local: LocalSlices, images: np.ndarray) -> None:
    with SliceStream(local, seed=1, domain="source", global_batch=8) as stream:
        for step in range(30):
            batch = stream.next()
            rows = stream.order.batch_rows(step)
            np.testing.assert_array_equal(batch["image"][:, 0], images[rows])
    assert (batch["image"].shape, batch["image"].dtype) == ((8, 1, *SIZE), torch.float32)
    assert (batch["label"].shape, batch["label"].dtype) == ((8, *SIZE), torch.int64)


def test_augmented_batches_do_not_depend_on_the_number_of_workers(local: LocalSlices) -> None:
    options = {"augment": AugmentConfig(rotation_deg=20, scale=(0.8, 1.2), random_conv_probability=0.5)}
    whole = batches(local, 25, **options)
    for world_size in (2, 4):
        ranks = [batches(local, 25, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
        joined = [
            {name: torch.cat([part[name] for part in parts]) for name in parts[0]} for parts in zip(*ranks, strict=True)
        ]
        assert_equal_batches(joined, whole)


def test_a_resumed_stream_continues_at_its_step(local: LocalSlices) -> None:
    options = {"augment": AugmentConfig(rotation_deg=20, random_conv_probability=0.5)}
    assert_equal_batches(batches(local, 26, **options)[20:], batches(local, 6, start_step=20, **options))


@pytest.mark.parametrize("share", [None, 0.9])
def test_an_epoch_of_two_one_and_two_workers_has_each_slice_as_often(local: LocalSlices, share: float | None) -> None:
    """Three epochs of 170 slices; the number of workers changes within the first and the second one."""
    foreground = None if share is None else Foreground(share, np.arange(20, 120), sum(DEPTHS))
    taken: list[int] = []
    for workers, start, steps in ((2, 0, 13), (1, 13, 18), (2, 31, 33)):
        options = {"world_size": workers, "start_step": start, "foreground": foreground}
        ranks = [batches(local, steps, rank=rank, **options) for rank in range(workers)]
        taken += [row for parts in zip(*ranks, strict=True) for part in parts for row in row_numbers(part)]
    undisturbed = [row for batch in batches(local, 64, foreground=foreground) for row in row_numbers(batch)]
    for epoch in (slice(0, 170), slice(170, 340), slice(340, 510)):
        assert Counter(taken[epoch]) == Counter(undisturbed[epoch])
        assert share is not None or sorted(taken[epoch]) == list(range(170))


class Slow(Slices):
    """Counts the batches that are read, and fails or waits at a given one."""

    def __init__(self, files: SplitFiles, fail_at: int = 10**9) -> None:
        super().__init__(files)
        self.fetched = 0
        self.fail_at = fail_at
        self.closed = threading.Event()

    def fetch(self, batches: Iterator[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        try:
            for rows in batches:
                if self.fetched == self.fail_at:
                    raise DataError("train/case-7.parquet: damaged")
                time.sleep(0.02)
                self.fetched += 1
                yield self.files.empty(len(rows))
        finally:
            self.closed.set()


def test_at_most_two_batches_are_prepared_ahead(folder: Path) -> None:
    slow = Slow(SplitFiles.find(folder, "train", labels=True))
    with SliceStream(slow, seed=0, domain="source", global_batch=4) as stream:
        for taken in (0, 3):
            for _ in range(taken):
                stream.next()
            while slow.fetched < taken + 2:
                time.sleep(0.01)
            time.sleep(0.2)
            assert slow.fetched == taken + 2


def test_waiting_for_data_is_accounted(folder: Path) -> None:
    with SliceStream(
        Slow(SplitFiles.find(folder, "train", labels=True)), seed=0, domain="source", global_batch=4
    ) as slow:
        for _ in range(10):
            slow.next()
        assert slow.wait_seconds >= 0.1


def test_an_error_in_the_background_surfaces_at_its_step_and_again(folder: Path) -> None:
    slow = Slow(SplitFiles.find(folder, "train", labels=True), fail_at=3)
    with SliceStream(slow, seed=0, domain="source", global_batch=4) as stream:
        for _ in range(3):
            stream.next()
        for _ in range(2):
            with pytest.raises(DataError, match=r"case-7\.parquet"):
                stream.next()


def test_close_ends_the_thread_and_the_reading(folder: Path) -> None:
    before = threading.active_count()
    slow = Slow(SplitFiles.find(folder, "train", labels=True))
    stream = SliceStream(slow, seed=0, domain="source", global_batch=4)
    stream.next()
    stream.close()
    stream.close()
    assert slow.closed.is_set()
    assert threading.active_count() == before
