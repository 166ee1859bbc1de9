"""A label map from a mask file for each structure, as TotalSegmentator writes them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mpscl_ray.data.volumes.nifti import Volume
from mpscl_ray.errors import DataError
from mpscl_ray.runs.wording import counted


def read_masks(
    paths: Sequence[Path], read: Callable[[Path], Volume], on_grid: Callable[[Volume], Volume]
) -> tuple[Volume, list[str]]:
    """One label map with the ids 1, 2, ... of the masks in their order; where two overlap, the later one counts.

    Args:
        paths: of the masks.
        read: reads a label map.
        on_grid: turns a mask to the grid of the image, or refuses it.

    Returns:
        The map, and a warning if masks overlap.

    Raises:
        DataError: a file is no mask, which has one value besides 0, or not on the grid of the image.
    """
    combined: Volume | None = None
    overlaps: list[str] = []
    digest = hashlib.sha256()
    for number, path in enumerate(paths, start=1):
        mask = on_grid(read(path))
        ids = [int(value) for value in np.unique(mask.array)]
        if len([value for value in ids if value != 0]) > 1:
            raise DataError(
                f"{path} has the values {', '.join(map(str, ids[:6]))}, expected a mask of one structure, 0 and 1; "
                "name the ids of a label map instead, e.g. --labels 1=MYO,2=LV"
            )
        inside = mask.array != 0
        if combined is None:
            combined = replace(mask, array=np.zeros_like(mask.array))
        elif twice := int(np.count_nonzero(inside & (combined.array != 0))):
            overlaps.append(f"{path.name} overlaps the masks before it ({counted(twice, 'voxel')}), and counts there")
        combined.array[inside] = number
        digest.update(mask.sha256.encode())
    assert combined is not None, "a case with masks has one at least"
    return replace(combined, sha256=digest.hexdigest()), overlaps
