"""The measures of a volume once more, computed by medpy, to compare with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import find_objects

from mpscl_ray.evaluate.metrics import StructureScore

TOLERANCES = {"dice": 1e-9, "asd_mm": 1e-6, "hd95_mm": 1e-6}
"""Largest difference of a measure from medpy's that counts as rounding; distances in mm."""


@dataclass(frozen=True)
class Comparison:
    """One measure of one structure, by this package and by medpy."""

    measure: str
    structure: str
    ours: float
    medpy: float

    @property
    def difference(self) -> float:
        """Infinite if one of the two is undefined."""
        difference = abs(self.ours - self.medpy)
        return math.inf if math.isnan(difference) else difference

    def to_json(self) -> dict[str, Any]:
        """Plain values; an undefined number is null."""
        values = {**asdict(self), "difference": self.difference}
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }


def compare_with_medpy(
    prediction: npt.NDArray[np.uint8],
    truth: npt.NDArray[np.uint8],
    scores: Sequence[StructureScore],
    spacing_mm: Sequence[float],
) -> tuple[Comparison, ...]:
    """Dice (``dc``), ASD (``assd``) and HD95 (``hd95``) of medpy for each structure.

    Distances are compared where the structure is in both; Dice also where it is missing in one.

    Args:
        prediction: class indices.
        truth: class indices.
        scores: what :func:`~mpscl_ray.evaluate.metrics.volume_scores` found, from class 1 on.
        spacing_mm: voxel size per axis.
    """
    from medpy.metric import binary  # Only here: no other command needs it.

    found = []
    for index, score in enumerate(scores, start=1):
        if score.case_kind == "absent":
            continue
        # Outside the volume is background for medpy, so the box around the structure in both is all that it needs.
        (box,) = find_objects(((prediction == index) | (truth == index)).astype(np.uint8))
        p, t = prediction[box] == index, truth[box] == index
        values = {"dice": float(binary.dc(p, t))}
        if score.case_kind == "ok":
            values["asd_mm"] = float(binary.assd(p, t, spacing_mm))
            values["hd95_mm"] = float(binary.hd95(p, t, spacing_mm))
        found += [Comparison(name, score.structure, getattr(score, name), value) for name, value in values.items()]
    return tuple(found)


def largest_differences(comparisons: Iterable[tuple[str, Comparison]]) -> dict[str, tuple[str, Comparison, int]]:
    """For each measure the case and comparison with the largest difference, and the number of comparisons.

    Args:
        comparisons: each with its case.
    """
    found: dict[str, tuple[str, Comparison, int]] = {}
    for case, comparison in comparisons:
        worst_case, worst, count = found.get(comparison.measure, (case, comparison, 0))
        if comparison.difference > worst.difference:
            worst_case, worst = case, comparison
        found[comparison.measure] = (worst_case, worst, count + 1)
    return found
