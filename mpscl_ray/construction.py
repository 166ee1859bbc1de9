"""From a config to what is trained: the segmenter at its start, and the method of each phase."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpscl_ray import checkpoint
from mpscl_ray.config import ADAPTATION, WARM_UP, Config
from mpscl_ray.methods.base import Method
from mpscl_ray.methods.mpscl import MPSCL, MPSCLConfig
from mpscl_ray.methods.segmentation import Segmentation, SegmentationConfig
from mpscl_ray.networks import initialise
from mpscl_ray.networks.deeplab import DeepLabV2
from mpscl_ray.networks.pretrained import load_pretrained, load_prototypes, load_tensors


def network_arguments(config: Config, num_classes: int) -> dict[str, Any]:
    """Arguments of :class:`DeepLabV2` for a config."""
    arguments = dataclasses.asdict(config.network)
    for key in ("pretrained", "pretrained_heads", "pretrained_prototypes"):
        del arguments[key]
    return {"num_classes": num_classes, **arguments}


def build_segmenter(config: Config, num_classes: int) -> DeepLabV2:
    """The segmenter with its seeded initial weights."""
    segmenter = DeepLabV2(**network_arguments(config, num_classes))
    initialise(segmenter, config.run.seed)
    return segmenter


def load_start_weights(segmenter: DeepLabV2, config: Config) -> str | None:
    """Load the pretrained weights that a config names: a released file, or the folder of a checkpoint of a run.

    Returns:
        A sentence on what was loaded; None where none are named.
    """
    if not config.network.pretrained:
        return None
    path = Path(config.network.pretrained)
    if path.is_dir():
        weights = checkpoint.load(path)["method"]["networks"]["segmenter"]
        report = load_tensors(segmenter, weights, path, heads=config.network.pretrained_heads)
    else:
        report = load_pretrained(segmenter, path, heads=config.network.pretrained_heads)
    left_out = f", {len(report.skipped)} of the file left out" if report.skipped else ""
    return f"{len(report.loaded)} tensors loaded from {config.network.pretrained}{left_out}"


def initialise_prototypes(method: Method, config: Config, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Set the prototypes that the adaptation begins with: those of a file, else Eq. 4 over this worker's batches."""
    path = config.network.pretrained_prototypes
    if path is None or not isinstance(method, MPSCL):
        method.initialise_prototypes(batches)
    else:
        method.prototypes = load_prototypes(Path(path), *method.prototypes.shape).to(method.prototypes)


def build_method(config: Config, phase: str, segmenter: DeepLabV2, num_classes: int, device: torch.device) -> Method:
    """The method that trains the segmenter in one phase; MPSCL in warm-up and adaptation."""
    if phase in (WARM_UP, ADAPTATION):
        assert isinstance(config.method, MPSCLConfig)
        return MPSCL(segmenter, config.method, config.optim, num_classes, device, config.precision, config.run.seed)
    optim = config.optim
    if config.phases.source_only_lr is not None:
        optim = dataclasses.replace(optim, lr=config.phases.source_only_lr)
    settings = SegmentationConfig(segmentation_aux_weight=config.method.segmentation_aux_weight)
    return Segmentation(segmenter, settings, optim, num_classes, device, config.precision, config.run.seed)
