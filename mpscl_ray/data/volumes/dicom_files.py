"""The headers of DICOM files: which slices a folder holds, by series. No voxels are read here.

Texts of patients are never kept; only the names of the fields that have some are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpscl_ray.data.volumes.dicom_paths import DICOM_MARK
from mpscl_ray.data.volumes.geometry import FloatArray
from mpscl_ray.errors import DataError
from mpscl_ray.runs.wording import counted

_DIRECTORY = "1.2.840.10008.1.3.10"
_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_NO_IMAGES = re.compile(r"1\.2\.840\.10008\.(1\.3\.10|5\.1\.4\.1\.1\.(11|66|67|88|104|481)(\.\d+)*|5\.1\.4\.3\d.*)")
"""SOP classes of files without voxels that belong to scans: directories, reports, presentation states, plans."""
_READABLE = re.compile(r"1\.2\.840\.10008\.1\.2(\.1|\.1\.99|\.2|\.5|\.4\.(50|51|53|55|57|70|80|81|90|91))?")
"""Transfer syntaxes that SimpleITK reads."""
_PRIVATE = {
    "PatientName": "0010|0010",
    "PatientID": "0010|0020",
    "PatientBirthDate": "0010|0030",
    "OtherPatientIDs": "0010|1000",
    "PatientAddress": "0010|1040",
    "PatientComments": "0010|4000",
    "InstitutionName": "0008|0080",
    "ReferringPhysicianName": "0008|0090",
    "AccessionNumber": "0008|0050",
}


@dataclass(frozen=True)
class Slice:
    """What the header of a file says."""

    path: Path
    series: str
    number: str
    modality: str
    size: tuple[int, int]
    """Columns and rows."""
    frames: int
    origin: FloatArray
    """Position of the first pixel in mm, LPS."""
    directions: FloatArray
    """(3, 2): directions of the columns' and the rows' index, LPS."""
    spacing: tuple[float, float] | None
    """Distance of columns and of rows in mm; None if the header does not say it."""
    unusable: str
    """Why it cannot be a slice of a volume, if so."""
    private: tuple[str, ...]
    """Fields with texts that may name a person."""


@dataclass(frozen=True)
class Series:
    """The slices of a series, in the order of their files' names."""

    name: str
    """``series3``: the number in the header, and a count where a folder has several of that number."""
    slices: tuple[Slice, ...]

    @property
    def no_volume(self) -> str:
        """Why it cannot be a volume, if so."""
        unusable = [one.unusable for one in self.slices if one.unusable]
        if 2 * len(unusable) > len(self.slices):
            return unusable[0]
        return "one slice" if len(self.slices) == 1 and self.slices[0].frames == 1 else ""

    def describe(self) -> str:
        """Name, number of slices, and why it is no volume."""
        reason = self.no_volume
        slices = [counted(len(self.slices), "slice")] if reason != "one slice" else []
        return f"{self.name} ({', '.join([*slices, *filter(None, [reason])])})"


def find_series(files: Sequence[Path]) -> list[Series]:
    """The series of the DICOM files of a folder, sorted by number.

    Args:
        files: DICOM files; those without voxels are left out.

    Raises:
        DataError: A file is damaged, or compressed in a way that is not read.
    """
    slices: dict[str, list[Slice]] = {}
    broken: list[str] = []
    for file in sorted(files):
        start = _meta(file)
        kind, syntax = _identifier(start, 2), _identifier(start, 16)
        if _NO_IMAGES.fullmatch(kind) or file.name.upper() == "DICOMDIR":
            continue
        if syntax and not _READABLE.fullmatch(syntax):
            raise DataError(
                f"{file} is compressed in a way that is not read (transfer syntax {syntax}); decompress the series "
                "first, e.g. with dcm2niix -ba y, or export it uncompressed"
            )
        one = _read_header(file, kind)
        if one is None:
            broken.append(file.name)
        else:
            slices.setdefault(one.series, []).append(one)
    if broken:
        folder, more = files[0].parent, f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise DataError(
            f"{folder}: DICOM files that are truncated or damaged, {len(broken)}: {', '.join(broken[:3])}{more}; copy "
            "or export them again"
        )
    return _named(slices)


def _named(slices: dict[str, list[Slice]]) -> list[Series]:
    groups = sorted(slices.values(), key=lambda group: (int(group[0].number), group[0].series))
    numbers = [group[0].number for group in groups]
    found = []
    for index, group in enumerate(groups):
        again = f"_{numbers[:index].count(numbers[index]) + 1}" if numbers.count(numbers[index]) > 1 else ""
        found.append(Series(f"series{numbers[index]}{again}", tuple(group)))
    return found


def _meta(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(1024)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions") from error


def _identifier(start: bytes, element: int) -> str:
    """An identifier of the file meta information: element 2 is the kind of object, 16 the transfer syntax."""
    position = start.find(b"\x02\x00" + bytes((element, 0)) + b"UI", 132)
    if start[128:132] != DICOM_MARK or position < 0:
        return ""
    length = int.from_bytes(start[position + 6 : position + 8], "little")
    return start[position + 8 : position + 8 + length].rstrip(b"\0 ").decode("ascii", "replace")


def is_directory_file(path: Path) -> bool:
    """Whether a file is the index of a DICOM disc."""
    return path.name.upper() == "DICOMDIR" or _identifier(_meta(path), 2) == _DIRECTORY


def _read_header(path: Path, kind: str) -> Slice | None:
    """The header of a file; None if it cannot be read."""
    import SimpleITK  # Not at the top: few datasets need it, and it takes a while.

    itk: Any = SimpleITK
    reader = itk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    keys = set(reader.GetMetaDataKeys())

    def text(tag: str) -> str:
        return str(reader.GetMetaData(tag)).strip("\0 ") if tag in keys else ""

    size, spacing = reader.GetSize(), reader.GetSpacing()
    dimension = len(size)
    directions = np.reshape(reader.GetDirection(), (dimension, dimension))
    unusable = ""
    if reader.GetNumberOfComponents() != 1:
        unusable = "colour pictures"
    elif re.search(r"LOCALI[SZ]ER|SCOUT|TOPOGRAM", text("0008|0008").upper()):
        unusable = "a localiser"
    elif kind == _CAPTURE or not (text("0020|0032") and text("0020|0037")):
        unusable = "pictures without a position, as of a screen (secondary capture)"
    return Slice(
        path,
        series=text("0020|000e"),
        number=text("0020|0011") if text("0020|0011").isdecimal() else "0",
        modality=text("0008|0060").upper(),
        size=(int(size[0]), int(size[1])),
        frames=int(size[2]) if dimension > 2 else 1,
        origin=np.resize(np.asarray(reader.GetOrigin(), dtype=np.float64), 3),
        directions=directions[:3, :2] if dimension > 2 else np.eye(3)[:, :2],
        spacing=(float(spacing[0]), float(spacing[1])) if text("0028|0030") else None,
        unusable=unusable,
        private=tuple(name for name, tag in _PRIVATE.items() if text(tag).strip("^")),
    )
