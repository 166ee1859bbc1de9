"""How volumes become slices: what a user may choose, and what was published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from mpscl_ray.errors import ConfigError

_SPACING_MM = (0.05, 50.0)

Orientation = Literal["canonical", "stored"]
Centre = Literal["labels", "image", "auto"]
GeometryFrom = Literal["sform", "qform", "pixdim"]
"""Which part of a header is right: the sform; the qform; or the voxel sizes along the axes of the affine."""
GEOMETRIES: tuple[GeometryFrom, ...] = get_args(GeometryFrom)
NanPolicy = Literal["error", "lowest", "zero"]
"""What becomes of voxels that are not finite: an error, the lowest finite intensity, or 0."""
NAN_POLICIES: tuple[NanPolicy, ...] = get_args(NanPolicy)

PLANES: dict[str, tuple[tuple[int, int], tuple[int, int], tuple[int, int]]] = {
    "coronal": ((1, +1), (2, -1), (0, -1)),
    "axial": ((2, +1), (1, -1), (0, -1)),
    "sagittal": ((0, +1), (2, -1), (1, -1)),
}
"""For D, H and W of each plane: the world axis (0 right, 1 anterior, 2 superior) and its direction."""

LOWEST_HU = -1200.0
"""Hounsfield units below this occur in no tissue, not even by noise: they are padding outside the field of view."""
AIR_HU = -1024.0
"""What such padding is set to."""

RELEASED_RANGES = {"ct": (-2.8, 3.2), "mr": (-1.8, 4.4)}
"""Intensities that SIFA and MPSCL map to [-1, 1].

Source: the constants of the released evaluation code.
"""


@dataclass(frozen=True)
class Recipe:
    """How volumes become slices: the same for every volume of a dataset and for later predictions."""

    orientation: Orientation = "canonical"
    """``canonical``: turned by the affine as :mod:`mpscl_ray.data.volumes.geometry` shows. ``stored``: as acquired."""
    slice_axis: str = "coronal"
    """``coronal``, ``axial`` or ``sagittal``; with ``stored``, the array axis along which slices are stacked, 0-2."""
    spacing_mm: tuple[float | None, float | None, float | None] | None = None
    """Voxel size along D, H and W to resample to; None, as a whole or for one axis, keeps that of the volume."""
    crop: tuple[int, int] | None = (256, 256)
    """Rows and columns of the crop around the centre, in voxels after resampling; None keeps whole slices."""
    crop_depth: int | None = None
    """Largest number of slices around the centre; None keeps all."""
    centre: Centre = "image"
    """``image``: found without labels, as it has to be for a new patient. ``labels``: mean coordinate of all labelled
    voxels, as in the published slices. ``auto``: labels if there are any."""
    size: tuple[int, int] | None = None
    """Rows and columns that the crop is resized to; None leaves it as it is."""
    clip_percentile: float = 98.0
    """Intensities above this percentile of the crop are set to it; 100 clips nothing."""

    hounsfield: bool = False
    """Intensities are Hounsfield units: padding below :data:`LOWEST_HU` becomes air, :data:`AIR_HU`."""

    def __post_init__(self) -> None:
        """Refuse settings that are out of range.

        Raises:
            ConfigError: Naming the key, what it is and what it may be.
        """
        for name, value, allowed in (
            ("orientation", self.orientation, get_args(Orientation)),
            ("slice_axis", self.slice_axis, ("0", "1", "2") if self.orientation == "stored" else tuple(PLANES)),
            ("centre", self.centre, get_args(Centre)),
        ):
            if value not in allowed:
                raise ConfigError(
                    f"{name} is {value!r}; with orientation {self.orientation!r} it has to be one of "
                    f"{', '.join(allowed)}"
                )
        for name, pair in (("crop", self.crop), ("size", self.size)):
            if pair is not None and (len(pair) != 2 or any(n is None or n < 2 for n in pair)):
                raise ConfigError(f"{name} is {pair}; expected rows and columns, both at least 2, such as 256 256")
        if self.crop_depth is not None and self.crop_depth < 1:
            raise ConfigError(f"crop_depth is {self.crop_depth}; expected a number of slices, at least 1")
        if self.spacing_mm is not None and (
            len(self.spacing_mm) != 3
            or any(s is not None and not _SPACING_MM[0] <= s <= _SPACING_MM[1] for s in self.spacing_mm)
        ):
            raise ConfigError(
                f"spacing_mm is {self.spacing_mm}; expected three sizes (slice, row, column) of {_SPACING_MM[0]:g} to "
                f"{_SPACING_MM[1]:g} mm"
            )
        if not 1.0 < self.clip_percentile <= 100.0:
            meant = f", perhaps {100 * self.clip_percentile:g}" if 0 < self.clip_percentile <= 1 else ""
            raise ConfigError(
                f"clip_percentile is {self.clip_percentile}; expected percent above 1 and at most 100{meant}"
            )

    def to_json(self) -> dict[str, Any]:
        """The same as a dictionary of JSON values; without ``hounsfield`` unless it is set."""
        return {name: value for name, value in asdict(self).items() if name != "hounsfield" or value}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Recipe:
        """Inverse of `to_json`, also for values read from JSON text.

        Raises:
            ConfigError: A key is unknown, or a value is out of range.
        """
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ConfigError(
                f"unknown key {unknown[0]!r} in a recipe; known: {', '.join(f.name for f in fields(cls))}"
            )
        settings: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        return cls(**settings)
