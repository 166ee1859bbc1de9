"""The slices that a run reads: as streams of batches, and as one pass over all of them before a phase."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mpscl_ray.config import Config, reads_target
from mpscl_ray.data import SOURCE_DOMAIN, TARGET_DOMAIN
from mpscl_ray.data.loader import SliceStream
from mpscl_ray.data.sampler import Foreground, shard_range
from mpscl_ray.data.slices import Slices
from mpscl_ray.data.subset import SubsetSlices
from mpscl_ray.methods.base import Batch, Method, TrainingSlices
from mpscl_ray.networks.pretrained import load_prototypes

EASY, HARD = "easy", "hard"
"""Names of the streams of a target that a method has split."""


@dataclass(frozen=True)
class TrainingData:
    """The slices that one run reads."""

    classes: tuple[str, ...]
    """Names, background first."""
    labelled: Slices
    """Slices with labels that train the segmenter."""
    unlabelled: Slices | None
    """Slices of the target, opened without labels; None for plain segmentation."""
    validation: Mapping[str, Slices]
    """Slices by domain, with labels where there are any. Never trained on."""


def open_streams(
    config: Config,
    data: TrainingData,
    method: Method,
    phase: str,
    start_step: int,
    device: torch.device,
    rank: int,
    world_size: int,
) -> tuple[SliceStream, SliceStream | None]:
    """This worker's streams for source and target in the batches of a phase, from a global step on.

    Where the method has split the target, both streams are of the target.
    """

    opened = _stream_of(config, device, rank, world_size)

    def share_of(slices: Slices, *, predicted: bool = False) -> Foreground | None:
        share = config.data.foreground_share
        return None if share is None else Foreground(share, slices.foreground_rows, slices.rows, predicted=predicted)

    def source_stream() -> SliceStream:
        slices, augment = data.labelled, config.data.augmentation
        return opened(
            slices,
            domain=SOURCE_DOMAIN,
            augment=augment,
            original=method.original_source,
            foreground=share_of(slices),
            start_step=start_step,
        )

    def target_stream(
        name: str, slices: Slices | None, views: int = 1, foreground: Foreground | None = None
    ) -> SliceStream:
        assert slices is not None
        # Intensities are remapped in the labelled domain only: the target has to keep its appearance.
        still = dataclasses.replace(
            config.data.augmentation, random_conv_probability=0.0, mapping_probability=0.0, degradation_probability=0.0
        )
        view = config.data.augmentation if views == 2 else None
        return opened(slices, domain=name, augment=still, view=view, foreground=foreground, start_step=start_step)

    if method.split is not None:
        split = method.split
        assert data.unlabelled is not None
        easy = SubsetSlices(data.unlabelled, split.easy.numpy(), split.pseudo_labels.numpy())
        hard = SubsetSlices(data.unlabelled, split.hard.numpy())
        return (
            target_stream(EASY, easy, foreground=share_of(easy, predicted=True)),
            target_stream(HARD, hard, method.target_views),
        )
    if not reads_target(phase):
        return source_stream(), None
    return source_stream(), target_stream(TARGET_DOMAIN, data.unlabelled, method.target_views)


def batch_of(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Batch:
    """The batch of a step, from what the streams give for it; nothing of the target for plain segmentation."""
    images = source["image"], source["label"], target.get("image")
    return Batch(*images, target_view=target.get("view"), source_original=source.get("original"))


def _stream_of(config: Config, device: torch.device, rank: int, world_size: int) -> Callable[..., SliceStream]:
    batch_size = config.data.global_batch_size
    return functools.partial(
        SliceStream, seed=config.run.seed, global_batch=batch_size, rank=rank, world_size=world_size, device=device
    )


def training_slices(
    config: Config,
    data: TrainingData,
    device: torch.device,
    source_only_weights: Callable[[], dict[str, Tensor]],
    rank: int,
    world_size: int,
) -> TrainingSlices:
    """This worker's share of all training slices, un-augmented, for a method to prepare its phase with."""
    unlabelled, batch_size = data.unlabelled, config.data.global_batch_size
    path = config.network.pretrained_prototypes
    assert unlabelled is not None

    def batches(slices: Slices) -> Iterator[dict[str, Tensor]]:
        for batch in slices.shard(rank, world_size, batch_size):
            yield {name: tensor.to(device) for name, tensor in batch.items()}

    def synchronised(slices: Slices, domain: str) -> Iterator[Tensor]:
        with _stream_of(config, device, rank, world_size)(slices, domain=domain) as stream:
            for _ in range(-(-slices.rows // batch_size)):
                yield stream.next()["image"]

    def target() -> Iterator[tuple[Tensor, Tensor]]:
        rows = torch.as_tensor(shard_range(unlabelled.rows, rank, world_size))
        for start, batch in zip(range(0, len(rows), batch_size), batches(unlabelled), strict=True):
            yield rows[start : start + batch_size], batch["image"]

    return TrainingSlices(
        labelled=lambda: ((batch["image"], batch["label"]) for batch in batches(data.labelled)),
        synchronised_source_batches=functools.partial(synchronised, data.labelled, SOURCE_DOMAIN),
        synchronised_target_batches=functools.partial(synchronised, unlabelled, TARGET_DOMAIN),
        unlabelled=target,
        target_volumes=tuple(unlabelled.files.case_rows()),
        size=unlabelled.files.size,
        source_only_weights=source_only_weights,
        pretrained_prototypes=None if path is None else functools.partial(load_prototypes, Path(path)),
    )
