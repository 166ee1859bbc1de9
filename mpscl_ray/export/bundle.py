"""A MONAI bundle: the network as TorchScript for MONAI's tools, and the model file for whole volumes.

``python -m monai.bundle run`` segments the NIfTI files of a folder through this package, so that volumes are prepared,
and label maps put back, as predict does.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

from mpscl_ray import __version__
from mpscl_ray.export.card_text import card_text

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
MONAI_VERSION = "1.6.1"
"""The version that bundles are tested with."""

_INFERENCE = {
    "imports": ["$import glob", "$import os", "$import mpscl_ray"],
    "bundle_root": ".",
    "dataset_dir": "$@bundle_root + '/images'",
    "output_dir": "$@bundle_root + '/predictions'",
    "modality": "target",
    "postprocessing": "chosen",
    "images": "$sorted(glob.glob(@dataset_dir + '/*.nii*'))",
    "network_def": {
        "_target_": "torch.jit.load",
        "f": "$@bundle_root + '/models/model.ts'",
        "map_location": "cpu",
    },
    "segmenter": {"_target_": "mpscl_ray.load_segmenter", "run": "$@bundle_root + '/models/model.mpscl'"},
    "run": [
        "$[@segmenter.predict_file(image, os.path.join(@output_dir, os.path.basename(image).split('.nii')[0] "
        "+ '_prediction.nii.gz'), modality=@modality, postprocessing=@postprocessing) for image in @images]"
    ],
}
"""``modality`` is ``target``, ``source`` or a modality; ``postprocessing`` is as in ``predict_file``; ``dataset_dir``
has the NIfTI files."""


def bundle_files(card: Mapping[str, Any], script: bytes, model: bytes) -> dict[str, bytes]:
    """Contents of a bundle by their paths in it.

    Args:
        card: model card.
        script: the network as TorchScript.
        model: the model file.
    """
    return {
        "configs/metadata.json": _json(_metadata(card)),
        "configs/inference.json": _json(_INFERENCE),
        "models/model.ts": script,
        "models/model.mpscl": model,
        "docs/README.md": card_text(card).encode(),
    }


def _metadata(card: Mapping[str, Any]) -> dict[str, Any]:
    target, structures = card["data"]["target"]["modality"], list(card["structures"])
    channels = {str(index): name for index, name in enumerate(("background", *structures))}
    scores = card["scores"]
    shape = list(card["slices"])
    common = {"spatial_shape": shape, "dtype": "float32", "is_patch_data": False}
    return {
        "schema": SCHEMA,
        "version": __version__,
        "changelog": {__version__: "exported by mpscl_ray"},
        "monai_version": MONAI_VERSION,
        **{f"{name}_version": _version(package) for name, package in (("pytorch", "torch"), ("numpy", "numpy"))},
        "required_packages_version": {"mpscl_ray": __version__},
        "supported_apps": {},
        "name": card["name"],
        "task": f"Segmentation of {', '.join(structures)} in {target}",
        "description": f"{card['method']}, from {card['data']['source']['modality']} to {target}. {card['warning']}",
        "authors": "see docs/README.md",
        "copyright": f"licence of the weights: {card['licence']['weights'] or 'not stated'}",
        "image_classes": f"slices of {target}, scaled to -1 to 1",
        "pred_classes": f"probabilities of {len(channels)} classes",
        "eval_metrics": {"mean_dice": scores["structures"]["mean"]["dice"]["mean"]} if scores else {},
        "intended_use": card["intended_use"],
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    "modality": target,
                    "num_channels": 1,
                    "value_range": [-1, 1],
                    "channel_def": {"0": "image"},
                    **common,
                }
            },
            "outputs": {
                "pred": {
                    "type": "probabilities",
                    "format": "segmentation",
                    "num_channels": len(channels),
                    "value_range": [0, 1],
                    "channel_def": channels,
                    **common,
                }
            },
        },
    }


def _version(package: str) -> str:
    return importlib.metadata.version(package).partition("+")[0]


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=4, ensure_ascii=False, allow_nan=False) + "\n").encode()
