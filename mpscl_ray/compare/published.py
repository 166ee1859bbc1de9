"""Mean Dice and surface distance published for MM-WHS, for columns apart from the scores measured here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

STRUCTURES = frozenset({"AA", "LAC", "LVC", "MYO"})

TITLE = "published, MM-WHS"

NOTE = (
    f"The columns ({TITLE}) are other people's measurements on other data: mean Dice % and ASD in voxels of four "
    "volumes, checkpoints chosen with target labels (Liu et al. 2022, Tables III to V as far as they were legible; "
    "SIFA v2 and AdaOutput as later work tabulates them). They are for orientation, not for a comparison by digits."
)


@dataclass(frozen=True)
class Published:
    """Mean over the four structures; None where it could not be read."""

    dice: float | None
    asd: float | None


PUBLISHED: Mapping[tuple[str, str], Mapping[str, Published]] = {
    ("mr", "ct"): {
        "source_only": Published(23.28, None),
        "adaoutput": Published(59.9, 9.6),
        "sifa_v2": Published(74.1, 7.0),
        "baseline": Published(81.75, 3.68),
        "cscl": Published(83.85, 3.63),
        "mpscl": Published(84.08, 3.47),
        "supervised": Published(90.40, None),
    },
    ("ct", "mr"): {
        "source_only": Published(20.35, None),
        "adaoutput": Published(51.9, 5.7),
        "sifa_v2": Published(63.4, 5.7),
        "baseline": Published(None, 4.32),
        "mpscl": Published(69.87, 3.80),
        "supervised": Published(85.07, None),
    },
}
"""(source, target) -> system -> numbers."""


def published_for(source: str, target: str, structures: frozenset[str]) -> Mapping[str, Published]:
    """Numbers of a direction; empty where modalities or structures are not those of the paper."""
    return PUBLISHED.get((source, target), {}) if structures == STRUCTURES else {}
