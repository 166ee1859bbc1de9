"""Which files are DICOM, and the paths of series.

A series is called by its folder, or, where a folder holds several, by ``FOLDER/seriesNUMBER``: there is no such file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

DICOM_MARK = b"DICM"
_OTHER_ENDINGS = (".nii", ".gz", ".nrrd", ".mha", ".json", ".txt", ".csv", ".npz", ".npy", ".png", ".pdf", ".tfrecords")
_SERIES = re.compile(r"series(\d+)(_\d+)?")


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, by its name or the mark after the preamble."""
    if path.suffix.lower() in (".dcm", ".ima") or path.name.upper() == "DICOMDIR":
        return True
    if path.name.lower().endswith(_OTHER_ENDINGS):
        return False
    try:
        with path.open("rb") as stream:
            return stream.read(132)[128:] == DICOM_MARK
    except OSError:
        return False


def is_series(path: Path) -> bool:
    """Whether a path names a DICOM series: a folder, or a series of a folder that holds several."""
    return path.is_dir() or (bool(_SERIES.fullmatch(path.name)) and not os.path.lexists(path) and path.parent.is_dir())


def series_files(path: Path) -> list[Path]:
    """The files of the folder that a series is in; several series of a folder share them."""
    folder = path if path.is_dir() else path.parent
    return sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
