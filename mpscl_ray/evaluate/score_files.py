"""The scores of one predicted label map against a label, as files, each with its own ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.data.volumes.label_maps import check_segment_names, map_labels
from mpscl_ray.data.volumes.nifti import Volume, read_label
from mpscl_ray.data.volumes.recipe import GeometryFrom
from mpscl_ray.errors import DataError
from mpscl_ray.evaluate.doubtful_pairs import Overlap, overlap
from mpscl_ray.evaluate.file_pairs import Pair
from mpscl_ray.evaluate.medpy_check import Comparison, compare_with_medpy
from mpscl_ray.evaluate.metrics import StructureScore, left_out_where, volume_scores
from mpscl_ray.evaluate.score import same_grid

_TABLE_LIMIT = 1 << 20
_PIECE = 1 << 22
_MANY_IDS = 36
"""More ids without a name than this are looked at: an atlas of the body, or an image?"""
_MOST_IDS = 254


@dataclass(frozen=True)
class ScoreOptions:
    """How label maps are scored."""

    classes: tuple[str, ...]
    """Structures, background first."""
    label_index: Mapping[int, int]
    """Id in labels -> index of its structure."""
    prediction_index: Mapping[int, int]
    """The same in predictions."""
    ignored: int | None
    """Id in labels whose voxels count nowhere."""
    resample: bool
    """Whether a prediction on another grid is brought to that of its label; otherwise it is refused."""
    cross_check: bool
    """Whether medpy computes the measures too."""
    geometry: GeometryFrom | None = None
    """Which part of a header is right; None refuses headers that contradict themselves."""
    assume_spacing_mm: tuple[float, float, float] | None = None
    """Voxel size of files without a usable geometry; None refuses them."""


@dataclass(frozen=True)
class PairScores:
    """The scores of one pair, or why there are none."""

    scores: tuple[StructureScore, ...] = ()
    shape: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    label_ids: frozenset[int] = frozenset()
    """Ids that occur in the label."""
    prediction_ids: frozenset[int] = frozenset()
    """Ids that occur in the prediction."""
    ignored_voxels: int = 0
    resampled: bool = False
    notices: tuple[str, ...] = ()
    """Warnings on the label file."""
    comparisons: tuple[Comparison, ...] = ()
    overlap: Overlap = field(default_factory=Overlap)
    """Overlap of structures with ids of the prediction; nothing where it was resampled."""
    equal: bool = False
    """Whether prediction and label show the same structures, and some, in every voxel."""
    prediction_sha256: str = ""
    error: str = ""
    """Why the pair cannot be scored."""


def score_pair(options: ScoreOptions, pair: Pair) -> PairScores:
    """Score the structures of one pair on the grid of its label; a file that cannot be scored becomes an error."""
    try:
        return _score(options, pair)
    except DataError as error:
        return PairScores(error=str(error))


def _score(options: ScoreOptions, pair: Pair) -> PairScores:
    prediction, label = (
        read_label(path, assume_spacing_mm=options.assume_spacing_mm, geometry=options.geometry)
        for path in (pair.prediction, pair.label)
    )
    for volume, table in ((prediction, options.prediction_index), (label, options.label_index)):
        check_segment_names(volume.path, volume.segments, options.classes, table)
    label_ids, prediction_ids = present_ids(label.array), present_ids(prediction.array)
    index = dict(options.label_index) | ({} if options.ignored is None else {options.ignored: NOT_ANNOTATED})
    _refuse_image(prediction, prediction_ids - set(options.prediction_index))
    _refuse_image(label, label_ids - set(index))
    predicted = _indices(prediction, prediction_ids, options.prediction_index)
    true = _indices(label, label_ids, index)
    resampled = not same_grid(prediction, label)
    if resampled:
        _refuse_grid(prediction, label, options.resample)
        predicted = resample_nearest(predicted, prediction.affine, label.array.shape, label.affine)
    ignored = true == NOT_ANNOTATED
    predicted, true = left_out_where(ignored, predicted, true)
    scores = volume_scores(predicted, true, options.classes, label.spacing_mm)
    return PairScores(
        scores=tuple(scores),
        shape=label.array.shape,
        spacing_mm=label.spacing_mm,
        label_ids=label_ids,
        prediction_ids=prediction_ids,
        ignored_voxels=int(np.count_nonzero(ignored)),
        resampled=resampled,
        notices=label.notices,
        overlap=Overlap() if resampled else overlap(prediction.array, true, ignored),
        equal=bool(true.any() and np.array_equal(predicted, true)),
        prediction_sha256=prediction.sha256 if prediction_ids - {0} else pair.case,
        comparisons=compare_with_medpy(predicted, true, scores, label.spacing_mm) if options.cross_check else (),
    )


def present_ids(array: npt.NDArray[np.integer[Any]]) -> frozenset[int]:
    """The ids that occur in a label map."""
    if not array.size:
        return frozenset()
    flat = array.reshape(-1, order="A")
    low, high = int(flat.min()), int(flat.max())
    if high - low >= _TABLE_LIMIT:
        return frozenset(np.unique(flat).tolist())
    found = np.zeros(high - low + 1, dtype=bool)
    for start in range(0, flat.size, _PIECE):
        found[flat[start : start + _PIECE].astype(np.int64) - low] = True
    return frozenset((np.flatnonzero(found) + low).tolist())


def _refuse_image(volume: Volume, unknown: frozenset[int]) -> None:
    """Refuse an image: it has more ids than any atlas, or many ids without an area of their own."""
    if len(unknown) <= _MANY_IDS:
        return
    at = np.isin(volume.array, list(unknown))
    inside = at[1:] & at[:-1]
    alike = np.count_nonzero(inside & (volume.array[1:] == volume.array[:-1]))
    if len(unknown) > _MOST_IDS or alike < np.count_nonzero(inside) / 2:
        low, high = min(unknown), max(unknown)
        raise DataError(
            f"{volume.path} looks like an image, not a label map: {len(unknown)} values from {low} to {high} that the "
            "table of ids does not name; give the label map"
        )


def _refuse_grid(prediction: Volume, label: Volume, resample: bool) -> None:
    """Refuse two grids that differ, unless they can be resampled: both headers are right and they overlap."""
    grids = f"{prediction.path} is not on the grid of {label.path}: {_grid(prediction)} and {_grid(label)}"
    if prediction.array.shape == label.array.shape:
        for one, other in ((prediction, label), (label, prediction)):
            if _is_default(one) and not _is_default(other):
                raise DataError(
                    f"{grids}; the shape is the same, so the header of {one.path} was probably lost; write it again "
                    f"with the header of {other.path}"
                )
    if not resample:
        raise DataError(f"{grids}; export it on the grid of the label, or give --resample nearest")
    everywhere = np.broadcast_to(np.uint8(1), prediction.array.shape)
    if not resample_nearest(everywhere, prediction.affine, label.array.shape, label.affine).any():
        raise DataError(f"{grids}; they do not overlap, so there is nothing to resample; correct the wrong header")


def _is_default(volume: Volume) -> bool:
    """Whether the affine has voxel sizes alone, without position, as programs write that do not know the geometry."""
    return bool(np.array_equal(volume.affine, np.diag(np.diag(volume.affine))))


def _indices(volume: Volume, ids: frozenset[int], index: Mapping[int, int]) -> npt.NDArray[np.uint8]:
    """The structure of each voxel; background where its id has none."""
    return map_labels(volume.array, index, ids - set(index), volume.path)[0]


def resample_nearest(
    labels: npt.NDArray[np.uint8],
    affine: npt.NDArray[np.float64],
    shape: tuple[int, ...],
    onto: npt.NDArray[np.float64],
) -> npt.NDArray[np.uint8]:
    """Labels on another grid: each voxel takes the label at its centre; outside the volume is background.

    Args:
        labels: class indices with three axes.
        affine: (4, 4), voxel index of ``labels`` to millimetres.
        shape: of the other grid.
        onto: its affine.
    """
    result = np.zeros(shape, dtype=np.uint8)
    transform = np.linalg.solve(affine, onto)
    plane = np.stack(np.meshgrid(*map(np.arange, shape[1:]), indexing="ij"), axis=-1).astype(np.float64)
    across = plane @ transform[:3, 1:3].T + transform[:3, 3]
    for index in range(shape[0]):  # A plane at a time: coordinates take far more memory than labels.
        nearest = np.floor(np.round(across + index * transform[:3, 0], 6) + 0.5).astype(np.int64)
        inside = ((nearest >= 0) & (nearest < labels.shape)).all(axis=-1)
        result[index][inside] = labels[tuple(nearest[inside].T)]
    return result


def _grid(volume: Volume) -> str:
    rows = "; ".join(" ".join(f"{value:.6g}" for value in row) for row in volume.affine[:3])
    return f"shape {volume.array.shape}, affine [{rows}]"
