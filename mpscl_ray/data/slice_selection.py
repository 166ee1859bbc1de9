"""Which slices of a volume a picture shows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mpscl_ray.data.label_values import is_structure


def labelled_slices(labels: NDArray[np.integer]) -> NDArray[np.intp]:
    """Indices of the slices of (D, H, W) labels that show a structure; of all slices if none does."""
    shown = np.flatnonzero(is_structure(labels).any(axis=(1, 2)))
    return shown if len(shown) else np.arange(len(labels))


def evenly_spaced(candidates: NDArray[np.intp], number: int) -> NDArray[np.intp]:
    """At most ``number`` evenly spaced ones of sorted candidates; the first and the last only if there are few."""
    positions = np.linspace(0, len(candidates) - 1, number + 2).round().astype(np.intp)[1:-1]
    chosen: NDArray[np.intp] = candidates[np.unique(positions)]
    return chosen
