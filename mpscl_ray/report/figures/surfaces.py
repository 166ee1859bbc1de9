"""Structures of whole volumes as shaded surfaces, after Fig. 7: each ray shows the first smoothed mask that it hits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.ndimage
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mpscl_ray.report.figures.style import class_colours, class_legend, image_grid, wrapped

VIEWS = {"from the front": (25.0, 20.0), "from behind": (205.0, 20.0)}
"""Title -> azimuth and elevation in degrees; at (0, 0) the first slice is in front and the first row on top."""

_SIZE = 200
"""Rays per side of the image."""
_LIGHT = np.array([-0.45, 0.55, -0.7])
"""Direction of the light in camera axes: right, up, into the scene."""
_SMOOTH = 0.9
"""Standard deviation of the smoothing, in voxels of the largest spacing."""

_BORDER = 3
"""Voxels of background around a volume."""

Box = tuple[NDArray[np.float64], NDArray[np.float64]]


def surfaces(
    volumes: Mapping[str, NDArray[np.uint8]], classes: Sequence[str], spacing: tuple[float, float, float]
) -> Figure:
    """Rows: :data:`VIEWS`. Columns: label volumes (D, H, W) of one case by title, all at the same scale.

    Args:
        volumes: title -> label map; all have the same shape, and one at least has a structure.
        classes: names, background first.
        spacing: of the voxels (slice, row, column); any unit.
    """
    box = _bounds(list(volumes.values()), spacing)
    masks = [_smooth_masks(labels, len(classes), spacing) for labels in volumes.values()]
    images = np.array([[render(own, spacing, box, *view) for own in masks] for view in VIEWS.values()])
    rows, columns = _filled(images.min(axis=(0, 1, 4)))
    images = images[:, :, rows, columns]
    figure, axes = image_grid(len(VIEWS), len(volumes), (1.7, 1.7 * images.shape[2] / images.shape[3]))
    for row, name in enumerate(VIEWS):
        axes[row, 0].set_ylabel(name, fontsize=7)
        for tile, image, labels in zip(axes[row], images[row], volumes.values(), strict=True):
            tile.imshow(image, interpolation="bilinear")
            if not labels.any():
                tile.text(0.5, 0.5, "no structure", transform=tile.transAxes, ha="center")
    for tile, title in zip(axes[0], volumes, strict=True):
        tile.set_title(wrapped(title))
    class_legend(figure, classes)
    return figure


def _filled(image: NDArray[np.float64]) -> tuple[slice, slice]:
    """The part of a grey image that is not white, with a small margin."""
    rows, columns = (np.flatnonzero((image < 1).any(axis=axis)) for axis in (1, 0))
    if not len(rows):  # structures so small that nothing of them is left after the smoothing
        return slice(None), slice(None)
    return slice(max(rows[0] - 4, 0), rows[-1] + 5), slice(max(columns[0] - 4, 0), columns[-1] + 5)


def render(
    masks: Mapping[int, NDArray[np.float32]],
    spacing: tuple[float, float, float],
    box: Box,
    azimuth: float,
    elevation: float,
    size: int = _SIZE,
) -> NDArray[np.float64]:
    """The surfaces as an RGB image (size, size, 3) in [0, 1] on white.

    Args:
        masks: class -> smoothed mask with :data:`_BORDER` voxels around it; the surface is where it crosses 0.5.
        spacing: of the voxels (slice, row, column).
        box: smallest and largest corner, in the unit of the spacing, of what all views show.
        azimuth: degrees around the vertical axis.
        elevation: degrees above the horizon.
        size: rays per side, and samples along each.
    """
    low, high = box
    step = float(np.linalg.norm(high - low)) / size
    right, up, forward = _camera(azimuth, elevation)
    # From a sample (depth, row, column of the image) to a voxel (slice, row, column).
    matrix = np.stack([forward, -up, right], axis=1) * step / np.asarray(spacing)[:, None]
    offset = (low + high) / 2 / np.asarray(spacing) + _BORDER - matrix @ np.full(3, (size - 1) / 2)
    nearest = np.full((size, size), np.inf)
    image = np.ones((size, size, 3))
    colours = class_colours(max(masks, default=0) + 1) / 255
    hits: dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
    for index, mask in masks.items():
        depth, normals = np.full((size, size), np.inf), np.zeros((size, size, 3))
        start, stop = _in_view(mask, matrix, offset, size)
        if (stop > start).all():
            field = scipy.ndimage.affine_transform(
                mask, matrix, offset + matrix @ start, tuple(stop - start), order=1, output=np.float32
            )
            rows, columns = slice(start[1], stop[1]), slice(start[2], stop[2])
            depth[rows, columns], normals[rows, columns] = _first_hits(field)
            depth += start[0]
        hits[index] = depth, normals
    depths = [depth[np.isfinite(depth)] for depth, _ in hits.values()]
    front = min((float(depth.min()) for depth in depths if len(depth)), default=0.0)
    back = max((float(depth.max()) for depth in depths if len(depth)), default=1.0)
    for index, (depth, normals) in hits.items():
        seen = depth < nearest
        fog = 1 - 0.3 * (depth[seen] - front) / max(back - front, 1e-6)
        image[seen] = _shaded(colours[index], normals[seen]) * fog[:, None] + 0.92 * (1 - fog[:, None])
        nearest[seen] = depth[seen]
    return image.clip(0, 1)


def _in_view(
    mask: NDArray[np.float32], matrix: NDArray[np.float64], offset: NDArray[np.float64], size: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """First and last samples (depth, row, column), the last plus one, at which a ray can hit a structure."""
    (box,) = scipy.ndimage.find_objects((mask > 0.05).astype(np.uint8))
    corners = np.array(list(itertools.product(*((part.start - 1, part.stop) for part in box))))
    samples = (corners - offset) @ np.linalg.inv(matrix).T
    low, high = np.floor(samples.min(axis=0)), np.ceil(samples.max(axis=0)) + 1
    return low.clip(0, size).astype(np.intp), high.clip(0, size).astype(np.intp)


def _camera(azimuth: float, elevation: float) -> NDArray[np.float64]:
    """Directions right, up and into the scene, each along (slice, row, column) of the volume."""
    a, e = math.radians(azimuth), math.radians(elevation)
    # World axes: x along the columns, y along the slices, z against the rows.
    forward = np.array([-math.sin(a) * math.cos(e), math.cos(a) * math.cos(e), -math.sin(e)])
    right = np.array([math.cos(a), math.sin(a), 0.0])
    directions = np.stack([right, np.cross(right, forward), forward])
    return np.stack([directions[:, 1], -directions[:, 2], directions[:, 0]], axis=1)


def _first_hits(field: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Depth (rows, columns) at which each ray first reaches 0.5, infinite where it does not, and the normals there."""
    inside = field >= 0.5
    first = inside.argmax(axis=0)
    rows, columns = np.indices(first.shape)
    hit = inside[first, rows, columns]
    before = np.maximum(first - 1, 0)
    here, there = field[first, rows, columns], field[before, rows, columns]
    part = np.divide(here - 0.5, here - there, out=np.zeros_like(here), where=(here - there) > 1e-6)
    depth = np.where(hit, first - part, np.inf)
    normals = np.zeros((*first.shape, 3))
    last = np.array(field.shape) - 1
    for axis, sign in ((2, -1.0), (1, 1.0), (0, -1.0)):
        ahead, behind = [first, rows, columns], [first, rows, columns]
        ahead[axis] = np.minimum(ahead[axis] + 1, last[axis])
        behind[axis] = np.maximum(behind[axis] - 1, 0)
        normals[..., 2 - axis] = sign * (field[tuple(ahead)] - field[tuple(behind)])
    length = np.linalg.norm(normals, axis=2, keepdims=True)
    return depth, normals / np.maximum(length, 1e-6)


def _shaded(colour: NDArray[np.float64], normals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Diffuse light, some ambient light, and a soft highlight."""
    light = _LIGHT / np.linalg.norm(_LIGHT)
    halfway = light + np.array([0.0, 0.0, -1.0])
    halfway /= np.linalg.norm(halfway)
    diffuse = (normals @ light).clip(0, 1)[:, None]
    highlight = (normals @ halfway).clip(0, 1)[:, None] ** 25
    shade: NDArray[np.float64] = colour * (0.42 + 0.66 * diffuse) + 0.22 * highlight
    return shade


def _smooth_masks(
    labels: NDArray[np.uint8], num_classes: int, spacing: tuple[float, float, float]
) -> dict[int, NDArray[np.float32]]:
    """A smoothed mask of each structure present, smoothed equally in all directions."""
    sigma = [_SMOOTH * max(spacing) / size for size in spacing]
    masks = {}
    for index in range(1, num_classes):
        mask = labels == index
        if mask.any():
            # The border closes structures that reach the edge of the volume.
            padded = np.pad(mask, _BORDER).astype(np.float32)
            masks[index] = scipy.ndimage.gaussian_filter(padded, sigma, mode="constant", truncate=3)
    return masks


def _bounds(volumes: Sequence[NDArray[np.uint8]], spacing: tuple[float, float, float]) -> Box:
    """Corners of all structures of all volumes, with a margin."""
    shown = np.any([volume > 0 for volume in volumes], axis=0)
    corners = np.array([(np.flatnonzero(shown.any(axis=tuple({0, 1, 2} - {axis})))[[0, -1]]) for axis in range(3)])
    return (corners[:, 0] - 2.0) * np.asarray(spacing), (corners[:, 1] + 2.0) * np.asarray(spacing)
