"""DICOM series written by SimpleITK, and files that it would not write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

IMPLICIT = b"1.2.840.10008.1.2\0"
PATIENT = {"0010|0010": "DOE^JOHN", "0010|0020": "ID7719", "0010|0030": "19510203"}


def series(
    folder: Path,
    array: npt.NDArray[Any],
    *,
    number: int = 3,
    modality: str = "MR",
    positions: Sequence[float] | None = None,
    directions: Sequence[float] = (1, 0, 0, 0, 1, 0),
    shift: Sequence[float] = (0, 0),
    name: str = "IM{:04d}.dcm",
    slope: tuple[float, float] | None = None,
    tags: Mapping[str, str] | None = None,
) -> Path:
    """Write (columns, rows, slices) as a series of one file per slice; returns the folder.

    Args:
        folder: It is made.
        array: int16 stored values.
        number: Of the series; files of one number are one series.
        modality: Tag.
        positions: Of the slices along their normal, in mm; 3 mm apart by default.
        directions: Of the rows' and columns' index, LPS.
        shift: Of each slice against the one before along columns and rows, in mm.
        name: Of a file, by its number.
        slope: Rescale slope and intercept.
        tags: Other tags.
    """
    import SimpleITK

    itk: Any = SimpleITK
    folder.mkdir(parents=True, exist_ok=True)
    right, down = np.reshape(directions, (2, 3)).astype(float)
    normal = np.cross(right, down)
    writer = itk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetImageIO("GDCMImageIO")
    for index, plane in enumerate(np.moveaxis(array, 2, 0)):
        position = 10 + 3 * index if positions is None else positions[index]
        origin = normal * position + (right * shift[0] + down * shift[1]) * index + (5.0, 6.0, 0.0)
        image = itk.GetImageFromArray(np.ascontiguousarray(plane.T)[None], isVector=False)
        image.SetSpacing((1.5, 1.25, 1.0))
        values = {
            "0008|0008": "ORIGINAL\\PRIMARY\\AXIAL",
            "0008|0060": modality,
            "0020|000d": "1.2.3",
            "0020|000e": f"1.2.3.{number}",
            "0020|0011": str(number),
            "0020|0013": str(index + 1),
            "0008|0018": f"1.2.3.{number}.{index + 1}",
            "0020|0032": "\\".join(f"{value:.6f}" for value in origin),
            "0020|0037": "\\".join(f"{value:.6f}" for value in (*right, *down)),
            **PATIENT,
            **(tags or {}),
        }
        for tag, value in values.items():
            image.SetMetaData(tag, value)
        file = folder / name.format(index)
        writer.SetFileName(str(folder / f"{index}.writing.dcm"))
        writer.Execute(image)
        content = (folder / f"{index}.writing.dcm").read_bytes()
        (folder / f"{index}.writing.dcm").unlink()
        file.write_bytes(content if slope is None else rescaled(content, *slope))
    return folder


def rescaled(content: bytes, slope: float, intercept: float) -> bytes:
    """The file with another rescale slope and intercept; the stored values stay."""
    for element, value in ((b"\x28\x00\x52\x10", intercept), (b"\x28\x00\x53\x10", slope)):
        text = f"{value:g}".encode()
        text += b" " * (len(text) % 2)
        start = content.index(element)
        length = int.from_bytes(content[start + 4 : start + 8], "little")
        content = content[: start + 4] + len(text).to_bytes(4, "little") + text + content[start + 8 + length :]
    return content


def with_identifier(path: Path, element: int, value: bytes) -> None:
    """Replace an identifier of the file meta information: 2 is the kind of object, 16 the transfer syntax."""
    content = path.read_bytes()
    value += b"\0" * (len(value) % 2)
    start = content.index(b"\x02\x00" + bytes((element, 0)) + b"UI")
    length = int.from_bytes(content[start + 6 : start + 8], "little")
    total = int.from_bytes(content[140:144], "little") + len(value) - length
    changed = content[: start + 6] + len(value).to_bytes(2, "little") + value + content[start + 8 + length :]
    path.write_bytes(changed[:140] + total.to_bytes(4, "little") + changed[144:])
