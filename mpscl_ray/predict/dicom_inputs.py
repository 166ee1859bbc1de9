"""DICOM series among the inputs of predict: each volume is an image, called by its folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mpscl_ray.data.volumes.dicom import several, volumes_in
from mpscl_ray.data.volumes.dicom_files import find_series, is_directory_file
from mpscl_ray.data.volumes.dicom_paths import is_dicom
from mpscl_ray.errors import DataError
from mpscl_ray.prepare.file_listing import list_files


def series_below(folder: Path) -> tuple[list[Path], list[str]]:
    """The DICOM volumes of a folder and of the folders in it, and a sentence for each folder without one.

    Series that are no volumes, such as localisers, are said where there are volumes beside them.
    """
    try:
        files = list_files(folder).files
    except DataError:
        return [], []
    folders: dict[Path, list[Path]] = {}
    for path in files:
        if is_dicom(path) and not is_directory_file(path):
            folders.setdefault(path.parent, []).append(path)
    volumes: list[Path] = []
    wrong: list[str] = []
    for parent, slices in folders.items():
        try:
            found = find_series(slices)
            paths, others = volumes_in(parent, found)
        except DataError as error:
            wrong.append(str(error))
            continue
        volumes += paths
        if len(paths) > 1:
            left_out = f"; not segmented: {', '.join(one.describe() for one in others)}" if others else ""
            print(f"note: {parent} {several(found)}; each gets its label map{left_out}", file=sys.stderr)
    return volumes, wrong


def both_kinds(folder: Path, files: Sequence[Path]) -> str | None:
    """A sentence if a folder of images holds DICOM files as well: they may be the same scans."""
    dicom = [path.name for path in files if is_dicom(path)]
    if not dicom:
        return None
    return (
        f"{folder} holds DICOM files (e.g. {dicom[0]}) beside its other images; say which are meant: --pattern "
        "'*.nii.gz', or a folder of the DICOM files alone"
    )


def single_slices(inputs: Sequence[Path]) -> dict[Path, str]:
    """A sentence for each folder of which DICOM files are given one by one."""
    found: dict[Path, str] = {}
    for path in inputs:
        if path.is_file() and is_dicom(path):
            what = "the index of a DICOM disc" if is_directory_file(path) else "one file of a DICOM series"
            found.setdefault(path.parent, f"{path} is {what}; give the folder of the series: {path.parent}")
    return found
