"""What a method may look at before its phase, over numbers of workers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mpscl_ray.methods.base import TrainingSlices
from mpscl_ray.train.streams import open_streams, training_slices
from tests.tiny import local_data, make_pair, tiny_config
from tests.tiny_methods import make_advent

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_pair(tmp_path)


def slices_of(folder: Path, rank: int = 0, workers: int = 1) -> TrainingSlices:
    """What worker ``rank`` of so many sees of 18 slices a domain, four at a time."""
    config = tiny_config(folder / "mr", folder / "ct")
    return training_slices(config, local_data(config), CPU, dict, rank, workers)


def as_set(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_each_slice_comes_once_whatever_the_number_of_workers(folder: Path) -> None:
    alone = slices_of(folder)
    images = torch.cat([image for image, _ in alone.labelled()])
    assert len(images) == len(as_set(images)) == 18
    assert torch.cat([rows for rows, _ in alone.unlabelled()]).tolist() == list(range(18))
    shares = [slices_of(folder, rank, 4) for rank in range(4)]
    assert torch.equal(torch.cat([image for share in shares for image, _ in share.labelled()]), images)
    assert [row for share in shares for rows, _ in share.unlabelled() for row in rows.tolist()] == list(range(18))
    assert [sum(len(rows) for rows, _ in share.unlabelled()) for share in shares] == [4, 5, 4, 5]


def test_in_step_all_workers_have_equal_parts_of_the_same_batches(folder: Path) -> None:
    """One pass in five batches of four; the last has two slices of the next pass."""
    alone = slices_of(folder)
    whole = list(alone.synchronised_source_batches())
    assert [len(batch) for batch in whole] == [4] * 5
    everything = as_set(torch.cat([image for image, _ in alone.labelled()]))
    assert as_set(torch.cat(whole)) == everything, "unchanged, and none left out"
    parts = [list(slices_of(folder, rank, 2).synchronised_source_batches()) for rank in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(batch, torch.cat([first, second]))
        assert len(first) == len(second) == 2


def test_intensities_are_remapped_in_the_labelled_domain_alone(folder: Path) -> None:
    """The target has to keep the look that it is adapted to."""
    still = ("rotation_deg=0", "scale=[1,1]", "translation=0", "intensity_mapping=1")
    config = tiny_config(folder / "mr", folder / "ct", [f"data.augmentation.{change}" for change in still])
    data = local_data(config)
    assert data.unlabelled is not None
    source, target = open_streams(config, data, make_advent(), "adaptation", 0, CPU, 0, 1)
    assert target is not None
    with source, target:
        for stream, slices, kept in ((source, data.labelled, False), (target, data.unlabelled, True)):
            (whole,) = (batch["image"] for batch in slices.shard(0, 1, slices.rows))
            images = as_set(stream.next()["image"])
            assert images <= as_set(whole) if kept else images.isdisjoint(as_set(whole))
