"""From a config to what is trained: the segmenter with its initial weights, and the method of each phase."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpscl_ray.config import SOURCE_ONLY, Config, method_name, method_of_phase, reads_target
from mpscl_ray.methods import METHODS
from mpscl_ray.methods.base import Method
from mpscl_ray.networks import Segmenter, build, initialise
from mpscl_ray.networks.pretrained import load_pretrained, load_tensors
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.run_directory import RunDirectory

_LEARNING_RATES = ("lr", "lr_discriminator", "lr_generator", "lr_segmenter")


def network_arguments(config: Config, num_classes: int, phase: str | None = None) -> dict[str, Any]:
    """What :func:`mpscl_ray.networks.build` makes the segmenter of a phase from; None for the last one."""
    settings = method_of_phase(config, config.schedule[-1][0] if phase is None else phase)
    return METHODS[method_name(settings)].network_arguments(config.network, settings, num_classes)


def build_segmenter(config: Config, num_classes: int, phase: str | None = None) -> Segmenter:
    """The segmenter of a phase (None: the last one) with its seeded initial weights."""
    segmenter = build(network_arguments(config, num_classes, phase))
    initialise(segmenter, config.run.seed)
    return segmenter


def load_pretrained_weights(segmenter: Segmenter, config: Config) -> str | None:
    """Load ``network.pretrained``: a released file, or the folder of a checkpoint of a run.

    Returns:
        A sentence on what was loaded; None where nothing is configured.
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


def source_only_weights(config: Config, num_classes: int, run: RunDirectory, dtype: torch.dtype) -> dict[str, Tensor]:
    """The segmenter's weights at the end of the source-only phase; the initial ones in a run without that phase."""
    if SOURCE_ONLY in (name for name, _ in config.schedule):
        state = checkpoint.load(run.store.localize(run.phases / SOURCE_ONLY))
        weights: dict[str, Tensor] = state["method"]["networks"]["segmenter"]
        return weights
    segmenter = build_segmenter(config, num_classes).to(dtype)
    load_pretrained_weights(segmenter, config)
    return segmenter.state_dict()


def transfer_weights(networks: Mapping[str, nn.Module], weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Load the weights that networks of the same name had at the end of the phase before.

    A head that moved to another stage, and so has another shape, keeps its initial weights and biases.
    """
    for name in networks.keys() & weights.keys():
        own = networks[name].state_dict()
        moved = {_layer(key) for key, tensor in weights[name].items() if own[key].shape != tensor.shape}
        fitting = {key: tensor for key, tensor in weights[name].items() if _layer(key) not in moved}
        networks[name].load_state_dict({**own, **fitting})


def _layer(key: str) -> str:
    """The layer of a tensor, by its state-dict key."""
    return key.rpartition(".")[0]


def build_method(
    config: Config,
    phase: str,
    segmenter: Segmenter,
    num_classes: int,
    device: torch.device,
    lr_factor: float = 1.0,
) -> Method:
    """The method that trains the segmenter in one phase, with all learning rates times ``lr_factor``."""
    settings = method_of_phase(config, phase)
    optim = config.optim
    if not reads_target(phase) and config.phases.source_only_lr is not None:
        optim = dataclasses.replace(optim, lr=config.phases.source_only_lr)
    kind = METHODS[method_name(settings)]
    settings, optim = _with_rates(settings, lr_factor), _with_rates(optim, lr_factor)
    return kind(segmenter, settings, optim, num_classes, device, config.precision, config.run.seed)


def _with_rates(settings: Any, factor: float) -> Any:
    """Settings of a method or of the optimisers with their learning rates multiplied."""
    names = [entry.name for entry in dataclasses.fields(settings) if entry.name in _LEARNING_RATES]
    return dataclasses.replace(settings, **{name: factor * getattr(settings, name) for name in names})
