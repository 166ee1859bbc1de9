"""The files of a case, and the options of the folder that they are in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mpscl_ray.prepare.label_table import LabelTable

Flip = Literal["auto", "none", "both"]
"""Whether released test volumes are flipped along rows and columns; auto: those named like the released ones."""

Kind = Literal["nifti", "tfrecord", "npy", "npz", "released_nifti"]


@dataclass(frozen=True)
class SourceCase:
    """The files of one case. TFRecord and npz files hold their own labels.

    ``labels`` is as long as ``images``, or has one mask for each structure, or is empty.

    ``released_nifti`` is a test volume of the SIFA release, z-scored by its publisher; ``nifti`` is any other volume.
    """

    id: str
    modality: str
    patient: str
    kind: Kind
    images: tuple[Path, ...]
    labels: tuple[Path, ...] = ()
    split: str | None = None
    """The split, if the layout defines it."""
    label_hint: str = ""
    """Expected path of a missing label, for messages."""
    frame: int | None = None
    """Time point of volumes that have a time axis."""

    @property
    def lacks_labels(self) -> bool:
        """Whether it has no label file and its images hold no labels either."""
        return not self.labels and self.kind not in ("tfrecord", "npz")


@dataclass(frozen=True)
class LayoutOptions:
    """Options of a folder."""

    modality: str | None = None
    image_pattern: str | None = None
    label_pattern: str | None = None
    patient_pattern: str | None = None
    """Regular expression searched in the case id; its first group (or the whole match) is the patient."""
    group_slices: int | None = None
    """Number of consecutive slice files that make one case."""
    channel: int = 0
    masks: tuple[str, ...] = ()
    """Layout folder: names of the mask files of a case, what the last ``*`` of the label pattern matches."""


Found = tuple[list[SourceCase], LabelTable | None, set[Path]]
"""Cases of a layout, the meaning of their raw labels if the layout defines it, and the files that are part of it."""


def collect(found: dict[str, list[Path]], case: str, path: Path) -> None:
    """Add a file to those of a case."""
    found.setdefault(case, []).append(path)
