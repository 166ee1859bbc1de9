"""DICOM series among the files of a folder: each is an image, called by its folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from mpscl_ray.data.volumes.dicom import several, volumes_in
from mpscl_ray.data.volumes.dicom_files import Series, find_series
from mpscl_ray.data.volumes.dicom_paths import is_dicom
from mpscl_ray.errors import DataError
from mpscl_ray.prepare.file_listing import Listing


def with_series(listing: Listing, image_pattern: re.Pattern[str]) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Each file with its path below the folder; DICOM series, with the paths by which they are called, for their files.

    A folder with one volume is called by its own path, and by ``FOLDER/seriesNUMBER`` as each of several. In the
    listing, series replace their files.

    Args:
        listing: gets a problem for each folder of several series that the pattern cannot tell apart.
        image_pattern: of the paths of images.
    """
    folders: dict[Path, list[Path]] = {}
    for path in listing.files:
        if is_dicom(path):
            folders.setdefault(path.parent, []).append(path)
    slices = {path for files in folders.values() for path in files}
    listing.files = [path for path in listing.files if path not in slices]
    yield from [(path, (listing.relative(path),)) for path in listing.files]
    for folder, files in folders.items():
        found, volumes = _volumes(folder, files)
        names = [(path, _names(listing, folder, path, found)) for path in volumes]
        own = folder.name if folder == listing.root else listing.relative(folder)
        chosen = any(image_pattern.fullmatch(name) for _, called in names for name in called)
        if not chosen and len(volumes) > 1 and image_pattern.fullmatch(own):
            listing.problems.append(
                f"{own}: {several(found)}; choose one by --image-pattern, e.g. '{{case}}/{volumes[0].name}', or take "
                "the others out"
            )
            continue
        listing.files += volumes
        yield from names


def _volumes(folder: Path, files: list[Path]) -> tuple[list[Series], list[Path]]:
    """Series and paths of volumes; the folder itself where there is none: reading it says why."""
    try:
        found = find_series(files)
        return found, volumes_in(folder, found)[0]
    except DataError:
        return [], [folder]


def _names(listing: Listing, folder: Path, path: Path, found: list[Series]) -> tuple[str, ...]:
    """The paths by which a volume is called, that of its folder first if it is the only one."""
    if path != folder:
        return (listing.relative(path),)
    own = folder.name if folder == listing.root else listing.relative(folder)
    return (own, *(f"{listing.relative(folder)}/{series.name}" for series in found if not series.no_volume))
