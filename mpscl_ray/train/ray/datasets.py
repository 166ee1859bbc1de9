"""The datasets of a run by the names that Ray Train has them under: what a trainer is given and a worker takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import ray.train

from mpscl_ray.config import Config
from mpscl_ray.data import TARGET_DOMAIN
from mpscl_ray.data.ray_source import DatasetSlices
from mpscl_ray.data.slices import Slices
from mpscl_ray.train.streams import TrainingData

_VALIDATION = "_validation"


def named_slices(config: Config, data: TrainingData) -> dict[str, DatasetSlices]:
    """``source`` and ``target``, which are trained on, and ``source_validation`` and ``target_validation``."""
    slices: dict[str, Slices] = {config.data.labelled_domain: data.labelled}
    if data.unlabelled is not None:
        slices[TARGET_DOMAIN] = data.unlabelled
    slices |= {domain + _VALIDATION: held_out for domain, held_out in data.validation.items()}
    return cast(dict[str, DatasetSlices], slices)


def take_shards(config: Config, names: Sequence[str]) -> TrainingData:
    """The same in a worker, which every worker has to call."""
    slices = {name: cast(Slices, ray.train.get_dataset_shard(name)) for name in names}
    labelled = slices.pop(config.data.labelled_domain)
    unlabelled = slices.pop(TARGET_DOMAIN, None)
    validation = {name.removesuffix(_VALIDATION): held_out for name, held_out in slices.items()}
    return TrainingData(labelled.files.classes, labelled, unlabelled, validation)
