"""One phantom patient scanned: the anatomy painted on the grid of a scan, as an MR-like or CT-like volume with labels.

All randomness comes from (seed, modality, case number): a case does not change when others are added, and no MR patient
is a CT patient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mpscl_ray.data.phantom.anatomy import Part, anatomy
from mpscl_ray.data.phantom.imaging import CtScan, MrScan, Tissue

Modality = Literal["mr", "ct"]
Floats = NDArray[np.float32]

_MODALITY_KEY: dict[Modality, int] = {"mr": 1, "ct": 2}
# Array orders of real scans: axial, coronal and sagittal acquisitions, each with the signs scanners write.
_ORIENTATIONS: dict[Modality, tuple[str, ...]] = {
    "ct": ("LPS", "RAS", "LAS", "LPI"),
    "mr": ("LIP", "PIR", "LPS", "RSA", "ASL", "LIA"),
}


@dataclass(frozen=True)
class PhantomCase:
    """One scan."""

    modality: Modality
    number: int
    image: NDArray[np.int16]
    """Signal (MR, arbitrary units, >= 0) or Hounsfield units (CT), in the array order of the scan."""
    label: NDArray[np.uint16]
    """Label ids of MM-WHS, same shape."""
    affine: NDArray[np.float64]
    """(4, 4), voxel index to RAS millimetres."""


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
