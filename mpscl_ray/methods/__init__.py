"""Published methods, each a file that reads like its paper."""

from __future__ import annotations

from typing import Any

from mpscl_ray.methods.adabn import AdaBN, AdaBNConfig
from mpscl_ray.methods.adaoutput import AdaOutput, AdaOutputConfig
from mpscl_ray.methods.advent import AdvEnt, AdvEntConfig
from mpscl_ray.methods.base import Batch, Method, SegmentationConfig
from mpscl_ray.methods.cag import CAG, CAGConfig
from mpscl_ray.methods.clan import CLAN, CLANConfig
from mpscl_ray.methods.intrada import IntraDA, IntraDAConfig
from mpscl_ray.methods.mpscl import MPSCL, MPSCLConfig
from mpscl_ray.methods.segmentation import Segmentation
from mpscl_ray.methods.sifa import SIFA, SIFAConfig

METHODS: dict[str, Any] = {
    "mpscl": MPSCL,
    "segmentation": Segmentation,
    "adabn": AdaBN,
    "adaoutput": AdaOutput,
    "advent": AdvEnt,
    "clan": CLAN,
    "intrada": IntraDA,
    "cag": CAG,
    "sifa": SIFA,
}
"""The class of every method by the name it has in a config."""

METHOD_CONFIGS: dict[str, type[Any]] = {
    "mpscl": MPSCLConfig,
    "segmentation": SegmentationConfig,
    "adabn": AdaBNConfig,
    "adaoutput": AdaOutputConfig,
    "advent": AdvEntConfig,
    "clan": CLANConfig,
    "intrada": IntraDAConfig,
    "cag": CAGConfig,
    "sifa": SIFAConfig,
}
"""The settings of every method by the same name."""

__all__ = [
    "CAG",
    "CLAN",
    "METHODS",
    "METHOD_CONFIGS",
    "MPSCL",
    "SIFA",
    "AdaBN",
    "AdaBNConfig",
    "AdaOutput",
    "AdaOutputConfig",
    "AdvEnt",
    "AdvEntConfig",
    "Batch",
    "CAGConfig",
    "CLANConfig",
    "IntraDA",
    "IntraDAConfig",
    "MPSCLConfig",
    "Method",
    "SIFAConfig",
    "Segmentation",
    "SegmentationConfig",
]
