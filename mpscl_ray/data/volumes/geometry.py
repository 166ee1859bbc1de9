"""Where each prepared voxel is in the original array, and the way back.

A prepared volume is (D, H, W): D slices of H rows and W columns. Each of its axes runs along one axis of the original
array, forwards or backwards, in equal steps. Only these steps have to be inverted; `Geometry` holds them as plain
numbers.

Orientation of slices with ``orientation="canonical"``, from the affine alone (x, y, z are the patient's right,
anterior, superior):

=========  =========================  ==========================  ==================================
slices     D, with the slice index    H, from the top row down    W, from the left column on
=========  =========================  ==========================  ==================================
coronal    posterior to anterior      superior to inferior        patient's right to patient's left
axial      inferior to superior       anterior to posterior       patient's right to patient's left
sagittal   left to right              superior to inferior        anterior to posterior
=========  =========================  ==========================  ==================================

So a coronal slice is upright, with the patient's left on the right of the picture, as radiologists view it.
With ``orientation="stored"`` nothing is turned: D is the named array axis, H and W are the other two in their order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.sparse

from mpscl_ray.data.volumes.recipe import PLANES
from mpscl_ray.errors import DataError

FloatArray = npt.NDArray[np.floating[Any]]
LabelArray = npt.NDArray[np.integer[Any]]

PERCENTILES = (5, 25, 50, 75, 95)
"""Percentiles that describe the distribution of intensities of a crop."""
_LETTERS = (("L", "R"), ("P", "A"), ("I", "S"))
_THICK = 2.5
"""Ratio of voxel sizes from which a stack counts as one of thick slices."""


@dataclass(frozen=True)
class Axis:
    """One axis of the prepared volume: sample i is at ``start + step * i``, in original voxels along it."""

    array_axis: int
    """Axis of the original array that it runs along."""
    reverse: bool
    """Whether it runs against the original index. Positions are then counted from the end."""
    length: int
    """Original voxels along it."""
    samples: int
    """Prepared voxels along it."""
    start: float
    """Position of the first sample."""
    step: float
    """Original voxels per prepared voxel."""

    def positions(self) -> npt.NDArray[np.float64]:
        """Position of each sample, in original voxels."""
        return self.start + self.step * np.arange(self.samples, dtype=np.float64)

    def inside(self) -> slice:
        """The samples inside the original volume, which reaches from -0.5 to length - 0.5."""
        positions = self.positions()
        (hits,) = np.nonzero((positions >= -0.5) & (positions < self.length - 0.5))
        return slice(int(hits[0]), int(hits[-1]) + 1) if hits.size else slice(0, 0)

    def is_plain_crop(self) -> bool:
        """Whether every sample is an original voxel: nothing has to be interpolated."""
        return self.step == 1.0 and self.start == round(self.start)


@dataclass(frozen=True)
class Geometry:
    """How a prepared volume was made from the original array: plain numbers that can be stored as JSON."""

    shape: tuple[int, int, int]
    """Shape of the original array."""
    axes: tuple[Axis, Axis, Axis]
    """D, H and W."""
    spacing_mm: tuple[float, float, float]
    """Size of a prepared voxel along D, H and W."""
    presentation: str
    """Orientation of the slices, in words."""
    centre: tuple[float, float, float]
    """Voxel coordinate in the original array that the crop is centred on."""
    centre_from: Literal["labels", "image"]
    """Where the centre was taken from. Labels of a target test volume are a mild leak, to be reported as one."""
    clip_value: float
    """Intensity that brighter voxels were set to."""
    mean: float
    """Mean of the clipped crop, subtracted."""
    standard_deviation: float
    """Standard deviation of the clipped crop, divided by."""
    pad_value: float
    """Prepared value of samples outside the original volume."""
    steps: tuple[str, ...]
    """What was done, in order, in words."""
    percentiles: tuple[float, ...] = ()
    """:data:`PERCENTILES` of the normalised crop; empty in datasets of earlier versions."""

    @property
    def voxel_mm(self) -> tuple[float, float, float]:
        """Voxel size of the original array along its axes."""
        sizes = {axis.array_axis: mm / axis.step for axis, mm in zip(self.axes, self.spacing_mm, strict=True)}
        return sizes[0], sizes[1], sizes[2]

    @property
    def prepared_shape(self) -> tuple[int, int, int]:
        """Shape (D, H, W) of the prepared volume."""
        depth, height, width = self.axes
        return depth.samples, height.samples, width.samples

    @property
    def letters(self) -> str:
        """Direction that each array axis of the original increases to, such as ``"RAS"``; empty if it is not known."""
        found = re.match("orientation ([LRAPIS]{3}):", self.steps[0] if self.steps else "")
        return found[1] if found else ""

    def to_json(self) -> dict[str, Any]:
        """The same as a dictionary of JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Geometry:
        """Inverse of `to_json`, also for values read from JSON text.

        Raises:
            DataError: A field is missing or unknown.
        """
        try:
            axes = [Axis(**axis) for axis in fields["axes"]]
            values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()}
            return cls(**{**values, "axes": tuple(axes)})
        except (KeyError, TypeError) as error:
            raise DataError(
                f"the stored geometry of a volume cannot be read ({error}): expected the fields that this version of "
                f"prepare writes; run prepare again"
            ) from error


def voxel_sizes(affine: FloatArray) -> tuple[float, float, float]:
    """Size in mm of a voxel along each array axis: the lengths of the affine's columns."""
    x, y, z = np.sqrt((np.asarray(affine, dtype=np.float64)[:3, :3] ** 2).sum(axis=0))
    return float(x), float(y), float(z)


def closest_world_axes(affine: FloatArray) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """The world axis nearest to each array axis, and its sense, as (world axis, +1 or -1).

    The affine's shear is removed first (polar decomposition). Then the array axis with the clearest direction chooses
    its world axis first, and so on. These are the letters that viewers print for an image (nibabel's ``aff2axcodes``).

    Args:
        affine: (4, 4), voxel index to RAS+ millimetres, not singular.
    """
    directions = np.asarray(affine, dtype=np.float64)[:3, :3] / np.asarray(voxel_sizes(affine))
    left, _, right = np.linalg.svd(directions)
    rotation = left @ right
    found: dict[int, tuple[int, int]] = {}
    for array_axis in np.argsort(-(rotation**2).max(axis=0), kind="stable"):
        column = rotation[:, array_axis]
        world_axis = int(np.argmax(np.abs(column)))
        found[int(array_axis)] = (world_axis, 1 if column[world_axis] > 0 else -1)
        rotation[world_axis, :] = 0.0
    return found[0], found[1], found[2]


def across_thick_voxels(affine: FloatArray, geometry: Geometry) -> tuple[str, int] | None:
    """That slices run across thick voxels, and the array axis along which those are thick; None if they do not.

    Args:
        affine: (4, 4) of the original array.
        geometry: how slices were made from it.
    """
    sizes = voxel_sizes(affine)
    depth, *in_slice = (axis.array_axis for axis in geometry.axes)
    thick = max(in_slice, key=lambda axis: sizes[axis])
    if sizes[thick] < _THICK * sizes[depth]:
        return None
    said = f"slices run across voxels that are {sizes[thick]:.3g} mm thick, and {sizes[depth]:.3g} mm along them"
    return said, thick


def orientation_letters(affine: FloatArray) -> str:
    """Direction that each array axis increases to, such as ``"RAS"``."""
    return "".join(_LETTERS[world][sense > 0] for world, sense in closest_world_axes(affine))


def plane_axes(affine: FloatArray, plane: str) -> tuple[tuple[int, bool], tuple[int, bool], tuple[int, bool]]:
    """Array axis for D, H and W of a plane, and whether it has to be walked backwards."""
    world = closest_world_axes(affine)
    array_axis_of = {axis: (array_axis, sense) for array_axis, (axis, sense) in enumerate(world)}
    depth, height, width = (
        (array_axis_of[axis][0], array_axis_of[axis][1] != wanted) for axis, wanted in PLANES[plane]
    )
    return depth, height, width


def oriented_view(array: npt.NDArray[Any], axes: Sequence[Axis]) -> npt.NDArray[Any]:
    """The array with its axes in the order and sense of D, H and W; a view, nothing is copied."""
    view = array.transpose([axis.array_axis for axis in axes])
    return view[tuple(slice(None, None, -1 if axis.reverse else 1) for axis in axes)]


def interpolation_matrix(positions: npt.NDArray[np.float64], step: float, length: int) -> scipy.sparse.csr_array:
    """Weights of the original voxels for each sample along one axis.

    w_ij proportional to max(0, 1 - abs(j - x_i) / max(1, step)), each row summing to 1: linear interpolation. For a
    coarser grid the triangle is widened, so that detail below the new spacing is averaged, not aliased.

    Args:
        positions: Samples x_i in original voxels, each within half a voxel of the volume.
        step: Original voxels per sample.
        length: Original voxels along the axis.

    Returns:
        Sparse (samples, length), float32.
    """
    radius = max(1.0, step)
    taps = np.arange(min(2 * int(np.ceil(radius)) + 1, length))
    columns = np.maximum(np.floor(positions - radius), 0.0).astype(np.int64)[:, None] + taps[None, :]
    weights = np.clip(1.0 - np.abs(columns - positions[:, None]) / radius, 0.0, None)
    weights[columns >= length] = 0.0
    weights /= weights.sum(axis=1, keepdims=True)
    rows, taps_used = np.nonzero(weights)
    entries = (weights[rows, taps_used].astype(np.float32), (rows, columns[rows, taps_used]))
    return scipy.sparse.csr_array(entries, shape=(positions.size, length))


def _apply_along(matrix: scipy.sparse.csr_array, volume: npt.NDArray[np.float32], axis: int) -> npt.NDArray[np.float32]:
    front = np.moveaxis(volume, axis, 0)
    product = matrix @ front.reshape(front.shape[0], -1)
    return np.moveaxis(np.asarray(product, dtype=np.float32).reshape(-1, *front.shape[1:]), 0, axis)


def sample_image(image: npt.NDArray[np.float32], axes: Sequence[Axis]) -> npt.NDArray[np.float32]:
    """The samples of an image inside the volume, interpolated linearly.

    Args:
        image: Original array.
        axes: D, H and W.

    Returns:
        The block of samples inside the volume, a new contiguous array; bit-identical voxels if the axes are plain
        crops.

    Raises:
        DataError: The crop misses the volume altogether.
    """
    view = oriented_view(image, axes)
    positions = [axis.positions()[axis.inside()] for axis in axes]
    if any(found.size == 0 for found in positions):
        raise DataError("the crop holds no voxel of the volume; use a larger crop or a larger size")
    for number, axis in enumerate(axes):
        # Cut out the voxels that the samples need before anything is copied or multiplied.
        margin = 0 if axis.is_plain_crop() else int(np.ceil(max(1.0, axis.step)))
        low = max(0, int(np.floor(positions[number][0])) - margin)
        high = min(axis.length, int(np.ceil(positions[number][-1])) + margin + 1)
        view = view[(slice(None),) * number + (slice(low, high),)]
        positions[number] = positions[number] - low
    for number, axis in enumerate(axes):
        if not axis.is_plain_crop():
            matrix = interpolation_matrix(positions[number], axis.step, view.shape[number])
            view = _apply_along(matrix, view, number)
    return np.array(view, dtype=np.float32, order="C", copy=True)


def sample_labels(labels: LabelArray, axes: Sequence[Axis]) -> npt.NDArray[np.uint8]:
    """The labels at the prepared voxels, each from the nearest original voxel; background outside the volume."""
    prepared = np.zeros([axis.samples for axis in axes], dtype=np.uint8)
    inside = [axis.inside() for axis in axes]
    nearest = [
        np.floor(axis.positions()[found] + 0.5).astype(np.int64) for axis, found in zip(axes, inside, strict=True)
    ]
    prepared[tuple(inside)] = oriented_view(labels, axes)[np.ix_(*nearest)]
    return prepared


def _positions_in_prepared(axis: Axis) -> tuple[slice, npt.NDArray[np.float64]]:
    """The original voxels that the prepared samples cover, and the position of each among the samples."""
    positions = (np.arange(axis.length, dtype=np.float64) - axis.start) / axis.step
    (hits,) = np.nonzero((positions >= -0.5) & (positions < axis.samples - 0.5))
    covered = slice(int(hits[0]), int(hits[-1]) + 1) if hits.size else slice(0, 0)
    return covered, positions[covered]


def covered_voxels(geometry: Geometry) -> tuple[slice, slice, slice]:
    """The box of original voxels that the prepared samples cover, along the axes of the array."""
    box = [slice(0)] * 3
    for axis in geometry.axes:
        covered, _ = _positions_in_prepared(axis)
        if axis.reverse:
            covered = slice(axis.length - covered.stop, axis.length - covered.start)
        box[axis.array_axis] = covered
    return box[0], box[1], box[2]


def _check_prepared_shape(found: tuple[int, ...], geometry: Geometry) -> None:
    if found != geometry.prepared_shape:
        raise DataError(
            f"a prediction of shape {found} cannot be restored: its volume was prepared as {geometry.prepared_shape} "
            f"slices, rows and columns; predict every slice of the volume"
        )


def restore_labels(prediction: npt.NDArray[np.uint8], geometry: Geometry) -> npt.NDArray[np.uint8]:
    """Labels of the prepared volume on the grid of the original array: each original voxel takes the nearest sample.

    If preparing only turned and cropped the volume, this is exact, voxel by voxel. Outside the crop is background.

    Args:
        prediction: (D, H, W) class indices.
        geometry: Geometry of the prepared volume.

    Returns:
        Class indices in the shape and order of the original array.

    Raises:
        DataError: The prediction has another shape than the prepared volume.
    """
    _check_prepared_shape(prediction.shape, geometry)
    restored = np.zeros(geometry.shape, dtype=np.uint8)
    covered, positions = zip(*(_positions_in_prepared(axis) for axis in geometry.axes), strict=True)
    nearest = [np.floor(found + 0.5).astype(np.int64) for found in positions]
    oriented_view(restored, geometry.axes)[tuple(covered)] = prediction[np.ix_(*nearest)]
    return restored


def restore_most_probable(probabilities: npt.NDArray[np.float32], geometry: Geometry) -> npt.NDArray[np.uint8]:
    """The most probable class at each original voxel, from probabilities interpolated linearly.

    Smoother outlines than `restore_labels` if the prepared grid is coarser than the original, otherwise the same. Ties
    go to the lower class. Only one class is in memory at a time.

    Args:
        probabilities: (C, D, H, W).
        geometry: Geometry of the prepared volume.

    Returns:
        Class indices in the shape and order of the original array; background outside the crop.

    Raises:
        DataError: The probabilities have another shape than the prepared volume.
    """
    _check_prepared_shape(probabilities.shape[1:], geometry)
    restored = np.zeros(geometry.shape, dtype=np.uint8)
    covered, positions = zip(*(_positions_in_prepared(axis) for axis in geometry.axes), strict=True)
    best: npt.NDArray[np.float32] | None = None
    winner = oriented_view(restored, geometry.axes)[tuple(covered)]
    for index, volume in enumerate(probabilities):
        here: npt.NDArray[np.float32] = volume.astype(np.float32, copy=False)
        for number, axis in enumerate(geometry.axes):
            matrix = interpolation_matrix(positions[number], 1.0 / axis.step, axis.samples)
            here = _apply_along(matrix, here, number)
        if best is None:
            best = here
            continue
        better = here > best
        winner[better] = index
        np.maximum(best, here, out=best)
    return restored
