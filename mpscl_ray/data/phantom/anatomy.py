"""Anatomy of the phantom: a random thorax with a heart.

Every patient is a list of solid parts in millimetres (RAS: +x right, +y anterior, +z superior; origin in the heart),
painted in order. A part has a tissue and a label of MM-WHS; :mod:`mpscl_ray.data.phantom.imaging` defines how a tissue
looks. The order in which random numbers are drawn is fixed: it decides which patient a seed gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpscl_ray.data.phantom.imaging import Tissue
from mpscl_ray.data.phantom.shapes import Cut, Ellipsoid, Field, Solid, Tube

Floats = NDArray[np.float32]
Point = tuple[float, float, float]

MYO, LAC, LVC, AA, RA, RV, PA = 205, 420, 500, 820, 550, 600, 850
"""Label ids of MM-WHS 2017: myocardium of the left ventricle, left atrium, left ventricle, ascending aorta, right
atrium, right ventricle, pulmonary artery."""

LABEL_IDS = (MYO, LAC, LVC, AA, RA, RV, PA)


@dataclass(frozen=True)
class Part:
    """A solid of one tissue; ``label`` is its MM-WHS id or 0; a later part covers the earlier ones."""

    tissue: Tissue
    solid: Solid
    label: int = 0


def anatomy(rng: np.random.Generator) -> list[Part]:
    """A random adult thorax as parts in painting order.

    Sizes are drawn around normal adult end-diastolic values: left ventricle 45 mm wide and 85 mm long, wall 9 mm (7 to
    12), left atrium 38 x 52 mm, ascending aorta 32 mm, with about 10 % spread, and a pose of +-8 degrees.
    """
    return _thorax(rng) + _heart(rng)


def _vary(rng: np.random.Generator, spread: float) -> float:
    """Random factor around 1, at most twice the spread away from it."""
    return float(np.clip(rng.normal(1, spread), 1 - 2 * spread, 1 + 2 * spread))


# ------------------------------------------------------------------------------------------------------- thorax


@dataclass(frozen=True)
class _Chest:
    """The rib cage: an elliptic cylinder along z. All lengths in mm."""

    width: float
    """Semi-axis of its inside along x."""
    depth: float
    """Semi-axis of its inside along y."""
    middle: float
    """y of its axis."""
    wall: float
    """Thickness of ribs and muscles."""
    rib_gap: float
    rib_phase: float
    rib_slope: float

    def surface(self, grow: float) -> Callable[[Floats, Floats, Floats], Floats]:
        """Distance function of the inside, grown on all sides."""
        width, depth = np.float32(self.width + grow), np.float32(self.depth + grow)

        def distance(x: Floats, y: Floats, z: Floats) -> Floats:
            radius = np.sqrt((x / width) ** 2 + ((y - self.middle) / depth) ** 2)
            result: Floats = ((radius - 1) * depth).astype(np.float32)
            return result

        return distance

    def ribs(self, x: Floats, y: Floats, z: Floats) -> Floats:
        """Distance to the ribs: sloped rings in the middle of the wall."""
        radial = self.surface(0.45 * self.wall)(x, y, z)
        height = np.mod(z - np.float32(self.rib_slope) * y + np.float32(self.rib_phase), np.float32(self.rib_gap))
        height = height - self.rib_gap / 2
        result: Floats = (np.sqrt((radial * 1.3) ** 2 + height**2) - 6).astype(np.float32)
        return result

    def below_dome(self, x0: float, top: float, reach: float) -> Callable[[Floats, Floats, Floats], Floats]:
        """Distance function of the space below one dome of the diaphragm."""

        def distance(x: Floats, y: Floats, z: Floats) -> Floats:
            fall = ((x - x0) ** 2 + 1.3 * (y - self.middle) ** 2) / np.float32(reach)
            inside = self.surface(-1)(x, y, z)
            result: Floats = np.maximum(z - top + fall, inside).astype(np.float32) * np.float32(0.8)
            return result

        return distance


def _thorax(rng: np.random.Generator) -> list[Part]:
    width, depth = 132 * _vary(rng, 0.05), 88 * _vary(rng, 0.05)
    middle = -12.0 + rng.normal(0, 3)
    wall, fat = 16 * _vary(rng, 0.15), 12 * _vary(rng, 0.3)  # fat under the skin
    rib_gap, rib_phase, rib_slope = 27 * _vary(rng, 0.06), rng.uniform(0, 27), rng.uniform(0.25, 0.45)
    chest = _Chest(width, depth, middle, wall, rib_gap, rib_phase, rib_slope)
    dome = -52 + rng.normal(0, 5)
    dome_left = dome - rng.uniform(6, 16)
    spine = np.array([rng.normal(0, 3), middle - depth + 2, 0.0])
    descending = np.array([-20 + rng.normal(0, 3), spine[1] + 24, 0.0])
    parts = [
        Part(Tissue.FAT, Field(chest.surface(wall + fat))),
        Part(Tissue.MUSCLE, Field(chest.surface(wall))),
        Part(Tissue.BONE, Field(chest.ribs)),
        Part(Tissue.LUNG, Field(chest.surface(0))),
        *_lung_vessels(rng),
    ]
    mediastinum = (44 * _vary(rng, 0.08), 0.92 * depth, 400.0)
    upright = np.eye(3)
    oesophagus = descending + np.array([[16, 2, 160], [10, 6, -160]])
    aorta = descending + np.array([[0, 0, -160], [0, 0, 88]])
    return [
        *parts,
        Part(Tissue.FAT, Ellipsoid(np.array([-3.0, middle, 0]), mediastinum, upright)),
        Part(Tissue.LIVER, Field(chest.below_dome(48, dome, 260.0))),
        Part(Tissue.STOMACH, Field(chest.below_dome(-62, dome_left, 170.0))),
        Part(Tissue.BONE, Tube(spine + np.array([[0, 0, -160], [0, 0, 160]]), (19.0, 17.0))),
        Part(Tissue.BONE, Ellipsoid(np.array([0, middle + depth + 3, 25.0]), (17, 7, 75), upright)),  # sternum
        Part(Tissue.MUSCLE, Tube(oesophagus, (7.0, 7.0))),
        Part(Tissue.DESCENDING, Tube(aorta, (10.5, 12.0))),
    ]


def _lung_vessels(rng: np.random.Generator) -> list[Part]:
    """Vessels that fan out from each hilum."""
    parts = []
    for side in (-1, 1):
        for angle in rng.uniform(-1.2, 1.2, size=6):
            start = np.array([side * 35.0, -28, 25 * np.sin(angle)])
            end = start + np.array([side * 60 * np.cos(angle), rng.uniform(-30, 45), 75 * np.sin(angle)])
            parts.append(Part(Tissue.PULMONARY, Tube(np.stack([start, end]), (4.5, 1.5))))
    return parts


# -------------------------------------------------------------------------------------------------------- heart


@dataclass(frozen=True)
class _Frame:
    """Pose of the heart in the body: p -> scale * rotation @ p."""

    rotation: NDArray[np.float64]
    scale: float

    def point(self, *p: float) -> NDArray[np.float64]:
        result: NDArray[np.float64] = self.scale * self.rotation @ np.asarray(p, float)
        return result

    def ellipsoid(self, centre: Point, radii: Point, axes: NDArray[np.float64]) -> Ellipsoid:
        a, b, c = (self.scale * r for r in radii)
        return Ellipsoid(self.point(*centre), (a, b, c), self.rotation @ axes)

    def tube(self, points: list[Point], radii: list[float]) -> Tube:
        return Tube(np.stack([self.point(*p) for p in points]), tuple(self.scale * r for r in radii))


def _rotation(degrees: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rotation about x, then y, then z."""
    a, b, c = np.deg2rad(degrees)
    rx = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    ry = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    rz = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    result: NDArray[np.float64] = rz @ ry @ rx
    return result


def _along(direction: Point, up: Point) -> NDArray[np.float64]:
    """Orthonormal axes (columns) whose first is ``direction``."""
    first = np.asarray(direction, float) / np.linalg.norm(direction)
    third = np.cross(first, up)
    third /= np.linalg.norm(third)
    return np.stack([first, np.cross(third, first), third], axis=1)


@dataclass(frozen=True)
class _Chamber:
    """A chamber of the heart, in the frame of the heart."""

    frame: _Frame
    centre: Point
    radii: Point
    axes: NDArray[np.float64]

    def grown(self, grow: float) -> Ellipsoid:
        """The chamber, its semi-axes longer by ``grow`` mm."""
        a, b, c = self.radii
        return self.frame.ellipsoid(self.centre, (a + grow, b + grow, c + grow), self.axes)


class _HeartDraws:
    """Random lengths and points of one heart, in mm."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def length(self, mean: float, spread: float = 0.08) -> float:
        return mean * _vary(self.rng, spread)

    def point(self, *mean: float) -> Point:
        a, b, c = (v + float(self.rng.normal(0, 1.5)) for v in mean)
        return a, b, c


@dataclass(frozen=True)
class _Heart:
    """Shape of one heart, drawn at random."""

    frame: _Frame
    left_ventricle: _Chamber
    wall: float
    """Thickness of the left myocardium."""
    right_ventricle: _Chamber
    right_atrium: _Chamber
    left_atrium: _Chamber
    aorta: list[Point]
    """From its root on."""
    aorta_radii: list[float]
    pulmonary: tuple[Point, Point, Point, Point]
    """Outflow of the right ventricle, valve, trunk and fork of the pulmonary artery."""
    fat: float


def _draw_heart(draw: _HeartDraws) -> _Heart:
    rng, length, point = draw.rng, draw.length, draw.point
    frame = _Frame(_rotation(np.clip(rng.normal(0, 6, 3), -12, 12)), length(1.0, 0.05))
    axis = (-0.62 + rng.normal(0, 0.05), 0.50 + rng.normal(0, 0.05), -0.60 + rng.normal(0, 0.06))
    long, short, wall = length(45), length(22.5), length(9.5, 0.12)
    left_ventricle = _Chamber(frame, point(-20, -1, -12), (long, short, short), _along(axis, (0, 0, 1)))
    rv_centre, rv_radii = point(12, 24, -13), (length(46), length(30), length(31))
    ra_centre, ra_radii = point(43, -2, 3), (length(22), length(25), length(29))
    la_centre, la_radii = point(3, -35, 20), (length(29), length(19), length(25))
    aorta = [point(8, -3, 20), point(13, 5, 40), point(20, 6, 60), point(14, 0, 76)]
    aorta_radii = [length(15, 0.07), length(16.5, 0.1), length(16, 0.08), length(15, 0.07)]
    pulmonary = point(-4, 34, 22), point(-14, 28, 36), point(-17, 12, 54), point(-16, -10, 62)
    fat = length(6, 0.3)
    tilt = _rotation(rng.normal(0, 8, 3))
    return _Heart(
        frame=frame,
        left_ventricle=left_ventricle,
        wall=wall,
        right_ventricle=_Chamber(frame, rv_centre, rv_radii, _along((-0.55, 0.42, -0.72), (0, 0, 1))),
        right_atrium=_Chamber(frame, ra_centre, ra_radii, np.eye(3)),
        left_atrium=_Chamber(frame, la_centre, la_radii, tilt),
        aorta=aorta,
        aorta_radii=aorta_radii,
        pulmonary=pulmonary,
        fat=fat,
    )


def _heart(rng: np.random.Generator) -> list[Part]:
    draw = _HeartDraws(rng)
    heart = _draw_heart(draw)
    parts = [*_fat(heart), *_veins(heart, draw), *_right_heart(heart, draw), *_left_heart(heart)]
    arch = [heart.aorta[3], draw.point(-6, -22, 86), draw.point(-20, -46, 80)]
    return [
        *parts,
        Part(Tissue.DESCENDING, heart.frame.tube(arch, [14.5, 13.0, 12.0])),
        Part(Tissue.AORTA, heart.frame.tube(heart.aorta, heart.aorta_radii), AA),
    ]


def _fat(heart: _Heart) -> list[Part]:
    """Fat around chambers and great arteries."""
    solids = (
        heart.left_ventricle.grown(heart.wall + heart.fat),
        heart.left_atrium.grown(heart.fat),
        heart.right_ventricle.grown(heart.fat + 3),
        heart.right_atrium.grown(heart.fat),
        heart.frame.tube(heart.aorta, [radius + 6 for radius in heart.aorta_radii]),
        heart.frame.tube([*heart.pulmonary], [21.0, 20.0, 20.0, 18.0]),
    )
    return [Part(Tissue.FAT, solid) for solid in solids]


def _veins(heart: _Heart, draw: _HeartDraws) -> list[Part]:
    """Both venae cavae and four pulmonary veins."""
    tube, point = heart.frame.tube, draw.point
    parts = [
        Part(Tissue.VENA_CAVA, tube([point(40, -4, 20), point(38, -3, 110)], [10.0, 9.0])),
        Part(Tissue.RIGHT_ATRIUM, tube([point(34, -14, -10), point(30, -20, -110)], [13.0, 12.0])),
    ]
    centre, radii = heart.left_atrium.centre, heart.left_atrium.radii
    for side, height in ((-1, 26), (-1, 10), (1, 26), (1, 10)):
        lateral = centre[0] + side * 0.75 * radii[0]
        vein = [(lateral, centre[1], height), point(side * 52, -44, height + (8 if height > 20 else -6))]
        parts.append(Part(Tissue.LEFT_ATRIUM, tube(vein, [8.0, 5.5])))
    return parts


def _right_heart(heart: _Heart, draw: _HeartDraws) -> list[Part]:
    tube, point = heart.frame.tube, draw.point
    outflow, valve, trunk, fork = heart.pulmonary
    return [
        Part(Tissue.MYOCARDIUM, heart.right_ventricle.grown(3)),
        Part(Tissue.RIGHT_ATRIUM, heart.right_atrium.grown(0), RA),
        Part(Tissue.RIGHT_VENTRICLE, heart.right_ventricle.grown(0), RV),
        Part(Tissue.RIGHT_VENTRICLE, tube([point(4, 28, 4), outflow, valve], [19.0, 15.0, 13.0]), RV),
        Part(Tissue.PULMONARY, tube([valve, trunk, fork], [13.5, draw.length(14), 13.0]), PA),
        Part(Tissue.PULMONARY, tube([fork, point(-44, -30, 58)], [11.0, 8.0]), PA),
        Part(Tissue.PULMONARY, tube([fork, point(10, -20, 56), point(48, -28, 50)], [11.0, 10.5, 8.0]), PA),
    ]


def _left_heart(heart: _Heart) -> list[Part]:
    """Left atrium, and the left ventricle below the mitral plane with papillary muscles and outflow tract."""
    frame, ventricle = heart.frame, heart.left_ventricle
    centre, axes, (long, short, _) = np.asarray(ventricle.centre), ventricle.axes, ventricle.radii
    base = centre - 0.72 * long * axes[:, 0]  # mitral plane
    valve, toward_atrium = frame.point(*base), frame.rotation @ -axes[:, 0]
    parts = [
        Part(Tissue.LEFT_ATRIUM, heart.left_atrium.grown(0), LAC),
        Part(Tissue.MYOCARDIUM, Cut(ventricle.grown(heart.wall), valve, toward_atrium), MYO),
        Part(Tissue.LEFT_VENTRICLE, Cut(ventricle.grown(0), valve + 2 * toward_atrium, toward_atrium), LVC),
    ]
    for side in (-1, 1):  # papillary muscles: part of the ventricle's label, as in MM-WHS
        end = centre + axes @ np.array([0.45 * long, side * 0.55 * short, -0.2 * short])
        start = end - axes @ np.array([22.0, side * 2.0, 0.0])
        tips = [(float(p[0]), float(p[1]), float(p[2])) for p in (start, end)]
        parts.append(Part(Tissue.MYOCARDIUM, frame.tube(tips, [3.0, 4.5]), LVC))
    x, y, z = base + axes @ np.array([8, 6, 0]) + np.array([4, 0, 0])
    parts.append(Part(Tissue.LEFT_VENTRICLE, frame.tube([(x, y, z), heart.aorta[0]], [12.0, 13.0]), LVC))
    return parts
