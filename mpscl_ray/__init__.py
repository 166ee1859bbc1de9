"""Unsupervised domain adaptation of medical image segmentation (MPSCL), trained data-parallel on Ray.

The names below are the public Python API; docs/python-api.md describes them. A name is imported when it is first used,
so that ``import mpscl_ray`` loads neither torch nor Ray. Modules of the package import from where a name is defined,
and from here ``__version__`` alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:  # What _MODULES says, for type checkers and editors.
    from mpscl_ray.config import METHOD_CONFIGS, Config, load_config, preset_names
    from mpscl_ray.errors import ClusterError, ConfigError, DataError, MpsclError, StorageError, TrainingError
    from mpscl_ray.evaluate.metrics import StructureScore
    from mpscl_ray.evaluate.score import score
    from mpscl_ray.export.run import export_model
    from mpscl_ray.methods import METHODS
    from mpscl_ray.methods.losses import (
        RatioTerms,
        class_counts,
        cosine_to_prototypes,
        domain_loss,
        margin_contrastive_loss,
        self_information,
        soft_dice_loss,
        weighted_cross_entropy,
    )
    from mpscl_ray.methods.prototypes import (
        downsample_labels,
        initial_prototypes,
        prototype_sums,
        self_paced_pseudo_labels,
        update_prototypes,
    )
    from mpscl_ray.networks.deeplab import DeepLabV2
    from mpscl_ray.networks.discriminators import FCDiscriminator
    from mpscl_ray.predict.segmenter import TrainedSegmenter, load_segmenter
    from mpscl_ray.prepare.check_run import Checked, Finding
    from mpscl_ray.prepare.keywords import check_dataset, prepare_dataset
    from mpscl_ray.train.in_process import TrainingResult, train_segmenter

__all__ = [
    "METHODS",
    "METHOD_CONFIGS",
    "Checked",
    "ClusterError",
    "Config",
    "ConfigError",
    "DataError",
    "DeepLabV2",
    "FCDiscriminator",
    "Finding",
    "MpsclError",
    "RatioTerms",
    "StorageError",
    "StructureScore",
    "TrainedSegmenter",
    "TrainingError",
    "TrainingResult",
    "__version__",
    "check_dataset",
    "class_counts",
    "cosine_to_prototypes",
    "domain_loss",
    "downsample_labels",
    "export_model",
    "initial_prototypes",
    "load_config",
    "load_segmenter",
    "margin_contrastive_loss",
    "prepare_dataset",
    "preset_names",
    "prototype_sums",
    "score",
    "self_information",
    "self_paced_pseudo_labels",
    "soft_dice_loss",
    "train_segmenter",
    "update_prototypes",
    "weighted_cross_entropy",
]

_MODULES = {
    "METHODS": "mpscl_ray.methods",
    "METHOD_CONFIGS": "mpscl_ray.config",
    "Checked": "mpscl_ray.prepare.check_run",
    "ClusterError": "mpscl_ray.errors",
    "Config": "mpscl_ray.config",
    "ConfigError": "mpscl_ray.errors",
    "DataError": "mpscl_ray.errors",
    "DeepLabV2": "mpscl_ray.networks.deeplab",
    "FCDiscriminator": "mpscl_ray.networks.discriminators",
    "Finding": "mpscl_ray.prepare.check_run",
    "MpsclError": "mpscl_ray.errors",
    "StorageError": "mpscl_ray.errors",
    "StructureScore": "mpscl_ray.evaluate.metrics",
    "RatioTerms": "mpscl_ray.methods.losses",
    "TrainedSegmenter": "mpscl_ray.predict.segmenter",
    "TrainingError": "mpscl_ray.errors",
    "TrainingResult": "mpscl_ray.train.in_process",
    "check_dataset": "mpscl_ray.prepare.keywords",
    "class_counts": "mpscl_ray.methods.losses",
    "cosine_to_prototypes": "mpscl_ray.methods.losses",
    "domain_loss": "mpscl_ray.methods.losses",
    "downsample_labels": "mpscl_ray.methods.prototypes",
    "export_model": "mpscl_ray.export.run",
    "initial_prototypes": "mpscl_ray.methods.prototypes",
    "load_config": "mpscl_ray.config",
    "load_segmenter": "mpscl_ray.predict.segmenter",
    "margin_contrastive_loss": "mpscl_ray.methods.losses",
    "prepare_dataset": "mpscl_ray.prepare.keywords",
    "preset_names": "mpscl_ray.config",
    "prototype_sums": "mpscl_ray.methods.prototypes",
    "score": "mpscl_ray.evaluate.score",
    "self_information": "mpscl_ray.methods.losses",
    "self_paced_pseudo_labels": "mpscl_ray.methods.prototypes",
    "soft_dice_loss": "mpscl_ray.methods.losses",
    "train_segmenter": "mpscl_ray.train.in_process",
    "update_prototypes": "mpscl_ray.methods.prototypes",
    "weighted_cross_entropy": "mpscl_ray.methods.losses",
}
"""Where each public name is defined."""


if not TYPE_CHECKING:  # With it, a type checker would accept any name.

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
