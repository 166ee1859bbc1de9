"""Slices through Ray Data, on a real local Ray: kept in the object store, and streamed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from mpscl_ray.data import ray_source
from mpscl_ray.data.augment import AugmentConfig
from mpscl_ray.data.loader import SliceStream
from mpscl_ray.data.parquet_reader import SplitFiles
from mpscl_ray.data.slices import LocalSlices, Slices
from mpscl_ray.errors import ClusterError, DataError
from tests.numbered_slices import SIZE, write_dataset
from tests.ray.conftest import CPUS

STREAM = {"seed": 1, "domain": "source", "global_batch": 8}

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dataset")
    write_dataset(path)
    return path


def streamed(folder: Path) -> ray_source.StreamedSlices:
    """Slices whose streams take many tasks and several executions for a few batches."""
    files = SplitFiles.find(folder, "train", labels=True)
    return ray_source.StreamedSlices(files, span_bytes=3 * 8 * SIZE[0] * SIZE[1] * 5, spans_per_execution=4)


def batches(slices: Slices, steps: int, **options) -> list[dict[str, torch.Tensor]]:
    with SliceStream(slices, **{**STREAM, **options}) as stream:
        return [stream.next() for _ in range(steps)]


def assert_equal_batches(ones: list[dict[str, torch.Tensor]], others: list[dict[str, torch.Tensor]]) -> None:
    for one, other in zip(ones, others, strict=True):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name])


def flip_a_bit(folder: Path) -> Path:
    """Flip a bit in the middle of one file, where voxels are."""
    path = folder / "train" / "case-1.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 16
    path.write_bytes(data)
    return path


def test_kept_streamed_and_local_slices_give_the_same_batches(folder: Path) -> None:
    options = {"rank": 1, "world_size": 2, "augment": AugmentConfig(rotation_deg=10, random_conv_probability=0.5)}
    expected = batches(LocalSlices(folder, "train", labels=True), 30, **options)
    kept = ray_source.open_slices(folder, "train", labels=True, in_memory=True)
    assert isinstance(kept, ray_source.ObjectStoreSlices)
    for slices in (kept, streamed(folder)):
        assert_equal_batches(batches(slices, 30, **options), expected)


def test_a_stream_resumed_at_a_step_goes_on_as_if_it_had_not_stopped(folder: Path) -> None:
    expected = batches(LocalSlices(folder, "train", labels=True), 40)
    assert_equal_batches(batches(streamed(folder), 7, start_step=33), expected[33:])


@pytest.mark.parametrize("in_memory", [True, False])
def test_shards_and_volumes_come_in_order(folder: Path, in_memory: bool) -> None:
    slices = ray_source.open_slices(folder, "train", labels=True, in_memory=in_memory)
    local = LocalSlices(folder, "train", labels=True)
    for rank in (0, 1):
        assert_equal_batches(list(slices.shard(rank, 2, 16)), list(local.shard(rank, 2, 16)))
    found = list(slices.volumes())
    assert [case.id for case, _ in found] == [f"case-{number}" for number in range(4)]
    for (_, arrays), (_, expected) in zip(found, local.volumes(), strict=True):
        np.testing.assert_array_equal(arrays["image"], expected["image"])
        np.testing.assert_array_equal(arrays["label"], expected["label"])


@pytest.mark.parametrize("in_memory", [True, False])
def test_slices_opened_without_labels_have_none(folder: Path, in_memory: bool) -> None:
    slices = ray_source.open_slices(folder, "train", labels=False, in_memory=in_memory)
    (batch,) = batches(slices, 1)
    assert set(batch) == {"image"}


def test_a_damaged_file_is_named_when_it_is_kept(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    path = flip_a_bit(tmp_path)
    with pytest.raises(DataError) as caught:
        ray_source.open_slices(tmp_path, "train", labels=True, in_memory=True)
    assert str(caught.value).startswith(f"{path}: damaged")
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_named_when_it_is_streamed(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    slices = ray_source.open_slices(tmp_path, "train", labels=True, in_memory=False)
    path = flip_a_bit(tmp_path)
    with SliceStream(slices, **STREAM) as stream:
        for _ in range(2):
            with pytest.raises(DataError) as caught:
                stream.next()
            assert str(caught.value).startswith(f"{path}: damaged")
            assert "\n" not in str(caught.value)


def test_workers_that_hold_all_cpus_still_get_their_batches(folder: Path) -> None:
    """The handles are opened, travel to the workers and are read there while no CPU is free."""

    @ray.remote(num_cpus=CPUS / 2)
    class Worker:
        def sums(self, handles: list[Slices], rank: int) -> list[float]:
            found = []
            for slices in handles:
                with SliceStream(slices, seed=1, domain="source", global_batch=8, rank=rank, world_size=2) as stream:
                    found.append(sum(float(stream.next()["image"].double().sum()) for _ in range(15)))
            return found

    workers = [Worker.remote() for _ in range(2)]
    ray.get([worker.__ray_ready__.remote() for worker in workers], timeout=60)
    assert ray.available_resources().get("CPU", 0) == 0
    handles = [ray_source.open_slices(folder, "train", labels=True, in_memory=True), streamed(folder)]
    found = ray.get([worker.sums.remote(handles, rank) for rank, worker in enumerate(workers)], timeout=60)
    local = LocalSlices(folder, "train", labels=True)
    for rank in (0, 1):
        expected = sum(float(b["image"].double().sum()) for b in batches(local, 15, rank=rank, world_size=2))
        assert found[rank] == [pytest.approx(expected, rel=1e-12)] * 2
    for worker in workers:
        ray.kill(worker)


def test_what_does_not_fit_is_streamed_or_refused(folder: Path) -> None:
    assert isinstance(ray_source.open_slices(folder, "train", labels=True), ray_source.ObjectStoreSlices)
    small = ray_source.open_slices(folder, "train", labels=True, capacity=300_000)
    assert isinstance(small, ray_source.StreamedSlices)
    with pytest.raises(ClusterError, match=r"take \d+ MiB .* the smallest node has"):
        ray_source.open_slices(folder, "train", labels=True, in_memory=True, capacity=100_000)
