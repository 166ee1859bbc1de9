"""Distances between the surfaces of two label volumes.

They are computed for all structures in one pass: the box around everything labelled is cut out, a voxel is on the
surface of its structure if a face neighbour belongs to another one, and a KD-tree over the surface voxels of one volume
finds the nearest ones for those of the other. The values are those of ``medpy.metric.binary`` on the whole volumes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

Definition = Literal["pooled", "mean_of_means"]
"""What "average" means in the average symmetric surface distance.

``pooled`` is the mean over the surface voxels of both volumes together (medpy from 0.5 on). ``mean_of_means`` is half
the sum of the two directed means (medpy 0.4, which the papers of 2019-2022 used).
"""

Array = npt.NDArray[np.generic]
FloatArray = npt.NDArray[np.float64]
IndexArray = npt.NDArray[np.int64]


class SurfaceDistances(NamedTuple):
    """Distances between two surfaces in both directions, in the unit of the spacing; empty if a mask is empty."""

    from_prediction: FloatArray
    from_truth: FloatArray


def average(distances: SurfaceDistances, definition: Definition = "pooled") -> float:
    """Average symmetric surface distance (ASD, also ASSD) from the directed lists; NaN if one of them is empty.

    Source: ``assd`` of medpy, 0.5 (pooled) and 0.4 (mean of means).
    Differs from the released code: an undefined distance is NaN, not 1.
    """
    p, t = distances
    if not p.size or not t.size:
        return math.nan
    if definition == "pooled":
        return float((p.sum() + t.sum()) / (p.size + t.size))
    if definition == "mean_of_means":
        return float((p.mean() + t.mean()) / 2)
    raise ValueError(f"definition must be 'pooled' or 'mean_of_means', not {definition!r}")


def percentile_95(distances: SurfaceDistances) -> float:
    """95th percentile of the distances of both directions together (HD95); NaN if there are none."""
    both = np.concatenate(distances)
    return float(np.percentile(both, 95)) if both.size else math.nan


@dataclass(frozen=True)
class Surfaces:
    """Both label volumes cut to the box around everything labelled, and the surface voxels in it."""

    prediction_box: npt.NDArray[np.uint8]
    truth_box: npt.NDArray[np.uint8]
    prediction_points: tuple[IndexArray, npt.NDArray[np.uint8]]
    truth_points: tuple[IndexArray, npt.NDArray[np.uint8]]

    def prediction(self, index: int) -> FloatArray:
        """Coordinates (n, axes) of the surface voxels of one structure in the prediction, in voxels."""
        return self._coordinates(self.prediction_points, index)

    def truth(self, index: int) -> FloatArray:
        """The same in the truth."""
        return self._coordinates(self.truth_points, index)

    def _coordinates(self, points: tuple[IndexArray, npt.NDArray[np.uint8]], index: int) -> FloatArray:
        flat, label = points
        return np.stack(np.unravel_index(flat[label == index], self.truth_box.shape), axis=1).astype(np.float64)


def find_surfaces(prediction: npt.NDArray[np.uint8], truth: npt.NDArray[np.uint8], connectivity: int) -> Surfaces:
    """Surface voxels of all structures of two label volumes."""
    if not 1 <= connectivity <= prediction.ndim:
        raise ValueError(f"connectivity must be 1 to {prediction.ndim} (the number of axes), not {connectivity}")
    box = _box(prediction | truth)
    p, t = prediction[box], truth[box]
    return Surfaces(p, t, _surface_points(p, connectivity), _surface_points(t, connectivity))


def _box(labels: npt.NDArray[np.uint8]) -> tuple[slice, ...]:
    """The smallest box with every non-zero voxel; empty slices if there is none."""
    box = []
    for axis in range(labels.ndim):
        used = np.flatnonzero(labels.any(axis=tuple(other for other in range(labels.ndim) if other != axis)))
        box.append(slice(int(used[0]), int(used[-1]) + 1) if used.size else slice(0, 0))
    return tuple(box)


def _surface_points(labels: npt.NDArray[np.uint8], connectivity: int) -> tuple[IndexArray, npt.NDArray[np.uint8]]:
    """Flat indices and labels of the voxels that erosion with border value 0 would take from their own structure."""
    surface = np.zeros(labels.shape, dtype=bool)
    if not labels.size:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.uint8)
    for axis in range(labels.ndim):  # beyond the box is background or the end of the volume
        faces = np.moveaxis(surface, axis, 0)
        faces[0] = True
        faces[-1] = True
    for offset in product((-1, 0, 1), repeat=labels.ndim):
        if offset <= (0,) * labels.ndim or np.count_nonzero(offset) > connectivity:
            continue  # the opposite offset is handled together with its twin
        here = tuple(slice(max(0, -step), n - max(0, step)) for step, n in zip(offset, labels.shape, strict=True))
        there = tuple(slice(max(0, step), n - max(0, -step)) for step, n in zip(offset, labels.shape, strict=True))
        differs = labels[here] != labels[there]
        surface[here] |= differs
        surface[there] |= differs
    flat = np.flatnonzero(surface & (labels != 0))
    return flat, labels.ravel()[flat]


def distances_between(prediction: FloatArray, truth: FloatArray, spacing: FloatArray) -> SurfaceDistances:
    """Nearest distances between two point sets (n, axes) in voxels, measured with ``spacing``."""
    if not len(prediction) or not len(truth):
        return SurfaceDistances(np.empty(0), np.empty(0))
    p, t = prediction * spacing, truth * spacing
    # Without balancing the tree is built in half the time, and surfaces are spread evenly enough to search as fast.
    trees = [cKDTree(points, balanced_tree=False, compact_nodes=False) for points in (p, t)]
    return SurfaceDistances(np.asarray(trees[1].query(p)[0]), np.asarray(trees[0].query(t)[0]))


def require_same_shape(prediction: Array, truth: Array) -> None:
    """Raise ValueError if the shapes differ."""
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction has shape {prediction.shape} but truth has {truth.shape}: they must be equal")


def voxel_size(spacing: float | Sequence[float] | None, axes: int) -> FloatArray:
    size = np.ones(axes) if spacing is None else np.broadcast_to(np.asarray(spacing, dtype=np.float64), (axes,))
    if not np.all(np.isfinite(size)) or np.any(size <= 0):
        raise ValueError(f"spacing must be positive in each of {axes} axes, not {spacing}")
    return size
