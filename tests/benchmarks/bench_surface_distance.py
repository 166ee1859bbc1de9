"""Time of scoring one volume against the calls of medpy on whole volumes, in one process and one thread.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_surface_distance.py [--size 256] [--repeats 3] [--same-columns]

Prints, per case, the CPU seconds of both (other processes do not count), their ratio, and the largest relative
difference of any value. Two comparisons: ``dice + ASD mm`` is one ``dc`` and one ``assd`` call a structure, against
everything ``volume_scores`` computes (both definitions, mm and voxels, HD95); ``same columns`` makes medpy compute all
of these too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from medpy.metric import binary

from mpscl_ray.evaluate.metrics import volume_scores

CLASSES = ["background", "MYO", "LAC", "LVC", "AA"]
# class index, centre and semi-axes in 1/256 of the volume: drawn in this order, each over the one before
STRUCTURES = (
    (1, (120, 140, 120), (70, 60, 55)),
    (3, (120, 140, 120), (55, 45, 40)),
    (2, (110, 90, 190), (45, 40, 35)),
    (4, (190, 110, 150), (35, 30, 30)),
)


def heart(size: int, shift: tuple[float, float, float], waves: float, phase: float) -> np.ndarray:
    """Four touching ellipsoids with a wavy surface, about as large as a heart in its crop."""
    z, y, x = np.ogrid[:size, :size, :size]
    unit = size / 256
    labels = np.zeros((size, size, size), np.uint8)
    for label, centre, radii in STRUCTURES:
        cz, cy, cx = (c * unit + s for c, s in zip(centre, shift, strict=True))
        rz, ry, rx = (r * unit for r in radii)
        distance = np.sqrt(((z - cz) / rz) ** 2 + ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2)
        wave = np.sin(2 * np.pi * (y / (17 * unit) + label / 10 + phase)) * np.cos(
            2 * np.pi * (x / (23 * unit) + z / (19 * unit) + label / 10)
        )
        labels[distance < 1 + waves / min(radii) * wave] = label
    return labels


def cases(size: int) -> dict[str, tuple[np.ndarray, np.ndarray, tuple[float, float, float]]]:
    truth = heart(size, (0, 0, 0), 3, 0)
    good, fair = heart(size, (1, 0, 1), 2.5, 0), heart(size, (3, -2, 4), 3, 0.3)
    poor = fair.copy()
    rng = np.random.default_rng(0)
    specks = rng.integers(0, poor.size, poor.size // 2000)
    poor.ravel()[specks] = rng.integers(1, 5, len(specks))  # false positives all over the volume
    return {
        "good, isotropic": (good, truth, (1.0, 1.0, 1.0)),
        "fair, isotropic": (fair, truth, (1.0, 1.0, 1.0)),
        "fair, anisotropic": (fair, truth, (1.6, 0.9, 0.9)),
        "scattered false positives": (poor, truth, (1.6, 0.9, 0.9)),
    }


def medpy_mm(prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, float, float]) -> list[tuple[float, ...]]:
    rows = []
    for index in range(1, len(CLASSES)):
        p, t = prediction == index, truth == index
        rows.append((binary.dc(p, t), binary.assd(p, t, spacing)))
    return rows


def medpy_all(
    prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, float, float]
) -> list[tuple[float, ...]]:
    rows = []
    for index in range(1, len(CLASSES)):
        p, t = prediction == index, truth == index
        means_mm = (binary.asd(p, t, spacing) + binary.asd(t, p, spacing)) / 2
        means_voxel = (binary.asd(p, t) + binary.asd(t, p)) / 2
        distances = (binary.assd(p, t, spacing), binary.assd(p, t), means_mm, means_voxel, binary.hd95(p, t, spacing))
        rows.append((binary.dc(p, t), *distances))
    return rows


def ours(prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, float, float]) -> list[tuple[float, ...]]:
    return [
        (s.dice, s.asd_mm, s.asd_voxel, s.asd_mm_mean_of_means, s.asd_voxel_mean_of_means, s.hd95_mm)
        for s in volume_scores(prediction, truth, CLASSES, spacing)
    ]


def timed(call: Callable[[], list[tuple[float, ...]]], repeats: int) -> tuple[float, list[tuple[float, ...]]]:
    seconds, value = [], []
    for _ in range(repeats):
        start = time.process_time()
        value = call()
        seconds.append(time.process_time() - start)
    return min(seconds), value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="voxels a side (default 256)")
    parser.add_argument("--repeats", type=int, default=3, help="the shortest of so many runs counts (medpy runs once)")
    parser.add_argument("--same-columns", action="store_true", help="the second comparison too (many minutes)")
    options = parser.parse_args()
    references = {"dice + ASD mm": medpy_mm, **({"same columns": medpy_all} if options.same_columns else {})}
    print(f"{options.size}^3 voxels, {len(CLASSES) - 1} structures")
    for name, (prediction, truth, spacing) in cases(options.size).items():
        own_seconds, own = timed(lambda p=prediction, t=truth, s=spacing: ours(p, t, s), options.repeats)
        print(
            f"{name}: volume_scores {own_seconds:.2f} s, mean Dice {np.mean([row[0] for row in own]):.2f}", flush=True
        )
        for label, reference in references.items():
            seconds, expected = timed(lambda f=reference, p=prediction, t=truth, s=spacing: f(p, t, s), 1)
            a, b = np.array(expected), np.array([row[: len(expected[0])] for row in own])
            difference = np.max(np.abs(a - b) / np.abs(a))
            ratio = seconds / own_seconds
            print(f"  medpy, {label}: {seconds:.1f} s = {ratio:.0f} x; largest difference {difference:.0e}", flush=True)


if __name__ == "__main__":
    main()
