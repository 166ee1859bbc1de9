"""Names of the files that predict writes, and which files in a folder those are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from mpscl_ray.data.volumes.dicom_paths import is_series
from mpscl_ray.data.volumes.file_names import VOLUME_ENDINGS, stem_before

FORMATS = ("nii.gz", "seg.nrrd")
"""Of label maps: NIfTI, and segmentations of 3D Slicer."""
SUFFIXES = tuple(f"_prediction.{format}" for format in FORMATS)
"""A label map's name is the stem of the image's with the suffix of its format."""
ITKSNAP_LABELS = "itksnap_labels.txt"
SLICER_LABELS = "slicer_labels.ctbl"
VOLUMES = "volumes.json"
"""File in the output folder with the volume of each structure in ml, by label map."""
PREVIEW_SUFFIX = "_preview.png"
DISAGREEMENT_SUFFIX = "_disagreement.nii.gz"
_PROBABILITY = "_probability_"


def stem(image: Path) -> str:
    """Name of an image without ``.nii``, ``.nii.gz``, ``.nrrd`` or ``.mha``; of a DICOM series that of its folder."""
    if image.is_dir():
        return image.absolute().name
    name = f"{image.absolute().parent.name}_{image.name}" if is_series(image) else image.name
    return stem_before(name, VOLUME_ENDINGS) or name


def probability_name(base: str, structure: str) -> str:
    """Name of the probability map of a structure; ``base`` is the stem of the image."""
    return f"{base}{_PROBABILITY}{plain(structure)}.nii.gz"


def plain(name: str) -> str:
    """A name without blanks and path separators."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)


def mirrored_folder(image: Path, roots: Sequence[Path]) -> str:
    """Folder of an image below the first of the given folders that holds it: ``""``, or ``sub-01/anat/``."""
    for root in roots:
        if image.is_relative_to(root):
            below = image.relative_to(root).parent.as_posix()
            return "" if below == "." else f"{below}/"
    return ""


def is_probability_map(name: str, siblings: Collection[str]) -> bool:
    """Whether a file is a probability map of predict, by its name and those of the files beside it."""
    base, mark, _ = name.rpartition(_PROBABILITY)
    return bool(mark) and (SLICER_LABELS in siblings or any(base + suffix in siblings for suffix in SUFFIXES))
