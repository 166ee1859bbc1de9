"""What the training volumes of a domain were like, and whether a new volume is far from all of them.

Least and greatest value of each number over the training split; nothing of a single case is kept. A volume is far off
if a size or a spread is :data:`FACTOR` times beyond that range, or a position on the scale of intensities
:data:`SHIFT` standard deviations. On phantom and real volumes held out from training, sizes were at most 1.2 times
and positions 0.15 standard deviations beyond.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from mpscl_ray.data.dataset import Manifest
from mpscl_ray.data.volumes.geometry import PERCENTILES, Geometry

FACTOR = 1.5
SHIFT = 0.4

Ranges = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class TrainingRange:
    """Ranges over the training volumes of a domain, as stored in ``model.json``."""

    cases: int
    """Number of training volumes."""
    ranges: Mapping[str, Ranges]
    """Name of a quantity -> least and greatest value of each of its numbers, see :func:`measure`."""

    @classmethod
    def of(cls, manifest: Manifest) -> Self | None:
        """The ranges of a dataset; None if it was made from slices, whose volumes are not known."""
        measured = [measure(Geometry.from_json(case.geometry)) for case in manifest.split("train") if case.geometry]
        if not measured:
            return None
        # Datasets of earlier versions have no percentiles.
        names = [name for name in measured[0] if all(numbers[name] for numbers in measured)]
        ranges = {
            name: tuple(
                (min(values), max(values)) for values in zip(*(numbers[name] for numbers in measured), strict=True)
            )
            for name in names
        }
        return cls(len(measured), ranges)

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {"cases": self.cases, **{name: [list(pair) for pair in pairs] for name, pairs in self.ranges.items()}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_json`; raises KeyError, TypeError or ValueError for anything else."""
        ranges = {
            name: tuple((float(low), float(high)) for low, high in pairs)
            for name, pairs in values.items()
            if name != "cases"
        }
        return cls(int(values["cases"]), ranges)

    def unusual(self, geometry: Geometry, *, hounsfield: bool) -> list[str]:
        """Warnings on a volume that is far from all training volumes, each a sentence with the numbers.

        Args:
            geometry: of the volume, prepared in the same way.
            hounsfield: whether intensities are Hounsfield units, so that mean and deviation have a meaning. For others
                the place of 0 among the normalised intensities is judged instead.
        """
        found = measure(geometry)
        told = [*_SIZES, *(_HOUNSFIELD if hounsfield else _ARBITRARY), _DISTRIBUTION]
        return [
            f"{what} {_listed(found[name])}{unit}; training volumes had {_listed(self.ranges[name])}"
            for name, what, unit in told
            if name in self.ranges and self._far(name, found[name])
        ]

    def _far(self, name: str, numbers: Sequence[float]) -> bool:
        if name in _BY_FACTOR:
            limits = [(low / FACTOR, high * FACTOR) for low, high in self.ranges[name]]
        else:
            # The mean alone is in units of the image.
            unit = self.ranges["standard_deviation"][0][1] if name == "mean" else 1.0
            limits = [(low - SHIFT * unit, high + SHIFT * unit) for low, high in self.ranges[name]]
        return any(not low <= number <= high for number, (low, high) in zip(numbers, limits, strict=True))


_SIZES = (
    ("voxel_mm", "voxels are", " mm (slice, row, column)"),
    ("extent_mm", "the volume extends over", " mm (slice, row, column)"),
)
_HOUNSFIELD = (
    ("mean", "the crop has the mean", " HU"),
    ("standard_deviation", "the crop has the standard deviation", " HU"),
)
_ARBITRARY = (("zero", "intensity 0 lies at", " standard deviations from the mean of the crop"),)
_DISTRIBUTION = (
    "percentiles",
    f"percentiles {', '.join(map(str, PERCENTILES))} of the normalised crop are",
    ", an unusual distribution",
)
_BY_FACTOR = ("voxel_mm", "extent_mm", "standard_deviation")


def measure(geometry: Geometry) -> dict[str, tuple[float, ...]]:
    """What is compared: sizes of the original volume along D, H and W in mm, and intensities of the crop."""
    voxel_mm = [size / axis.step for size, axis in zip(geometry.spacing_mm, geometry.axes, strict=True)]
    return {
        "voxel_mm": tuple(voxel_mm),
        "extent_mm": tuple(size * axis.length for size, axis in zip(voxel_mm, geometry.axes, strict=True)),
        "mean": (geometry.mean,),
        "standard_deviation": (geometry.standard_deviation,),
        "zero": (-geometry.mean / geometry.standard_deviation,),
        "percentiles": geometry.percentiles,
    }


def _listed(values: Sequence[float | tuple[float, float]]) -> str:
    """``5 x 1.2 x 1.2`` of numbers, ``5-8 x 1.2 x 1-1.4`` of ranges."""

    def said(value: float | tuple[float, float]) -> str:
        low, high = (
            f"{end:.0f}" if abs(end) >= 1000 else f"{end:.3g}"
            for end in (value if isinstance(value, tuple) else (value, value))
        )
        return low if low == high else f"{low} to {high}"

    return (" x " if len(values) == 3 else ", ").join(map(said, values))
