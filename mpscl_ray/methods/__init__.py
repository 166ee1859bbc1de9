"""Published methods, each a file that reads like its paper."""

from __future__ import annotations

from mpscl_ray.methods.base import Batch, Method
from mpscl_ray.methods.mpscl import MPSCL, MPSCLConfig
from mpscl_ray.methods.segmentation import Segmentation, SegmentationConfig

METHODS: dict[str, type[MPSCL] | type[Segmentation]] = {"mpscl": MPSCL, "segmentation": Segmentation}
"""Every method by the name it has in a config."""

__all__ = ["METHODS", "MPSCL", "Batch", "MPSCLConfig", "Method", "Segmentation", "SegmentationConfig"]
