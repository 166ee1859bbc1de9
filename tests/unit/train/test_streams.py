"""The slices that a method gets before and in its phase, with different numbers of workers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mpscl_ray.config import Config
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.methods import AdvEnt
from mpscl_ray.methods.base import TargetSplit, TrainingSlices
from mpscl_ray.train.streams import open_streams, training_slices
from tests.tiny import local_data, make_pair, tiny_config
from tests.tiny_methods import make_advent, make_mpscl

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_pair(tmp_path)


def slices_of(folder: Path, rank: int = 0, workers: int = 1, overrides: Sequence[str] = ()) -> TrainingSlices:
    """What worker ``rank`` of so many gets of 18 slices per domain, four at a time."""
    config = tiny_config(folder / "mr", folder / "ct", overrides)
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


def test_synchronised_batches_have_equal_parts_on_all_workers(folder: Path) -> None:
    """One pass in five batches of four; the last has two slices of the next pass."""
    alone = slices_of(folder)
    whole = list(alone.synchronised_source_batches())
    assert [len(batch) for batch in whole] == [4] * 5
    everything = as_set(torch.cat([image for image, _ in alone.labelled()]))
    assert as_set(torch.cat(whole)) == everything, "unchanged, and none left out"
    target = torch.cat(list(alone.synchronised_target_batches()))
    assert as_set(target) == as_set(torch.cat([image for _, image in alone.unlabelled()]))
    parts = [list(slices_of(folder, rank, 2).synchronised_source_batches()) for rank in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(batch, torch.cat([first, second]))
        assert len(first) == len(second) == 2


def test_intensities_are_remapped_in_the_labelled_domain_alone(folder: Path) -> None:
    """The target has to keep its appearance."""
    still = ("rotation_deg=0", "scale=[1,1]", "translation=0", "random_conv_probability=1")
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


APPEARANCE = ("mapping_probability=1", "mappings=[curves,gin]", "degradation_probability=0.3")


def appearance_config(folder: Path, *overrides: str) -> Config:
    changes = [f"data.augmentation.{change}" for change in APPEARANCE]
    return tiny_config(folder / "mr", folder / "ct", [*changes, *overrides])


def first_batches(config: Config, rank: int = 0, workers: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    source, target = open_streams(config, local_data(config), make_advent(), "adaptation", 0, CPU, rank, workers)
    assert target is not None
    with source, target:
        return source.next(), target.next()


def test_the_target_keeps_its_appearance_and_has_a_second_view_if_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image is the one of a run without changes of appearance, whether there is a view or not."""
    config = appearance_config(folder)
    old_source, old_target = first_batches(tiny_config(folder / "mr", folder / "ct"))
    source, target = first_batches(config)
    assert not torch.equal(source["image"], old_source["image"])
    assert torch.equal(source["label"], old_source["label"])
    assert torch.equal(target["image"], old_target["image"])
    assert target.keys() == {"image"}

    monkeypatch.setattr(AdvEnt, "target_views", 2)
    same_source, target = first_batches(config)
    assert source.keys() == same_source.keys()
    assert torch.equal(target["image"], old_target["image"])
    assert all(not torch.equal(view, image) for view, image in zip(target["view"], target["image"], strict=True))
    parts = [first_batches(config, rank, 2)[1]["view"] for rank in range(2)]
    assert torch.equal(torch.cat(parts), target["view"])


def test_a_share_of_the_source_slices_shows_a_structure(folder: Path) -> None:
    """Three of four in each step; the order of the target is not changed."""
    still = ["data.augmentation.rotation_deg=0", "data.augmentation.scale=[1,1]", "data.augmentation.translation=0"]
    still.append("data.augmentation.random_conv_probability=0")
    config = tiny_config(folder / "mr", folder / "ct", [*still, "data.foreground_share=0.75"])
    data = local_data(config)
    assert data.labelled.foreground_rows.tolist() == list(range(18)), "every slice of this dataset shows one"
    data.labelled.foreground_rows = np.arange(4)
    shown = as_set(torch.from_numpy(data.labelled.files.read(np.arange(4))["image"][:, None]))
    source, target = open_streams(config, data, make_advent(), "adaptation", 0, CPU, 0, 1)
    assert target is not None
    with source, target:
        for _ in range(5):
            assert len([image for image in source.next()["image"] if image.numpy().tobytes() in shown]) == 3
        plain = first_batches(tiny_config(folder / "mr", folder / "ct", still))[1]
        assert torch.equal(target.next()["image"], plain["image"])


def test_a_share_of_the_pseudo_labelled_slices_shows_a_structure(folder: Path) -> None:
    """In the second stage of IntraDA, by the pseudo-labels: two of the six easy slices are in three of four places."""
    config = tiny_config(folder / "mr", folder / "ct", ["data.foreground_share=0.75"])
    data, method = local_data(config), make_advent()
    pseudo_labels = torch.zeros(6, 32, 32, dtype=torch.uint8)
    pseudo_labels[4:, 8:16] = 1
    method.split = TargetSplit(torch.arange(6), torch.arange(6, 18), pseudo_labels)
    easy, hard = open_streams(config, data, method, "adaptation", 0, CPU, 0, 1)
    assert hard is not None
    with easy, hard:
        for _ in range(5):
            assert easy.next()["label"].any(dim=2).any(dim=1).sum() == 3
    method.split = TargetSplit(torch.arange(6), torch.arange(6, 18), torch.zeros_like(pseudo_labels))
    with pytest.raises(ConfigError, match=r"no pseudo-labelled slice of the target shows one; train .* for longer"):
        open_streams(config, data, method, "adaptation", 0, CPU, 0, 1)


def test_the_adaptation_starts_from_the_prototypes_of_a_file(folder: Path) -> None:
    file = folder / "centres.npy"
    method = make_mpscl()
    centres = np.random.default_rng(0).normal(size=(1, *method.prototypes.shape, 1)).astype(np.float32)
    np.save(file, centres)
    assert slices_of(folder).pretrained_prototypes is None
    slices = slices_of(folder, overrides=[f"network.pretrained_prototypes={file}"])
    method.prepare(slices)
    assert np.array_equal(method.prototypes.numpy(), centres[0, ..., 0])
    np.save(file, centres[:, :2])
    with pytest.raises(DataError, match="class centres"):
        method.prepare(slices)
