"""The folder of a run on two prepared datasets whose network was never trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpscl_ray.data.dataset import load_manifest
from mpscl_ray.networks import DeepLabV2
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.run_directory import RunDirectory
from tests.untrained_run import NETWORK


def segmenter(num_classes: int, seed: int) -> DeepLabV2:
    """A network with large random weights, so that it predicts every class somewhere."""
    network = DeepLabV2(num_classes=num_classes, **NETWORK)
    generator = torch.Generator().manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, generator=generator)
    return network


def domain_of(dataset: Path) -> dict[str, Any]:
    """The entry of a dataset in ``model.json``."""
    manifest = load_manifest(dataset)
    return {
        "modality": manifest.modality,
        "scaling": {"low": manifest.scaling.low, "high": manifest.scaling.high},
        "recipe": manifest.recipe,
        "labels": manifest.labels,
        "dataset": str(dataset),
        "fingerprint": manifest.fingerprint,
    }


def write_run(path: Path, source: Path, target: Path, checkpoints: Mapping[str, int]) -> RunDirectory:
    """A run on two datasets.

    Args:
        path: its folder.
        source: dataset.
        target: dataset.
        checkpoints: path below the folder, such as ``phases/adaptation``, and the seed of the weights.
    """
    folder = RunDirectory(path)
    folder.create()
    folder.write_config("method: {name: mpscl}\n")
    manifest = load_manifest(target)
    folder.write_model(
        {
            "classes": list(manifest.classes),
            "size": list(manifest.size),
            "network": NETWORK,
            "source": domain_of(source),
            "target": domain_of(target),
            "phases": ["source_only", "adaptation"],
        }
    )
    for name, seed in checkpoints.items():
        weights = segmenter(len(manifest.classes), seed).state_dict()
        state = {
            "method": {"networks": {"segmenter": weights}},
            "position": {"step": 20},
            "classes": list(manifest.classes),
            "phase": "x",
            "selected_by": "oracle" if name == "best" else None,
        }
        checkpoint.save(folder.path / name, state)
    return folder
