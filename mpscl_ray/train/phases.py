"""From a config to what is trained: the segmenter at its start, and the method of each phase."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpscl_ray.config import Config, SIFAConfig, is_adaptation, method_name, method_of_phase
from mpscl_ray.methods import METHODS, MPSCL, Segmentation
from mpscl_ray.methods.base import Method, TrainingSlices
from mpscl_ray.networks import Segmenter, build, initialise
from mpscl_ray.networks.pretrained import load_pretrained, load_prototypes, load_tensors
from mpscl_ray.runs import checkpoint


def network_arguments(config: Config, num_classes: int, phase: str | None = None) -> dict[str, Any]:
    """What :func:`mpscl_ray.networks.build` makes the segmenter of a phase from; None for the last one."""
    if isinstance(config.method, SIFAConfig):
        return {"num_classes": num_classes, **config.method.network_arguments()}
    arguments = dataclasses.asdict(config.network)
    for key in ("pretrained", "pretrained_heads", "pretrained_prototypes"):
        del arguments[key]
    if is_adaptation(config.schedule[-1][0] if phase is None else phase):
        arguments |= getattr(METHODS[config.method_name], "segmenter_arguments", {})
    return {"kind": "deeplab", "num_classes": num_classes, **arguments}


def build_segmenter(config: Config, num_classes: int, phase: str | None = None) -> Segmenter:
    """The segmenter of a phase (None: the last one) with its seeded initial weights."""
    segmenter = build(network_arguments(config, num_classes, phase))
    initialise(segmenter, config.run.seed)
    return segmenter


def load_pretrained_weights(segmenter: Segmenter, config: Config) -> str | None:
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


def transfer_weights(networks: Mapping[str, nn.Module], weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Give the networks of a phase the weights that those of the same name had at the end of the one before.

    A head that stands on another stage now, and so has another shape, keeps its initial weights.
    """
    for name in networks.keys() & weights.keys():
        own = networks[name].state_dict()
        fitting = {key: tensor for key, tensor in weights[name].items() if own[key].shape == tensor.shape}
        networks[name].load_state_dict({**own, **fitting})


def prepare(method: Method, config: Config, slices: TrainingSlices) -> None:
    """Let a method look at the training slices, unless a file has what MPSCL would see there, its prototypes."""
    path = config.network.pretrained_prototypes
    if path is None or not isinstance(method, MPSCL):
        method.prepare(slices)
    else:
        method.prototypes = load_prototypes(Path(path), *method.prototypes.shape).to(method.prototypes)


def build_method(config: Config, phase: str, segmenter: Segmenter, num_classes: int, device: torch.device) -> Method:
    """The method that trains the segmenter in one phase."""
    settings = method_of_phase(config, phase)
    kind = METHODS[method_name(settings)]
    optim = config.optim
    if kind is Segmentation and config.phases.source_only_lr is not None:
        optim = dataclasses.replace(optim, lr=config.phases.source_only_lr)
    method: Method = kind(segmenter, settings, optim, num_classes, device, config.precision, config.run.seed)
    return method
