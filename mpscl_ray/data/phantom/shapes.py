"""Solids of the phantom as signed distances: negative inside, in millimetres, RAS coordinates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Ellipsoid:
    """Ellipsoid with semi-axes ``radii`` along the columns of ``axes``."""

    centre: NDArray[np.float64]
    radii: tuple[float, float, float]
    axes: NDArray[np.float64]

    def distance(self, x: Floats, y: Floats, z: Floats) -> Floats:
        """Signed distance in mm, first order at the surface: k0 (k0 - 1) / k1, k0 = |p/r|, k1 = |p/r^2|."""
        k0 = np.zeros(np.broadcast_shapes(x.shape, y.shape, z.shape), np.float32)
        k1 = np.zeros_like(k0)
        for axis, radius in zip(self.axes.T.astype(np.float32), self.radii, strict=True):
            offset = np.float32(axis @ self.centre)
            u: Floats = (axis[0] * x + axis[1] * y + axis[2] * z - offset) / np.float32(radius)
            u *= u
            k0 += u
            k1 += u / np.float32(radius**2)
        np.sqrt(k0, out=k0)
        np.sqrt(k1, out=k1)
        distance: Floats = (k0 * (k0 - 1) / np.maximum(k1, np.float32(1e-6))).astype(np.float32, copy=False)
        return distance

    def bounds(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Corners of its bounding box."""
        half = np.sqrt(((self.axes * np.asarray(self.radii)) ** 2).sum(axis=1))
        return self.centre - half, self.centre + half


@dataclass(frozen=True)
class Tube:
    """Round tube along a polyline, its radius interpolated between the points."""

    points: NDArray[np.float64]
    radii: tuple[float, ...]

    def distance(self, x: Floats, y: Floats, z: Floats) -> Floats:
        """Signed distance to the surface in mm."""
        best: Floats | None = None
        for a, b, ra, rb in zip(self.points[:-1], self.points[1:], self.radii[:-1], self.radii[1:], strict=True):
            d = (b - a).astype(np.float32)
            px, py, pz = (c - np.float32(v) for c, v in zip((x, y, z), a, strict=True))
            t = np.clip((px * d[0] + py * d[1] + pz * d[2]) / np.float32(d @ d), 0, 1)
            gap = np.sqrt((px - t * d[0]) ** 2 + (py - t * d[1]) ** 2 + (pz - t * d[2]) ** 2)
            gap -= np.float32(ra) + t * np.float32(rb - ra)
            best = gap if best is None else np.minimum(best, gap)
        assert best is not None
        return best

    def bounds(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Corners of its bounding box."""
        reach = max(self.radii)
        return self.points.min(axis=0) - reach, self.points.max(axis=0) + reach


@dataclass(frozen=True)
class Cut:
    """The part of ``solid`` with (p - point) . normal < 0, e.g. a ventricle below its valve plane."""

    solid: Ellipsoid
    point: NDArray[np.float64]
    normal: NDArray[np.float64]

    def distance(self, x: Floats, y: Floats, z: Floats) -> Floats:
        """Signed distance to the surface in mm."""
        n = self.normal.astype(np.float32)
        plane = n[0] * x + n[1] * y + n[2] * z - np.float32(self.normal @ self.point)
        result: Floats = np.maximum(self.solid.distance(x, y, z), plane)
        return result

    def bounds(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Corners of its bounding box."""
        return self.solid.bounds()


@dataclass(frozen=True)
class Field:
    """An unbounded solid given by its distance function, e.g. the chest wall or the ribs."""

    function: Callable[[Floats, Floats, Floats], Floats]

    def distance(self, x: Floats, y: Floats, z: Floats) -> Floats:
        """Signed distance to the surface in mm."""
        return self.function(x, y, z)

    def bounds(self) -> None:
        """None: it has no bounding box."""
        return None


Solid = Ellipsoid | Tube | Cut | Field
