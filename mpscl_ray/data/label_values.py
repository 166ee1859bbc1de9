"""Prepared label values: which are structures, and how often each class occurs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.data.volumes.label_maps import class_voxels

FOREGROUND_PIXELS = 20
"""A slice with more pixels of structures than this shows a structure."""


def is_structure(labels: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Where labels, of any shape, are a structure: neither background nor ``NOT_ANNOTATED``."""
    inside: NDArray[np.bool_] = (labels > 0) & (labels != NOT_ANNOTATED)
    return inside


def show_a_structure(labels: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Indices of the slices (N, H, W) with more than ``FOREGROUND_PIXELS`` pixels of structures."""
    return np.flatnonzero(is_structure(labels).sum(axis=(1, 2)) > FOREGROUND_PIXELS)


def count_voxels(label: NDArray[np.uint8], num_classes: int) -> tuple[int, ...]:
    """Voxels of each class, background first; those that are not annotated are in no count."""
    return tuple(class_voxels(label, num_classes)[:num_classes].tolist())
