"""Small pictures of planes: grey image, contours of structures, a box; as PNG of few colours."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mpscl_ray.runs.palette import COLOURS
from mpscl_ray.runs.structures import NOT_ANNOTATED

HATCH = (150, 150, 150)
"""Colour of the hatch over voxels that nobody annotated."""
BOX = (255, 64, 64)
"""Colour of the crop; no structure has it."""

_SIDE = 128
_SLIMMEST = 6
_EXTRA = (*COLOURS[1:], HATCH, BOX)

Box = tuple[float, float, float, float]
"""Top, bottom, left and right edge, in pixels of the plane from its upper left corner."""


@dataclass(frozen=True)
class Plane:
    """What one tile shows, before it is drawn."""

    title: str
    image: NDArray[np.float32]
    """(H, W)."""
    label: NDArray[np.uint8] | None
    """(H, W) class indices."""
    pixel_mm: tuple[float, float]
    """Height and width of a pixel; equal numbers where they are not known."""
    edges: tuple[str, str, str, str]
    """Direction of the patient at the left, right, top and bottom edge: L, R, A, P, I, S, or nothing."""
    window: tuple[float, float] = (0.0, 1.0)
    """Intensities that are black and white."""
    box: Box | None = None


@dataclass(frozen=True)
class Tile:
    """A plane as a PNG, in the proportions of the body, its longer side of a fixed number of pixels."""

    title: str
    png: bytes
    width: int
    height: int
    edges: tuple[str, str, str, str]


def draw(plane: Plane, levels: int) -> Tile:
    """Draw a plane with this number of grey levels: fewer make a smaller file."""
    height, width = _size(plane)
    low, high = plane.window
    scale = np.float32(255.0 / max(high - low, 1e-12))
    grey = np.clip((plane.image - np.float32(low)) * scale, 0, 255).astype(np.uint8)
    resized = Image.fromarray(np.ascontiguousarray(grey)).resize((width, height), Image.Resampling.BILINEAR)
    indices = (np.asarray(resized).astype(np.uint16) * levels >> 8).astype(np.uint8)
    if plane.label is not None:
        label = Image.fromarray(np.ascontiguousarray(plane.label)).resize((width, height), Image.Resampling.NEAREST)
        _contours(indices, np.asarray(label), levels)
    if plane.box is not None:
        _frame(indices, plane, levels)
    return Tile(plane.title, _png(indices, levels), width, height, plane.edges)


def _size(plane: Plane) -> tuple[int, int]:
    """Pixels of the tile; no plane is slimmer than a strip that can be seen."""
    height, width = (count * mm for count, mm in zip(plane.image.shape, plane.pixel_mm, strict=True))
    longer = max(height, width)
    height, width = (max(round(_SIDE * side / longer), _SIDE // _SLIMMEST) for side in (height, width))
    return height, width


def _contours(indices: NDArray[np.uint8], label: NDArray[np.uint8], levels: int) -> None:
    """Draw the outermost pixels of each structure in its colour, and hatch what is not annotated."""
    edge = np.zeros(label.shape, dtype=bool)
    rows, columns = label[1:] != label[:-1], label[:, 1:] != label[:, :-1]
    edge[1:] |= rows
    edge[:-1] |= rows
    edge[:, 1:] |= columns
    edge[:, :-1] |= columns
    unknown = label == NOT_ANNOTATED
    shown = edge & (label > 0) & ~unknown
    indices[shown] = levels + (label[shown] - 1) % (len(COLOURS) - 1)
    diagonal = np.add.outer(np.arange(label.shape[0]), np.arange(label.shape[1])) % 4 == 0
    indices[unknown & (diagonal | edge)] = levels + len(COLOURS) - 1


def _frame(indices: NDArray[np.uint8], plane: Plane, levels: int) -> None:
    assert plane.box is not None
    tall, wide = indices.shape
    top, bottom, left, right = (
        min(max(round(at * size / count), 0), size - 1)
        for at, size, count in zip(plane.box, (tall, tall, wide, wide), np.repeat(plane.image.shape, 2), strict=True)
    )
    value = levels + len(_EXTRA) - 1
    indices[[top, bottom], left : right + 1] = value
    indices[top : bottom + 1, [left, right]] = value


def _png(indices: NDArray[np.uint8], levels: int) -> bytes:
    greys = np.repeat(np.linspace(0, 255, levels).round().astype(np.uint8), 3)
    picture = Image.frombytes("P", indices.shape[::-1], indices.tobytes())
    picture.putpalette(greys.tobytes() + bytes(part for colour in _EXTRA for part in colour))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
