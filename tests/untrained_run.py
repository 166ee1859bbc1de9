"""A run folder whose small network was never trained, to predict with: three classes, slices of 32 x 32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpscl_ray.data.volumes.recipe import Recipe
from mpscl_ray.networks import DeepLabV2, initialise
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.run_directory import RunDirectory

CLASSES = ("background", "LV", "RV")
NETWORK = {"layers": [1, 1, 1, 1], "base_channels": 4, "output_stride": 4, "in_channels": 1}


def segmenter(seed: int = 0) -> DeepLabV2:
    network = DeepLabV2(num_classes=len(CLASSES), **NETWORK)
    initialise(network, seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):  # larger than for training, so that the classes differ between pixels
            nn.init.kaiming_normal_(layer.weight, generator=generator)
    return network.eval()


def domain(modality: str, recipe: Recipe, raw: dict[str, str] | None = None) -> dict[str, Any]:
    return {
        "modality": modality,
        "scaling": {"low": -2.0, "high": 3.0},
        "recipe": recipe.to_json(),
        "labels": {"values": raw or {}},
        "dataset": None,
        "fingerprint": None,
    }


def write_run(path: Path, **changes: Any) -> RunDirectory:
    folder = RunDirectory(path)
    folder.create()
    folder.write_config("method: {name: mpscl}\n")
    model = {
        "classes": list(CLASSES),
        "size": [32, 32],
        "network": {"num_classes": len(CLASSES), **NETWORK},
        "source": domain("mr", Recipe(crop=(32, 32)), {"0": "background", "200": "LV", "600": "RV"}),
        "target": domain("ct", Recipe(crop=(32, 32))),
        "phases": ["source_only", "adaptation"],
    }
    folder.write_model({**model, **changes})
    return folder


def save(directory: Path, network: DeepLabV2, **entries: Any) -> None:
    state = {"method": {"networks": {"segmenter": network.state_dict()}}, "position": {"step": 300}, **entries}
    checkpoint.save(directory, {"classes": list(CLASSES), "phase": "adaptation", "selected_by": None, **state})
