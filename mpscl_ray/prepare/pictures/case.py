"""What the page shows of one case: its planes, and the numbers by which it is compared with the others.

It is made where the case is read, while its voxels are in memory; only a few kilobytes leave that process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mpscl_ray.data.dataset import Case, Scaling
from mpscl_ray.data.scaling import unscale
from mpscl_ray.data.slice_selection import evenly_spaced
from mpscl_ray.data.volumes.geometry import Axis, Geometry, oriented_view
from mpscl_ray.prepare.pictures.tiles import Plane, Tile, draw
from mpscl_ray.runs.structures import NOT_ANNOTATED

COARSE = 12
"""Side of the cube that a case is reduced to."""

_SLICES = 3
_BYTES = 42_000
"""Most bytes of all PNGs of a case; about a third more on the page."""
_GREY_LEVELS = (32, 16, 8, 4)
_SAMPLE = 32
"""Most voxels looked at along each axis."""
_OPPOSITE = dict(zip("LRAPIS", "RLPASI", strict=True)) | {"": ""}


@dataclass(frozen=True)
class CasePicture:
    """Tiles and numbers of a case."""

    tiles: tuple[Tile, ...]
    quantiles: NDArray[np.float32]
    """(101,) intensities as stored in the image, from the 0th to the 100th percentile of the crop."""
    coarse: NDArray[np.float32]
    """(12, 12, 12) block means of the prepared volume, whatever its size."""
    letters: str
    """Direction that each array axis of the image increases to, such as RAS; empty for slices."""
    voxel_mm: tuple[float, float, float] | None
    """Size of a voxel of the image along D, H and W."""
    extent: tuple[float, ...]
    """Size of the image along D, H and W in mm; of slices their number, height and width."""


def picture(
    image: NDArray[np.float32],
    label: NDArray[np.uint8] | None,
    geometry: Geometry | None,
    spacing_mm: tuple[float, float, float] | None,
    original: NDArray[np.float32] | None = None,
) -> CasePicture:
    """Picture of a case.

    Args:
        image: prepared slices (D, H, W), z-scored if there is a geometry.
        label: class indices (D, H, W), or None.
        geometry: of the volume; None for slices that were prepared by their publisher.
        spacing_mm: size of a prepared voxel.
        original: the whole image in the order of its file, where it is in memory.
    """
    inside = tuple(axis.inside() for axis in geometry.axes) if geometry else (slice(None),) * 3
    quantiles = np.percentile(_sampled(image[inside], _SAMPLE), np.arange(101)).astype(np.float32)
    slices, rows, columns = _labelled(label, image.shape)
    chosen = [int(index) for index in evenly_spaced(slices, _SLICES)]
    middle = int(rows[rows.size // 2]), int(columns[columns.size // 2])
    planes = _planes(image, label, chosen, middle, _directions(geometry), spacing_mm or (1.0, 1.0, 1.0))
    window = (float(quantiles[1]), float(quantiles[99]))
    tiles = [replace(plane, window=window) for plane in planes]
    voxel_mm, extent = None, tuple(float(count) for count in image.shape)
    if geometry is not None:
        quantiles = quantiles * np.float32(geometry.standard_deviation) + np.float32(geometry.mean)
        depth, height, width = (mm / axis.step for mm, axis in zip(geometry.spacing_mm, geometry.axes, strict=True))
        voxel_mm = (depth, height, width)
        extent = tuple(axis.length * mm for mm, axis in zip(voxel_mm, geometry.axes, strict=True))
        if original is not None:
            tiles.append(_whole_slice(original, geometry, chosen[len(chosen) // 2], voxel_mm))
    return CasePicture(_drawn(tiles), quantiles, _coarse(image), geometry.letters if geometry else "", voxel_mm, extent)


def picture_of_prepared(
    case: Case, image: NDArray[np.float32], label: NDArray[np.uint8] | None, scaling: Scaling
) -> CasePicture:
    """Picture of a case of a finished dataset, whose image is not at hand; ``image`` is scaled to [-1, 1]."""
    geometry = Geometry.from_json(case.geometry) if case.geometry else None
    return picture(unscale(image, scaling.low, scaling.high), label, geometry, case.spacing_mm)


def _sampled(image: NDArray[np.float32], number: int) -> NDArray[np.float32]:
    """Evenly spaced voxels, at most this number along each axis."""
    return image[tuple(slice(None, None, -(-count // number)) for count in image.shape)]


def _labelled(label: NDArray[np.uint8] | None, shape: tuple[int, ...]) -> list[NDArray[np.intp]]:
    """Slices, rows and columns that show a structure; all of them where nothing is labelled."""
    everything = [np.arange(count) for count in shape]
    if label is None:
        return everything
    # Background becomes the highest number, what is not annotated the second highest: a minimum is ten times as fast
    # as comparisons.
    shifted = label - np.uint8(1)
    rows_columns = shifted.min(axis=0)
    lowest = shifted.reshape(len(label), -1).min(axis=1), rows_columns.min(axis=1), rows_columns.min(axis=0)
    found = [np.flatnonzero(minima < NOT_ANNOTATED - 1) for minima in lowest]
    return found if found[0].size else everything


def _directions(geometry: Geometry | None) -> tuple[str, str, str]:
    """Direction of the patient that D, H and W increase to; empty where it is not known."""
    if geometry is None or not geometry.letters:
        return "", "", ""
    depth, height, width = (
        _OPPOSITE[geometry.letters[axis.array_axis]] if axis.reverse else geometry.letters[axis.array_axis]
        for axis in geometry.axes
    )
    return depth, height, width


def _planes(
    image: NDArray[np.float32],
    label: NDArray[np.uint8] | None,
    chosen: Sequence[int],
    middle: tuple[int, int],
    directions: tuple[str, str, str],
    spacing_mm: tuple[float, float, float],
) -> list[Plane]:
    """The chosen slices, and cuts across all slices at a row and a column, which show whether these fit together."""
    depth, height, width = directions
    d_mm, h_mm, w_mm = spacing_mm
    planes = [
        Plane(
            f"slice {index + 1} of {len(image)}",
            image[index],
            None if label is None else label[index],
            (h_mm, w_mm),
            edges=(_OPPOSITE[width], width, _OPPOSITE[height], height),
        )
        for index in chosen
    ]
    if len(image) < 2:
        return planes
    row, column = middle
    # The last slice is on top of one cut and at the left of the other: cuts of coronal and axial slices are then
    # seen as usual.
    across, along = image[::-1, row], image[::-1, :, column].T
    return [
        *planes,
        Plane(
            f"across the slices, row {row + 1}",
            across,
            None if label is None else label[::-1, row],
            (d_mm, w_mm),
            edges=(_OPPOSITE[width], width, depth, _OPPOSITE[depth]),
        ),
        Plane(
            f"across the slices, column {column + 1}",
            along,
            None if label is None else label[::-1, :, column].T,
            (h_mm, d_mm),
            edges=(depth, _OPPOSITE[depth], _OPPOSITE[height], height),
        ),
    ]


def _whole_slice(
    original: NDArray[np.float32], geometry: Geometry, index: int, voxel_mm: tuple[float, float, float]
) -> Plane:
    """The slice of the image that a prepared one comes from, uncropped, with the crop as a box."""
    depth, height, width = geometry.axes
    at = min(max(round(depth.start + depth.step * index), 0), depth.length - 1)
    plane = oriented_view(original, geometry.axes)[at]
    low, high = np.percentile(_sampled(plane, 4 * _SAMPLE), (1, 99))
    _, down, right = _directions(geometry)
    return Plane(
        f"image, slice {at + 1} of {depth.length}, and the crop",
        plane,
        None,
        voxel_mm[1:],
        edges=(_OPPOSITE[right], right, _OPPOSITE[down], down),
        window=(float(low), float(high)),
        box=(*_borders(height), *_borders(width)),
    )


def _borders(axis: Axis) -> tuple[float, float]:
    """Where the prepared samples begin and end, in original voxels from the border of the image."""
    first = axis.start + 0.5 - axis.step / 2
    return first, first + axis.step * axis.samples


def _drawn(planes: Sequence[Plane]) -> tuple[Tile, ...]:
    """All tiles, with as many grey levels as the size allows."""
    tiles: tuple[Tile, ...] = ()
    for levels in _GREY_LEVELS:
        tiles = tuple(draw(plane, levels) for plane in planes)
        if sum(len(tile.png) for tile in tiles) <= _BYTES:
            break
    return tiles


def _coarse(image: NDArray[np.float32]) -> NDArray[np.float32]:
    cube = _sampled(image, _SAMPLE)
    for axis in range(3):
        edges = np.linspace(0, cube.shape[axis], COARSE + 1).astype(int)
        counts = np.maximum(np.diff(edges), 1)
        summed = np.add.reduceat(cube, np.minimum(edges[:-1], cube.shape[axis] - 1), axis=axis)
        cube = np.divide(summed, counts.reshape([-1 if other == axis else 1 for other in range(3)]), dtype=np.float32)
    return cube
