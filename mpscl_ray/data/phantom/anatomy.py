"""Phantom hearts: random thorax anatomies, rendered as MR-like or CT-like volumes with their label maps.

Every patient is a list of solid parts in millimetres (RAS: +x right, +y anterior, +z superior; origin in the heart),
painted one over the other on the grid of the scan. A part carries a tissue and a label of MM-WHS; what a tissue looks
like is the business of ``phantom_imaging``. All randomness comes from (seed, modality, case number), so that a case
does not change when others are added, and no MR patient is a CT patient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mpscl_ray.data.phantom.imaging import CtScan, MrScan, Tissue
from mpscl_ray.data.phantom.shapes import Cut, Ellipsoid, Field, Solid, Tube

Modality = Literal["mr", "ct"]
Floats = NDArray[np.float32]

MYO, LAC, LVC, AA, RA, RV, PA = 205, 420, 500, 820, 550, 600, 850
"""Label ids of MM-WHS 2017: myocardium of the left ventricle, left atrium, left ventricle, ascending aorta, right
atrium, right ventricle, pulmonary artery."""

LABEL_IDS = (MYO, LAC, LVC, AA, RA, RV, PA)

_MODALITY_KEY: dict[Modality, int] = {"mr": 1, "ct": 2}
# Array orders of real scans: axial, coronal and sagittal acquisitions, each with the signs scanners write.
_ORIENTATIONS: dict[Modality, tuple[str, ...]] = {
    "ct": ("LPS", "RAS", "LAS", "LPI"),
    "mr": ("LIP", "PIR", "LPS", "RSA", "ASL", "LIA"),
}


@dataclass(frozen=True)
class PhantomCase:
    """One scan.

    image: signal (MR, arbitrary units, >= 0) or Hounsfield units (CT), int16, array order of the scan.
    label: MM-WHS ids, uint16, same shape.       affine: (4, 4), voxel index to RAS millimetres.
    """

    modality: Modality
    number: int
    image: NDArray[np.int16]
    label: NDArray[np.uint16]
    affine: NDArray[np.float64]


@dataclass(frozen=True)
class Part:
    """A solid of one tissue; ``label`` is its MM-WHS id or 0; a later part covers the earlier ones."""

    tissue: Tissue
    solid: Solid
    label: int = 0


@dataclass(frozen=True)
class _Frame:
    """Pose of the heart in the body: p -> scale * rotation @ p."""

    rotation: NDArray[np.float64]
    scale: float

    def point(self, *p: float) -> NDArray[np.float64]:
        result: NDArray[np.float64] = self.scale * self.rotation @ np.asarray(p, float)
        return result

    def ellipsoid(
        self, centre: tuple[float, float, float], radii: tuple[float, float, float], axes: NDArray[np.float64]
    ) -> Ellipsoid:
        a, b, c = (self.scale * r for r in radii)
        return Ellipsoid(self.point(*centre), (a, b, c), self.rotation @ axes)

    def tube(self, points: list[tuple[float, float, float]], radii: list[float]) -> Tube:
        return Tube(np.stack([self.point(*p) for p in points]), tuple(self.scale * r for r in radii))


def _rotation(degrees: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rotation about x, then y, then z."""
    a, b, c = np.deg2rad(degrees)
    rx = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    ry = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    rz = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    result: NDArray[np.float64] = rz @ ry @ rx
    return result


def _along(direction: tuple[float, float, float], up: tuple[float, float, float]) -> NDArray[np.float64]:
    """Orthonormal axes (columns) whose first is ``direction``."""
    first = np.asarray(direction, float) / np.linalg.norm(direction)
    third = np.cross(first, up)
    third /= np.linalg.norm(third)
    return np.stack([first, np.cross(third, first), third], axis=1)


def anatomy(rng: np.random.Generator) -> list[Part]:
    """A random adult thorax as parts in painting order.

    Sizes are drawn around normal adult end-diastolic values: left ventricle 45 mm wide and 85 mm long, wall 9 mm (7 to
    12), left atrium 38 x 52 mm, ascending aorta 32 mm, with about 10 % spread, and a pose of +-8 degrees.
    """
    return _thorax(rng) + _heart(rng)


def _thorax(rng: np.random.Generator) -> list[Part]:
    def jitter(spread: float) -> float:
        return float(np.clip(rng.normal(1, spread), 1 - 2 * spread, 1 + 2 * spread))

    width, depth = 132 * jitter(0.05), 88 * jitter(0.05)  # inside of the rib cage, semi-axes
    middle = -12.0 + rng.normal(0, 3)
    wall, fat = 16 * jitter(0.15), 12 * jitter(0.3)  # ribs and muscles; fat under the skin
    rib_gap, rib_phase, rib_slope = 27 * jitter(0.06), rng.uniform(0, 27), rng.uniform(0.25, 0.45)
    dome = -52 + rng.normal(0, 5)
    dome_left = dome - rng.uniform(6, 16)

    def chest(grow: float) -> Callable[[Floats, Floats, Floats], Floats]:
        def distance(x: Floats, y: Floats, z: Floats) -> Floats:
            radius = np.sqrt((x / np.float32(width + grow)) ** 2 + ((y - middle) / np.float32(depth + grow)) ** 2)
            result: Floats = ((radius - 1) * np.float32(depth + grow)).astype(np.float32)
            return result

        return distance

    def ribs(x: Floats, y: Floats, z: Floats) -> Floats:
        radial = chest(0.45 * wall)(x, y, z)
        height = np.mod(z - np.float32(rib_slope) * y + np.float32(rib_phase), np.float32(rib_gap)) - rib_gap / 2
        result: Floats = (np.sqrt((radial * 1.3) ** 2 + height**2) - 6).astype(np.float32)
        return result

    def diaphragm(x0: float, top: float, reach: float) -> Callable[[Floats, Floats, Floats], Floats]:
        def distance(x: Floats, y: Floats, z: Floats) -> Floats:
            fall = ((x - x0) ** 2 + 1.3 * (y - middle) ** 2) / np.float32(reach)
            result: Floats = np.maximum(z - top + fall, chest(-1)(x, y, z)).astype(np.float32) * np.float32(0.8)
            return result

        return distance

    upright = np.eye(3)
    spine = np.array([rng.normal(0, 3), middle - depth + 2, 0.0])
    descending = np.array([-20 + rng.normal(0, 3), spine[1] + 24, 0.0])

    def beside(middle_line: NDArray[np.float64], *away: float) -> NDArray[np.float64]:
        result: NDArray[np.float64] = middle_line + np.asarray(away)
        return result

    parts = [
        Part(Tissue.FAT, Field(chest(wall + fat))),
        Part(Tissue.MUSCLE, Field(chest(wall))),
        Part(Tissue.BONE, Field(ribs)),
        Part(Tissue.LUNG, Field(chest(0))),
    ]
    for side in (-1, 1):  # vessels fanning out from each hilum
        for angle in rng.uniform(-1.2, 1.2, size=6):
            start = np.array([side * 35.0, -28, 25 * np.sin(angle)])
            end = start + np.array([side * 60 * np.cos(angle), rng.uniform(-30, 45), 75 * np.sin(angle)])
            parts.append(Part(Tissue.PULMONARY, Tube(np.stack([start, end]), (4.5, 1.5))))
    mediastinum = (44 * jitter(0.08), 0.92 * depth, 400.0)
    parts += [
        Part(Tissue.FAT, Ellipsoid(np.array([-3.0, middle, 0]), mediastinum, upright)),
        Part(Tissue.LIVER, Field(diaphragm(48, dome, 260.0))),
        Part(Tissue.STOMACH, Field(diaphragm(-62, dome_left, 170.0))),
        Part(Tissue.BONE, Tube(np.stack([beside(spine, 0, 0, -160), beside(spine, 0, 0, 160)]), (19.0, 17.0))),
        Part(Tissue.BONE, Ellipsoid(np.array([0, middle + depth + 3, 25.0]), (17, 7, 75), upright)),
        Part(
            Tissue.MUSCLE,  # oesophagus
            Tube(np.stack([beside(descending, 16, 2, 160), beside(descending, 10, 6, -160)]), (7.0, 7.0)),
        ),
        Part(
            Tissue.DESCENDING,
            Tube(np.stack([beside(descending, 0, 0, -160), beside(descending, 0, 0, 88)]), (10.5, 12.0)),
        ),
    ]
    return parts


def _heart(rng: np.random.Generator) -> list[Part]:
    def around(mean: float, spread: float = 0.08) -> float:
        return mean * float(np.clip(rng.normal(1, spread), 1 - 2 * spread, 1 + 2 * spread))

    def at(*p: float) -> tuple[float, float, float]:
        a, b, c = (v + float(rng.normal(0, 1.5)) for v in p)
        return a, b, c

    frame = _Frame(_rotation(np.clip(rng.normal(0, 6, 3), -12, 12)), around(1.0, 0.05))
    axis = (-0.62 + rng.normal(0, 0.05), 0.50 + rng.normal(0, 0.05), -0.60 + rng.normal(0, 0.06))
    lv_axes = _along(axis, (0, 0, 1))
    long, short, wall = around(45), around(22.5), around(9.5, 0.12)
    centre = at(-20, -1, -12)
    base = np.asarray(centre) - 0.72 * long * lv_axes[:, 0]  # mitral plane
    valve, toward_atrium = frame.point(*base), frame.rotation @ -lv_axes[:, 0]

    def ventricle(grow: float) -> Ellipsoid:
        return frame.ellipsoid(centre, (long + grow, short + grow, short + grow), lv_axes)

    def point(along: float, right: float, up: float) -> tuple[float, float, float]:
        a, b, c = base + lv_axes @ np.array([along, up, 0]) + np.array([right, 0, 0])
        return a, b, c

    rv_axes = _along((-0.55, 0.42, -0.72), (0, 0, 1))
    rv_centre, rv_radii = at(12, 24, -13), (around(46), around(30), around(31))
    ra_centre, ra_radii = at(43, -2, 3), (around(22), around(25), around(29))
    la_centre, la_radii = at(3, -35, 20), (around(29), around(19), around(25))
    root, ascent = at(8, -3, 20), [at(13, 5, 40), at(20, 6, 60), at(14, 0, 76)]
    aorta = [around(15, 0.07), around(16.5, 0.1), around(16, 0.08), around(15, 0.07)]
    outflow, valve_pa, trunk, fork = at(-4, 34, 22), at(-14, 28, 36), at(-17, 12, 54), at(-16, -10, 62)
    fat = around(6, 0.3)
    upright = np.eye(3)
    tilt = _rotation(rng.normal(0, 8, 3))

    def atrium(grow: float) -> Ellipsoid:
        return frame.ellipsoid(la_centre, (la_radii[0] + grow, la_radii[1] + grow, la_radii[2] + grow), tilt)

    def right(grow: float) -> Ellipsoid:
        return frame.ellipsoid(rv_centre, (rv_radii[0] + grow, rv_radii[1] + grow, rv_radii[2] + grow), rv_axes)

    def right_atrium(grow: float) -> Ellipsoid:
        return frame.ellipsoid(ra_centre, (ra_radii[0] + grow, ra_radii[1] + grow, ra_radii[2] + grow), upright)

    parts = [
        Part(Tissue.FAT, solid) for solid in (ventricle(wall + fat), atrium(fat), right(fat + 3), right_atrium(fat))
    ]
    parts += [
        Part(Tissue.FAT, frame.tube([root, *ascent], [r + 6 for r in aorta])),
        Part(Tissue.FAT, frame.tube([outflow, valve_pa, trunk, fork], [21.0, 20.0, 20.0, 18.0])),
        Part(Tissue.VENA_CAVA, frame.tube([at(40, -4, 20), at(38, -3, 110)], [10.0, 9.0])),
        Part(Tissue.RIGHT_ATRIUM, frame.tube([at(34, -14, -10), at(30, -20, -110)], [13.0, 12.0])),
    ]
    for side, height in ((-1, 26), (-1, 10), (1, 26), (1, 10)):
        lateral = la_centre[0] + side * 0.75 * la_radii[0]
        vein = [(lateral, la_centre[1], height), at(side * 52, -44, height + (8 if height > 20 else -6))]
        parts.append(Part(Tissue.LEFT_ATRIUM, frame.tube(vein, [8.0, 5.5])))
    parts += [
        Part(Tissue.MYOCARDIUM, right(3)),
        Part(Tissue.RIGHT_ATRIUM, right_atrium(0), RA),
        Part(Tissue.RIGHT_VENTRICLE, right(0), RV),
        Part(Tissue.RIGHT_VENTRICLE, frame.tube([at(4, 28, 4), outflow, valve_pa], [19.0, 15.0, 13.0]), RV),
        Part(Tissue.PULMONARY, frame.tube([valve_pa, trunk, fork], [13.5, around(14), 13.0]), PA),
        Part(Tissue.PULMONARY, frame.tube([fork, at(-44, -30, 58)], [11.0, 8.0]), PA),
        Part(Tissue.PULMONARY, frame.tube([fork, at(10, -20, 56), at(48, -28, 50)], [11.0, 10.5, 8.0]), PA),
        Part(Tissue.LEFT_ATRIUM, atrium(0), LAC),
        Part(Tissue.MYOCARDIUM, Cut(ventricle(wall), valve, toward_atrium), MYO),
        Part(Tissue.LEFT_VENTRICLE, Cut(ventricle(0), valve + 2 * toward_atrium, toward_atrium), LVC),
    ]
    for side in (-1, 1):  # papillary muscles: part of the ventricle's label, as in MM-WHS
        end = np.asarray(centre) + lv_axes @ np.array([0.45 * long, side * 0.55 * short, -0.2 * short])
        start = end - lv_axes @ np.array([22.0, side * 2.0, 0.0])
        tips = [(float(p[0]), float(p[1]), float(p[2])) for p in (start, end)]
        parts.append(Part(Tissue.MYOCARDIUM, frame.tube(tips, [3.0, 4.5]), LVC))
    parts += [
        Part(Tissue.LEFT_VENTRICLE, frame.tube([point(8, 4, 6), root], [12.0, 13.0]), LVC),
        Part(Tissue.DESCENDING, frame.tube([ascent[2], at(-6, -22, 86), at(-20, -46, 80)], [14.5, 13.0, 12.0])),
        Part(Tissue.AORTA, frame.tube([root, *ascent], aorta), AA),
    ]
    return parts


def smooth_field(rng: np.random.Generator, grid: tuple[Floats, Floats, Floats], waves: int, length: float) -> Floats:
    """Random smooth field over the grid with zero mean and unit variance, from waves of ``length`` mm and longer."""
    bases = []
    for axis in grid:
        order = np.arange(waves, dtype=np.float32)[:, None]
        phase = rng.uniform(0, 2 * np.pi, size=(waves, 1)).astype(np.float32)
        bases.append(np.cos(2 * np.pi * axis.ravel()[None] * order / np.float32(length * (waves - 1)) + phase))
    weights = rng.normal(size=(waves, waves, waves)).astype(np.float32)
    weights[0, 0, 0] = 0
    field = np.einsum("abc,ai,bj,ck->ijk", weights, *bases, optimize=True)
    result: Floats = ((field - field.mean()) / field.std()).astype(np.float32)
    return result


def render(
    parts: list[Part], grid: tuple[Floats, Floats, Floats], warp: list[Floats], values: dict[Tissue, float]
) -> tuple[Floats, NDArray[np.uint16]]:
    """Paint the parts on the grid.

    Args:
        parts: what to paint, in order.
        grid: open grid of the voxel centres in RAS mm, shapes (X,1,1), (1,Y,1), (1,1,Z).
        warp: three displacement fields (X,Y,Z) in mm that make each patient's shapes irregular.
        values: signal of every tissue.

    Returns:
        signal (X,Y,Z), where a voxel that a surface crosses holds both tissues by their share (partial volume), and
        the label of the part at the voxel's centre.
    """
    shape = warp[0].shape
    x, y, z = (axis + shift for axis, shift in zip(grid, warp, strict=True))
    voxel = np.float32(np.mean([axis.ravel()[1] - axis.ravel()[0] for axis in grid]))
    reach = float(max(np.abs(shift).max() for shift in warp)) + float(voxel)
    signal = np.full(shape, values[Tissue.AIR], np.float32)
    label = np.zeros(shape, np.uint16)
    for part in parts:
        bounds = part.solid.bounds()
        box: list[slice] = []
        for i, axis in enumerate(grid):
            if bounds is None:
                box.append(slice(None))
            else:
                low, high = np.searchsorted(axis.ravel(), [bounds[0][i] - reach, bounds[1][i] + reach])
                box.append(slice(int(low), int(high)))
        where = tuple(box)
        if signal[where].size == 0:
            continue
        distance = part.solid.distance(x[where], y[where], z[where])
        share = np.clip(0.5 - distance / voxel, 0, 1)
        signal[where] += share * (np.float32(values[part.tissue]) - signal[where])
        label[where][distance < 0] = part.label
    return signal, label


def make_case(modality: Modality, number: int, seed: int, scan: MrScan | CtScan | None = None) -> PhantomCase:
    """One random patient scanned with one modality.

    Args:
        modality: "mr" or "ct".
        number: case number, e.g. 1001; with ``seed`` and ``modality`` it fixes everything about the case.
        seed: of the whole set of cases.
        scan: ranges of the acquisition's parameters; None for the defaults of the modality.
    """
    rng = np.random.default_rng([seed, _MODALITY_KEY[modality], number])
    scan = scan or (MrScan() if modality == "mr" else CtScan())
    parts = anatomy(rng)
    spacing, size = scan.draw_grid(rng)
    centre = np.array([-3.0, -4.0, 14.0]) + rng.normal(0, 4, 3)
    origin = centre - (np.asarray(size) - 1) / 2 * spacing
    x, y, z = (
        np.float32(o) + np.float32(s) * np.arange(n, dtype=np.float32)
        for o, s, n in zip(origin, spacing, size, strict=True)
    )
    grid = (x[:, None, None], y[None, :, None], z[None, None, :])
    warp = [np.float32(2.0) * smooth_field(rng, grid, waves=4, length=70.0) for _ in range(3)]
    values = scan.draw_values(rng)
    signal, label = render(parts, grid, warp, values)
    bias = smooth_field(rng, grid, waves=3, length=180.0)
    image = scan.acquire(rng, signal, spacing, grid, bias)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin + rng.uniform(-40, 40, 3)  # the scanner's zero is not the heart
    codes = _ORIENTATIONS[modality][int(rng.integers(len(_ORIENTATIONS[modality])))]
    image, label, affine = _store(image, label, affine, codes)
    return PhantomCase(modality, number, image, label, affine)


def _store(
    image: NDArray[np.int16], label: NDArray[np.uint16], affine: NDArray[np.float64], codes: str
) -> tuple[NDArray[np.int16], NDArray[np.uint16], NDArray[np.float64]]:
    """Reorder RAS arrays to the axis codes (e.g. "LIP": first index grows to the left); the affine follows."""
    order = [next(i for i, pair in enumerate(("RL", "AP", "SI")) if code in pair) for code in codes]
    change = np.zeros((4, 4))
    change[3, 3] = 1
    flips = []
    for new, (old, code) in enumerate(zip(order, codes, strict=True)):
        flipped = code in "LPI"
        change[old, new] = -1 if flipped else 1
        if flipped:
            change[old, 3] = image.shape[old] - 1
            flips.append(new)
    image = np.ascontiguousarray(np.flip(image.transpose(order), tuple(flips)))
    label = np.ascontiguousarray(np.flip(label.transpose(order), tuple(flips)))
    return image, label, affine @ change
