"""Arrays of numbers in ``.npz`` files that anyone may have written: nothing is allocated that the file cannot hold."""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_BYTES = 1 << 34
"""Of all arrays of a file together."""
_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read(file: Path, max_bytes: int = MAX_BYTES) -> dict[str, NDArray[Any]]:
    """The arrays of a file by name; the checksum of each is compared.

    Raises:
        ValueError: It is no such file, damaged, larger than the limit, or an array says that it is larger than it is.
        OSError: It cannot be read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            unpacked = sum(member.file_size for member in members)
            if unpacked > max_bytes:
                raise ValueError(f"it unpacks to {unpacked} bytes, expected at most {max_bytes}")
            if damaged := archive.testzip():
                raise ValueError(f"wrong checksum of {damaged}")
            for member in members:
                _check_shape(archive, member)
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    # RuntimeError: the archive is encrypted, or compressed in a way that Python does not know. SyntaxError, TokenError:
    # the header of an array is no Python literal.
    except (zipfile.BadZipFile, EOFError, RuntimeError, OverflowError, SyntaxError, TokenError, zlib.error) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _check_shape(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in _READ_HEADER:
            raise ValueError(f"{member.filename} has version {version} of the npy format")
        shape, _, dtype = _READ_HEADER[version](stream)
    if math.prod(shape) * dtype.itemsize > member.file_size:
        raise ValueError(f"{member.filename} has the shape {shape} in its header, and {member.file_size} bytes")
