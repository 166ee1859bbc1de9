"""Scores of one label volume: Dice and surface distances; an empty mask is a named case and never a number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.evaluate.surface_distance import (
    Array,
    FloatArray,
    SurfaceDistances,
    Surfaces,
    average,
    distances_between,
    find_surfaces,
    percentile_95,
    require_same_shape,
    voxel_size,
)

Scalar = TypeVar("Scalar", bound=np.generic)
CaseKind = Literal["ok", "missed", "false_alarm", "absent"]
"""``ok``: in truth and prediction; ``missed``: in the truth only; ``false_alarm``: in the prediction only; ``absent``:
in neither."""
RELEASED_BATCH = 32
"""Slices per batch in the evaluation of the MPSCL authors, which drops the last ``D mod 32`` slices of a volume."""


@dataclass(frozen=True)
class StructureScore:
    """How well one structure is segmented in one volume.

    Distances are NaN if they are undefined (``missed``, ``false_alarm``, ``absent``, or no spacing for those in mm).
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
    require_same_shape(prediction, truth)
    p = prediction != 0 if label is None else prediction == label
    t = truth != 0 if label is None else truth == label
    total = int(np.count_nonzero(p)) + int(np.count_nonzero(t))
    return 2.0 * int(np.count_nonzero(p & t)) / total if total else math.nan


def left_out_where(
    mask: npt.NDArray[np.bool_], prediction: npt.NDArray[Scalar], truth: npt.NDArray[Scalar]
) -> tuple[npt.NDArray[Scalar], npt.NDArray[Scalar]]:
    """Both label maps with background where a mask is true, so that nothing there counts; the same ones if nowhere."""
    if not mask.any():
        return prediction, truth
    predicted, true = prediction.copy(), truth.copy()
    predicted[mask] = true[mask] = 0
    return predicted, true


def volume_scores(
    prediction: Array,
    truth: Array,
    classes: Sequence[str],
    spacing_mm: Sequence[float] | None,
    connectivity: int = 1,
) -> list[StructureScore]:
    """Score every structure of one volume. Voxels that are not annotated are background in both label maps.

    Args:
        prediction: class indices (D, H, W), or any number of axes.
        truth: class indices of the same shape, or ``NOT_ANNOTATED``.
        classes: names of all classes; index 0 is the background, which is not scored.
        spacing_mm: voxel size per axis in mm, or None if it is unknown (distances in mm are then NaN).
        connectivity: which neighbours make a voxel part of the surface, as in
            ``scipy.ndimage.generate_binary_structure``: 1 is face neighbours. Outside the volume is background.

    Returns:
        One score per class from 1 on, in the order of ``classes``.

    Raises:
        ValueError: the shapes differ, the spacing does not fit them, or a label is not an index into ``classes``.
    """
    require_same_shape(prediction, truth)
    prediction, truth = left_out_where(truth == NOT_ANNOTATED, prediction, truth)
    p, t = _labels(prediction, len(classes), "prediction"), _labels(truth, len(classes), "truth")
    size = None if spacing_mm is None else voxel_size(spacing_mm, p.ndim)
    diagonal_voxel = math.dist(p.shape, [0] * p.ndim)
    diagonal_mm = math.nan if size is None else float(np.linalg.norm(np.array(p.shape) * size))
    surfaces = find_surfaces(p, t, connectivity)
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
                hd95_mm=percentile_95(mm),
                asd_mm_worst_case=diagonal_mm if wrong else asd_mm,
                asd_voxel_worst_case=diagonal_voxel if wrong else asd_voxel,
                predicted_voxels=n_p,
                truth_voxels=n_t,
            )
        )
    return scores


def released_protocol_scores(prediction: Array, truth: Array, classes: Sequence[str]) -> list[StructureScore]:
    """Score a volume as the evaluation of the MPSCL authors does, only for comparison with published numbers.

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
        distance = score.asd_voxel_mean_of_means if score.case_kind == "ok" else 1.0
        scores.append(
            replace(
                score,
                dice=0.0 if score.case_kind == "absent" else score.dice,
                asd_voxel=distance,
                asd_voxel_mean_of_means=distance,
                asd_voxel_worst_case=math.nan,
            )
        )
    return scores


def _distances_in_both_units(
    surfaces: Surfaces, index: int, spacing_mm: FloatArray | None
) -> tuple[SurfaceDistances, SurfaceDistances]:
    """Distances of one structure in voxels and in mm; empty if a mask is empty, or without a spacing those in mm."""
    points_p, points_t = surfaces.prediction(index), surfaces.truth(index)
    voxel = distances_between(points_p, points_t, np.ones(points_p.shape[1]))
    if spacing_mm is None:
        return voxel, SurfaceDistances(np.empty(0), np.empty(0))
    if np.all(spacing_mm == spacing_mm[0]):
        return voxel, SurfaceDistances(voxel.from_prediction * spacing_mm[0], voxel.from_truth * spacing_mm[0])
    return voxel, distances_between(points_p, points_t, spacing_mm)


def _case_kind(predicted: int, true: int) -> CaseKind:
    if predicted and true:
        return "ok"
    if true:
        return "missed"
    return "false_alarm" if predicted else "absent"


def _labels(labels: Array, classes: int, name: str) -> npt.NDArray[np.uint8]:
    if not 2 <= classes <= NOT_ANNOTATED:
        raise ValueError(f"2 to {NOT_ANNOTATED} classes are expected, background first, not {classes}")
    if labels.dtype.kind not in "iub":
        raise ValueError(f"labels of the {name} must be integers, not {labels.dtype}")
    if labels.size and (labels.min() < 0 or labels.max() >= classes):
        raise ValueError(
            f"labels of the {name} must be class indices 0 to {classes - 1}, found {labels.min()} to {labels.max()}"
        )
    return np.ascontiguousarray(labels, dtype=np.uint8)
