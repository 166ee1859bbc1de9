"""The two passes over a case: to normalised slices on disk, and to the Parquet file once the intensity range is known.

The range of a modality is known only after all its cases are staged. Each case runs in its own worker; little
crosses between processes, the voxels go through files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mpscl_ray.data.dataset import CASES, Case, Scaling
from mpscl_ray.data.label_map_files import write_label_map_file
from mpscl_ray.data.parquet_writer import write_case
from mpscl_ray.data.scaling import scale, unscale
from mpscl_ray.errors import DataError, StorageError
from mpscl_ray.prepare import staged_before
from mpscl_ray.prepare.stage_slices import stage_slices
from mpscl_ray.prepare.stage_volume import stage_volume
from mpscl_ray.prepare.staged_case import Request, Settings, StagedCase
from mpscl_ray.runs.atomic_files import storage_errors


def stage_case(request: Request, settings: Settings) -> StagedCase | list[str]:
    """Read, check and normalise one case; one that was staged before, by a command that was stopped, is taken as it is.

    Returns:
        The staged case, or everything that is wrong with its files.

    Raises:
        StorageError: the staged slices cannot be written.
    """
    try:
        before = None if request.folder is None else staged_before.take(request, settings)
        if before is not None:
            return before
        staged = (stage_volume if request.source.kind == "nifti" else stage_slices)(request, settings)
        if isinstance(staged, StagedCase) and request.folder is not None:
            staged_before.keep(staged, settings)
        return staged
    except DataError as error:
        return [str(error)]
    except MemoryError:
        return [f"{request.source.images[0]}: does not fit into memory; give fewer --workers, or a smaller --crop"]


def finish_case(staged: StagedCase, scaling: Scaling | None, classes: Sequence[str], folder: Path) -> Case:
    """Scale the staged slices to [-1, 1] and write them as the case's Parquet file.

    Without a scaling they stay z-scored, in a file for all folds.

    Raises:
        StorageError: the staged slices are gone, or the file cannot be written.
    """
    request = staged.request
    try:
        image = np.load(request.image_file, allow_pickle=False)
    except FileNotFoundError:
        raise StorageError(
            f"{request.image_file}: written by another worker and not visible here; --out has to be on storage that "
            "all nodes of the cluster share"
        ) from None
    wanted = None if scaling is None else (scaling.low, scaling.high)
    if staged.scaled_by != wanted:
        if staged.scaled_by is not None:
            image = unscale(image, *staged.scaled_by)
        if wanted is not None:
            image = scale(image, *wanted)
    label = np.load(request.label_file, allow_pickle=False) if staged.class_voxels is not None else None
    split = CASES if scaling is None else request.split
    label_map = None
    if request.label_map_file.exists():
        content = request.label_map_file.read_bytes()
        label_map = write_label_map_file(folder, split, request.source.id, content)
    with storage_errors(folder, needed=image.nbytes):
        case = write_case(
            folder,
            id=request.source.id,
            patient=request.source.patient,
            split=split,
            image=image,
            label=label,
            classes=classes,
            content_sha256=staged.content_sha256,
            geometry=staged.geometry,
            spacing_mm=staged.spacing_mm,
            cropped_around_labels=staged.cropped_around_labels,
            sources=staged.sources,
            notices=staged.notices,
            label_map=label_map,
        )
    request.image_file.unlink()
    request.label_file.unlink(missing_ok=True)
    request.label_map_file.unlink(missing_ok=True)
    return case
