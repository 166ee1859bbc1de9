"""The scores of one label map against another, as arrays or files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.data.volumes.label_maps import whole_ids
from mpscl_ray.data.volumes.nifti import Volume, read_label
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.evaluate.metrics import StructureScore, left_out_where, volume_scores

_MOST_LABELS = NOT_ANNOTATED - 1
_GRID_TOLERANCE = 0.01
"""Largest distance between the corners of two equal grids, as part of the smallest voxel size."""

Ids = npt.NDArray[np.int64]


def score(
    prediction: npt.ArrayLike | Path | str,
    label: npt.ArrayLike | Path | str,
    *,
    spacing: float | Sequence[float] | None = None,
    class_names: Sequence[str] | Mapping[str, int] | None = None,
    ignore_label: int | None = None,
) -> dict[str, StructureScore]:
    """Score each structure of a label map: Dice, average surface distance (ASD), 95th percentile (HD95).

    Args:
        prediction: label map, (X, Y, Z) or any number of axes; or a file: NIfTI, NRRD or MetaImage.
        label: the true one on the same grid; or a file: NIfTI, NRRD or MetaImage.
        spacing: voxel size in mm along each axis of the arrays. None: distances are known in voxels only, and those in
            mm are NaN. Files bring their own.
        class_names: names by label value, background first, as :attr:`TrainedSegmenter.class_names`. Or the value of
            each structure, as :attr:`TrainedSegmenter.label_values`; other values are background then. None: every
            value but 0 that occurs in either is a structure, and its name is the value.
        ignore_label: value of voxels of the label that nobody annotated, 255 in prepared datasets: they are background
            in both.

    Returns:
        Structure -> its scores: ``dice`` (0 to 1), ``asd_mm``, ``hd95_mm``, ``asd_voxel`` and the others of
        :class:`StructureScore`. A distance is NaN where the structure is missing in one of the two.

    Raises:
        ConfigError: one is a file and the other an array, files with a spacing, or a spacing that is none.
        DataError: shapes or grids differ, or values are NaN, not whole, or none of the classes.
    """
    if isinstance(prediction, str | Path) and isinstance(label, str | Path):
        if spacing is not None:
            raise ConfigError(f"spacing is {spacing}, but files have their own; leave it out")
        predicted, true, spacing = _read(Path(prediction), Path(label))
    elif isinstance(prediction, str | Path) or isinstance(label, str | Path):
        raise ConfigError("prediction and label are an array and a file; expected two arrays or two files")
    else:
        predicted, true = _whole(prediction, "prediction"), _whole(label, "label")
        if predicted.shape != true.shape:
            raise DataError(f"the prediction has shape {predicted.shape} and the label {true.shape}; expected the same")
    if ignore_label is not None:
        predicted, true = left_out_where(true == ignore_label, predicted, true)
    predicted, true, names = _class_indices(predicted, true, class_names)
    sizes = _spacing(spacing, predicted.ndim)
    return {row.structure: row for row in volume_scores(predicted, true, names, sizes)}


def _class_indices(
    predicted: Ids, true: Ids, class_names: Sequence[str] | Mapping[str, int] | None
) -> tuple[Ids, Ids, Sequence[str]]:
    """Both label maps as class indices, and the names of the classes, background first."""
    if class_names is None:
        class_names = _values_found(predicted, true)
        if predicted.any() and true.any() and not np.intersect1d(predicted[predicted != 0], true).size:
            raise DataError(
                f"the prediction has the values {_some(predicted)} and the label {_some(true)}, none of them in both; "
                "give both the same label values"
            )
    if isinstance(class_names, Mapping):
        if predicted.any() and not np.isin(predicted, list(class_names.values())).any():
            raise DataError(
                f"the prediction has the values {_some(predicted)}, and none of them is in class_names "
                f"({', '.join(f'{name}: {value}' for name, value in class_names.items())}); give its own label values"
            )
        predicted, true = _indices(predicted, class_names), _indices(true, class_names)
        class_names = ("background", *class_names)
    if len(class_names) < 2:
        raise ConfigError(f"class_names has {len(class_names)} names; expected the background and at least a structure")
    for name, array in (("prediction", predicted), ("label", true)):
        if array.size and not 0 <= array.min() <= array.max() < len(class_names):
            raise DataError(
                f"the {name} has values {array.min()} to {array.max()}; expected 0 to {len(class_names) - 1} for the "
                f"classes {', '.join(class_names)}"
            )
    return predicted, true, class_names


def same_grid(first: Volume, second: Volume) -> bool:
    """Whether two volumes have the same shape, and the same place in space but for the noise of stored numbers."""
    if first.array.shape != second.array.shape:
        return False
    corners = np.array(np.meshgrid(*([0.0, n - 1.0] for n in first.array.shape), [1.0])).reshape(4, -1)
    moved = np.linalg.norm(((first.affine - second.affine) @ corners)[:3], axis=0).max()
    return bool(moved <= _GRID_TOLERANCE * min(second.spacing_mm))


def _read(prediction: Path, label: Path) -> tuple[Ids, Ids, tuple[float, float, float]]:
    predicted, true = read_label(prediction), read_label(label)
    if predicted.array.shape != true.array.shape:
        raise DataError(
            f"{prediction} has shape {predicted.array.shape} and {label} {true.array.shape}; expected the same grid"
        )
    if not same_grid(predicted, true):
        raise DataError(
            f"the affines of {prediction} and {label} differ by up to "
            f"{np.abs(predicted.affine - true.affine).max():.3g} mm; expected the same grid, resample one to the other"
        )
    return predicted.array.astype(np.int64), true.array.astype(np.int64), true.spacing_mm


def _whole(values: npt.ArrayLike, name: str) -> Ids:
    array = np.asarray(values)
    if array.dtype.kind not in "iufb" or array.ndim == 0:
        raise DataError(f"the {name} is {array.dtype} of shape {array.shape}; expected an array of label values")
    if array.dtype.kind == "f":
        whole, good = whole_ids(array.astype(np.float64))
        if not good.all():
            wrong = array[~good].flat[0]
            raise DataError(f"the {name} has the value {wrong:g}; expected whole numbers, as label maps have")
        array = whole
    return array.astype(np.int64)


def _values_found(predicted: Ids, true: Ids) -> dict[str, int]:
    """The values that occur but 0, each under its own name."""
    values = np.setdiff1d(np.union1d(predicted, true), [0])
    if not len(values):
        raise DataError("prediction and label are 0 everywhere, so there is no structure to score; give class_names")
    if values[0] < 0 or len(values) > _MOST_LABELS:
        raise DataError(
            f"prediction and label have {len(values)} values but 0, from {values[0]} to {values[-1]}; expected 1 to "
            f"{_MOST_LABELS} structures with values above 0"
        )
    return {str(value): int(value) for value in values}


def _some(array: Ids) -> str:
    """The first values of a label map but 0."""
    values = np.unique(array[array != 0])
    return ", ".join(map(str, values[:6])) + (", ..." if len(values) > 6 else "")


def _indices(array: Ids, values: Mapping[str, int]) -> Ids:
    """The number of each voxel's structure, from 1 on; 0 for every other value."""
    indices = np.zeros_like(array)
    for index, value in enumerate(values.values(), start=1):
        indices[array == value] = index
    return indices


def _spacing(spacing: float | Sequence[float] | None, axes: int) -> list[float] | None:
    if spacing is None:
        return None
    try:
        sizes = np.broadcast_to(np.asarray(spacing, dtype=np.float64), (axes,))
    except (TypeError, ValueError):
        sizes = np.zeros(axes)
    if not (np.isfinite(sizes) & (sizes > 0)).all():
        raise ConfigError(f"spacing is {spacing}; expected a size in mm above 0 for each of {axes} axes")
    return [float(size) for size in sizes]
