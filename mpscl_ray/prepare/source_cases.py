"""A case as files in a folder, and what the user says about the folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mpscl_ray.prepare.label_table import LabelTable

Flip = Literal["auto", "none", "both"]
"""Whether released test volumes are flipped along rows and columns; auto: those named like them."""

Kind = Literal["nifti", "tfrecord", "npy", "npz", "released_nifti"]


@dataclass(frozen=True)
class SourceCase:
    """The files of one case. ``labels`` is as long as ``images`` or empty; TFRecord and npz files hold their own.

    ``released_nifti`` is a test volume of the SIFA release, z-scored by its publisher; ``nifti`` is any other volume.
    """

    id: str
    modality: str
    patient: str
    kind: Kind
    images: tuple[Path, ...]
    labels: tuple[Path, ...] = ()
    split: str | None = None
    """Where the layout itself says so."""
    label_hint: str = ""
    """Where the missing label was looked for."""


@dataclass(frozen=True)
class LayoutOptions:
    """What the user says about a folder."""

    modality: str | None = None
    image_pattern: str | None = None
    label_pattern: str | None = None
    patient_pattern: str | None = None
    """Regular expression searched in the case id; its first group (or the whole match) is the patient."""
    group_slices: int | None = None
    """Slices of one file each that go into one case, by their number."""
    channel: int = 0


Found = tuple[list[SourceCase], LabelTable | None, set[Path]]
"""Cases of a layout, the meaning of their raw labels where the layout tells, and the files that are part of it."""


def collect(found: dict[str, list[Path]], case: str, path: Path) -> None:
    """Add a file to those of a case."""
    found.setdefault(case, []).append(path)
