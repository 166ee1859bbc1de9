"""Prepared label values: which are structures, and how often each class occurs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.data.volumes.label_maps import class_voxels


def is_structure(labels: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Where labels, of any shape, are a structure: neither background nor ``NOT_ANNOTATED``."""
    inside: NDArray[np.bool_] = (labels > 0) & (labels != NOT_ANNOTATED)
    return inside


def count_voxels(label: NDArray[np.uint8], num_classes: int) -> tuple[int, ...]:
    """Voxels of each class, background first; those that are not annotated are in no count."""
    return tuple(class_voxels(label, num_classes)[:num_classes].tolist())
