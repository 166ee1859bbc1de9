"""Dice and surface distances of label volumes, with an empty mask as a named case and never as a number.

Surface distances are computed for all structures in one pass: the box around everything labelled is cut out, a voxel
lies on the surface of its structure if a face neighbour belongs to another one, and a KD-tree over the surface voxels
of one volume answers for those of the other. The values are those of ``medpy.metric.binary`` on the whole volumes.
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

CaseKind = Literal["ok", "missed", "false_alarm", "absent"]
"""``ok``: in truth and prediction; ``missed``: in the truth only; ``false_alarm``: in the prediction only; ``absent``:
in neither."""
Definition = Literal["pooled", "mean_of_means"]
"""What "average" means in the average symmetric surface distance.

``pooled`` is the mean over the surface voxels of both volumes together (medpy from 0.5 on). ``mean_of_means`` is half
the sum of the two directed means (medpy 0.4, which the papers of 2019-2022 used).
"""
RELEASED_BATCH = 32
"""Slices a batch in the evaluation of the MPSCL authors, which drops the last ``D mod 32`` slices of a volume."""

Array = npt.NDArray[np.generic]
FloatArray = npt.NDArray[np.float64]
IndexArray = npt.NDArray[np.int64]


class SurfaceDistances(NamedTuple):
    """Distances between two surfaces in both directions, in the unit of the spacing; empty where a mask is empty."""

    from_prediction: FloatArray
    from_truth: FloatArray


@dataclass(frozen=True)
class StructureScore:
    """How well one structure is segmented in one volume.

    Distances are NaN where they are undefined (``missed``, ``false_alarm``, ``absent``, or no spacing for those in mm).
    In the ``worst_case`` columns ``missed`` and ``false_alarm`` count as the diagonal of the volume, which no distance
    inside the volume can exceed.
    """

    structure: str
    case_kind: CaseKind
    dice: float
    asd_mm: float
    asd_voxel: float
    asd_mm_mean_of_means: float
    asd_voxel_mean_of_means: float
    hd95_mm: float
    asd_mm_worst_case: float
    asd_voxel_worst_case: float
    predicted_voxels: int
    truth_voxels: int


MEASURES = (
    "dice",
    "asd_mm",
    "asd_voxel",
    "asd_mm_mean_of_means",
    "asd_voxel_mean_of_means",
    "hd95_mm",
    "asd_mm_worst_case",
    "asd_voxel_worst_case",
)
"""The measures of :class:`StructureScore` that are averaged over volumes."""


def dice(prediction: Array, truth: Array, label: int | None = None) -> float:
    """Dice similarity of two masks, or of one label in two label volumes.

    ``2 |P and T| / (|P| + |T|)``

    Args:
        prediction: mask or labels, any shape.
        truth: the same shape.
        label: class index to compare; without it every non-zero voxel is in the mask.

    Returns:
        A value in 0..1; 0 if one mask is empty; NaN if both are.

    Raises:
        ValueError: the shapes differ.

    Differs from the released code: two empty masks are NaN, not 0.
    """
    _same_shape(prediction, truth)
    p = prediction != 0 if label is None else prediction == label
    t = truth != 0 if label is None else truth == label
    total = int(np.count_nonzero(p)) + int(np.count_nonzero(t))
    return 2.0 * int(np.count_nonzero(p & t)) / total if total else math.nan


def surface_distances(
    prediction: Array, truth: Array, spacing: float | Sequence[float] | None = None, connectivity: int = 1
) -> SurfaceDistances:
    """Distance of every surface voxel of one mask to the nearest surface voxel of the other.

    Args:
        prediction: mask, any number of axes; non-zero is inside.
        truth: mask of the same shape.
        spacing: voxel size per axis (mm for distances in mm); None for distances in voxels.
        connectivity: which neighbours make a voxel part of the surface, as in
            ``scipy.ndimage.generate_binary_structure``: 1 is face neighbours. Outside the volume is background.

    Returns:
        The two directed lists, in the order of the voxels in memory (C order).

    Raises:
        ValueError: the shapes differ, or the spacing does not fit them.
    """
    _same_shape(prediction, truth)
    size = _spacing(spacing, prediction.ndim)
    surfaces = _surfaces((prediction != 0).astype(np.uint8), (truth != 0).astype(np.uint8), connectivity)
    return _distances(surfaces.prediction(1), surfaces.truth(1), size)


def average(distances: SurfaceDistances, definition: Definition = "pooled") -> float:
    """Average symmetric surface distance from the directed lists; NaN if one of them is empty."""
    p, t = distances
    if not p.size or not t.size:
        return math.nan
    if definition == "pooled":
        return float((p.sum() + t.sum()) / (p.size + t.size))
    if definition == "mean_of_means":
        return float((p.mean() + t.mean()) / 2)
    raise ValueError(f"definition must be 'pooled' or 'mean_of_means', not {definition!r}")


def average_surface_distance(
    prediction: Array,
    truth: Array,
    spacing_mm: float | Sequence[float] | None = None,
    definition: Definition = "pooled",
    connectivity: int = 1,
) -> float:
    """Average symmetric surface distance (ASD, also ASSD) of two masks.

    Args:
        prediction: mask, any number of axes.
        truth: mask of the same shape.
        spacing_mm: voxel size per axis; None gives the distance in voxels.
        definition: ``pooled`` or ``mean_of_means``, see :data:`Definition`.
        connectivity: see :func:`surface_distances`.

    Returns:
        The distance in mm (voxels without a spacing); NaN if a mask is empty, because then it is undefined.

    Raises:
        ValueError: the shapes differ, or the spacing or the definition is not one.

    Source: ``assd`` of medpy, 0.5 (pooled) and 0.4 (mean of means).
    Differs from the released code: an undefined distance is NaN, not 1.
    """
    return average(surface_distances(prediction, truth, spacing_mm, connectivity), definition)


def hausdorff_distance_95(
    prediction: Array, truth: Array, spacing_mm: float | Sequence[float] | None = None, connectivity: int = 1
) -> float:
    """95th percentile of the surface distances of both directions together; arguments as for the average."""
    return _percentile_95(surface_distances(prediction, truth, spacing_mm, connectivity))


def volume_scores(
    prediction: Array,
    truth: Array,
    classes: Sequence[str],
    spacing_mm: Sequence[float] | None,
    connectivity: int = 1,
) -> list[StructureScore]:
    """Score every structure of one volume.

    Args:
        prediction: class indices (D, H, W), or any number of axes.
        truth: class indices of the same shape.
        classes: names of all classes; index 0 is the background, which is not scored.
        spacing_mm: voxel size per axis in mm, or None if it is unknown (distances in mm are then NaN).
        connectivity: see :func:`surface_distances`.

    Returns:
        One score per class from 1 on, in the order of ``classes``.

    Raises:
        ValueError: the shapes differ, the spacing does not fit them, or a label is not an index into ``classes``.
    """
    _same_shape(prediction, truth)
    p, t = _labels(prediction, len(classes), "prediction"), _labels(truth, len(classes), "truth")
    size = None if spacing_mm is None else _spacing(spacing_mm, p.ndim)
    diagonal_voxel = math.dist(p.shape, [0] * p.ndim)
    diagonal_mm = math.nan if size is None else float(np.linalg.norm(np.array(p.shape) * size))
    surfaces = _surfaces(p, t, connectivity)
    scores = []
    for index, structure in enumerate(classes[1:], start=1):
        in_p, in_t = surfaces.prediction_box == index, surfaces.truth_box == index
        n_p, n_t = int(np.count_nonzero(in_p)), int(np.count_nonzero(in_t))
        kind = _case_kind(n_p, n_t)
        voxel, mm = _distances_in_both_units(surfaces, index, size)
        wrong = kind in ("missed", "false_alarm")
        asd_mm, asd_voxel = average(mm), average(voxel)
        scores.append(
            StructureScore(
                structure=structure,
                case_kind=kind,
                dice=2.0 * int(np.count_nonzero(in_p & in_t)) / (n_p + n_t) if n_p + n_t else math.nan,
                asd_mm=asd_mm,
                asd_voxel=asd_voxel,
                asd_mm_mean_of_means=average(mm, "mean_of_means"),
                asd_voxel_mean_of_means=average(voxel, "mean_of_means"),
                hd95_mm=_percentile_95(mm),
                asd_mm_worst_case=diagonal_mm if wrong else asd_mm,
                asd_voxel_worst_case=diagonal_voxel if wrong else asd_voxel,
                predicted_voxels=n_p,
                truth_voxels=n_t,
            )
        )
    return scores


def released_protocol_scores(prediction: Array, truth: Array, classes: Sequence[str]) -> list[StructureScore]:
    """Score a volume as the evaluation of the MPSCL authors does, for comparison with published numbers alone.

    The last ``D mod 32`` slices of the prediction become background, distances are in voxels with the mean of means,
    Dice of two empty masks is 0, and the distance of a structure that is missing in prediction or truth is 1 voxel,
    which is better than most segmentations reach.

    Args:
        prediction: class indices (D, H, W), slices first.
        truth: class indices of the same shape.
        classes: names of all classes, background first.

    Returns:
        One score per class from 1 on. ``asd_voxel`` is the released number; mm, HD95 and worst-case columns are NaN.

    Source: ``domain_adaptation/eval_UDA.py`` of the released code.
    """
    cut = np.array(prediction)
    cut[prediction.shape[0] // RELEASED_BATCH * RELEASED_BATCH :] = 0
    scores = []
    for score in volume_scores(cut, truth, classes, None):
        ok = score.case_kind == "ok"
        distance = score.asd_voxel_mean_of_means if ok else 1.0
        scores.append(
            StructureScore(
                structure=score.structure,
                case_kind=score.case_kind,
                dice=score.dice if score.case_kind != "absent" else 0.0,
                asd_mm=math.nan,
                asd_voxel=distance,
                asd_mm_mean_of_means=math.nan,
                asd_voxel_mean_of_means=distance,
                hd95_mm=math.nan,
                asd_mm_worst_case=math.nan,
                asd_voxel_worst_case=math.nan,
                predicted_voxels=score.predicted_voxels,
                truth_voxels=score.truth_voxels,
            )
        )
    return scores


@dataclass(frozen=True)
class _Surfaces:
    """Both label volumes cut to the box around everything labelled, and the surface voxels in it."""

    prediction_box: npt.NDArray[np.uint8]
    truth_box: npt.NDArray[np.uint8]
    prediction_points: tuple[IndexArray, npt.NDArray[np.uint8]]
    truth_points: tuple[IndexArray, npt.NDArray[np.uint8]]

    def prediction(self, index: int) -> FloatArray:
        return self._coordinates(self.prediction_points, index)

    def truth(self, index: int) -> FloatArray:
        return self._coordinates(self.truth_points, index)

    def _coordinates(self, points: tuple[IndexArray, npt.NDArray[np.uint8]], index: int) -> FloatArray:
        flat, label = points
        return np.stack(np.unravel_index(flat[label == index], self.truth_box.shape), axis=1).astype(np.float64)


def _surfaces(prediction: npt.NDArray[np.uint8], truth: npt.NDArray[np.uint8], connectivity: int) -> _Surfaces:
    if not 1 <= connectivity <= prediction.ndim:
        raise ValueError(f"connectivity must be 1 to {prediction.ndim} (the number of axes), not {connectivity}")
    box = _box(prediction | truth)
    p, t = prediction[box], truth[box]
    return _Surfaces(p, t, _surface_points(p, connectivity), _surface_points(t, connectivity))


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


def _distances(prediction: FloatArray, truth: FloatArray, spacing: FloatArray) -> SurfaceDistances:
    """Nearest distances between two point sets (n, axes) in voxels, measured with ``spacing``."""
    if not len(prediction) or not len(truth):
        return SurfaceDistances(np.empty(0), np.empty(0))
    p, t = prediction * spacing, truth * spacing
    # Without balancing the tree is built in half the time, and surfaces are spread evenly enough to search as fast.
    trees = [cKDTree(points, balanced_tree=False, compact_nodes=False) for points in (p, t)]
    return SurfaceDistances(np.asarray(trees[1].query(p)[0]), np.asarray(trees[0].query(t)[0]))


def _distances_in_both_units(
    surfaces: _Surfaces, index: int, spacing_mm: FloatArray | None
) -> tuple[SurfaceDistances, SurfaceDistances]:
    """Distances of one structure in voxels and in mm; empty if a mask is empty, or without a spacing those in mm."""
    points_p, points_t = surfaces.prediction(index), surfaces.truth(index)
    voxel = _distances(points_p, points_t, np.ones(points_p.shape[1]))
    if spacing_mm is None:
        return voxel, SurfaceDistances(np.empty(0), np.empty(0))
    if np.all(spacing_mm == spacing_mm[0]):
        return voxel, SurfaceDistances(voxel.from_prediction * spacing_mm[0], voxel.from_truth * spacing_mm[0])
    return voxel, _distances(points_p, points_t, spacing_mm)


def _percentile_95(distances: SurfaceDistances) -> float:
    both = np.concatenate(distances)
    return float(np.percentile(both, 95)) if both.size else math.nan


def _case_kind(predicted: int, true: int) -> CaseKind:
    if predicted and true:
        return "ok"
    if true:
        return "missed"
    return "false_alarm" if predicted else "absent"


def _labels(labels: Array, classes: int, name: str) -> npt.NDArray[np.uint8]:
    if not 2 <= classes <= 256:
        raise ValueError(f"2 to 256 classes are expected, background first, not {classes}")
    if labels.dtype.kind not in "iub":
        raise ValueError(f"labels of the {name} must be integers, not {labels.dtype}")
    if labels.size and (labels.min() < 0 or labels.max() >= classes):
        raise ValueError(
            f"labels of the {name} must be class indices 0 to {classes - 1}, found {labels.min()} to {labels.max()}"
        )
    return np.ascontiguousarray(labels, dtype=np.uint8)


def _same_shape(prediction: Array, truth: Array) -> None:
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction has shape {prediction.shape} but truth has {truth.shape}: they must be equal")


def _spacing(spacing: float | Sequence[float] | None, axes: int) -> FloatArray:
    size = np.ones(axes) if spacing is None else np.broadcast_to(np.asarray(spacing, dtype=np.float64), (axes,))
    if not np.all(np.isfinite(size)) or np.any(size <= 0):
        raise ValueError(f"spacing must be positive in each of {axes} axes, not {spacing}")
    return size
