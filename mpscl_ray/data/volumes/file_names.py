"""Names of image files. Upper and lower case are the same in their endings."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

NIFTI_ENDINGS = (".nii.gz", ".nii")
SEGMENTATION_ENDING = ".seg.nrrd"
"""Of a segmentation of 3D Slicer: a label map in NRRD whose header has names and colours."""
ITK_ENDINGS = (SEGMENTATION_ENDING, ".nrrd", ".mha")
VOLUME_ENDINGS = (*NIFTI_ENDINGS, *ITK_ENDINGS)
"""Of all formats with a volume in a file that are read."""


def has_ending(name: str, endings: Sequence[str]) -> bool:
    """Whether a name has one of the endings, which are given in lower case."""
    return name.lower().endswith(tuple(endings))


def stem_before(name: str, endings: Sequence[str]) -> str | None:
    """The name without the first of the endings (in lower case) that it has; None if it has none."""
    return next((name[: -len(ending)] for ending in endings if has_ending(name, (ending,))), None)


def composed(name: str) -> str:
    """The name with accents and letters as one character (NFC): macOS stores them apart, and both look the same."""
    return unicodedata.normalize("NFC", name)
