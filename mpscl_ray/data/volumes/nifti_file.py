"""The bytes of a NIfTI file: every byte is read and checked, and the header is checked before memory is allocated.

nibabel stops reading after the last voxel, so the checksum at the end of a ``.nii.gz`` is never compared and a flipped
bit becomes a wrong voxel. Here the whole stream is decompressed, which compares the checksum.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
import numpy.typing as npt

from mpscl_ray.data.volumes.dicom import read_dicom
from mpscl_ray.data.volumes.dicom_files import is_directory_file
from mpscl_ray.data.volumes.dicom_paths import is_dicom, is_series
from mpscl_ray.data.volumes.file_names import ITK_ENDINGS, VOLUME_ENDINGS, has_ending
from mpscl_ray.data.volumes.itk_file import DEFLATE_LIMIT, read_itk
from mpscl_ray.errors import DataError

_CHUNK = 1 << 20
_TRAILING_LIMIT = 1 << 20
"""Largest number of bytes after the voxels that is ignored; some writers pad their files."""
_EXTENSIONS_LIMIT = 1 << 28
_SIZE_OF_HEADER = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
_MAGIC = {348: (344, b"n+1"), 540: (4, b"n+2")}
READABLE_TYPES = {
    2: "u1",
    4: "i2",
    8: "i4",
    16: "f4",
    64: "f8",
    256: "i1",
    512: "u2",
    768: "u4",
    1024: "i8",
    1280: "u8",
}
"""NIfTI datatype codes of real numbers, and what they are in numpy."""
_OTHER_TYPES = {
    1: "binary",
    32: "complex64",
    128: "RGB24",
    1536: "float128",
    1792: "complex128",
    2048: "complex256",
    2304: "RGBA32",
}
_LOOKS_LIKE = (
    (b"NRRD", "an NRRD file"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x89HDF", "an HDF5 file"),
    (b"ObjectType", "a MetaImage file"),
    (b"version https://git-lfs", "a Git LFS pointer whose file was not downloaded"),
    (b"<", "a web page, perhaps of a download that needs a login"),
    (b"\x1f\x8b", "a gzip file"),
)


@dataclass(frozen=True)
class StoredVolume:
    """What a file holds, before any intensity scaling."""

    header: Any
    """nibabel header as stored, extensions included."""
    voxels: npt.NDArray[Any]
    """Flat, in file order and file type."""
    shape: tuple[int, ...]
    """As in the header."""
    sha256: str
    """SHA-256 of the file on disk; of a DICOM series, of its files in the order of the slices."""
    notices: tuple[str, ...]
    private: tuple[str, ...] = ()
    """Kinds of texts that may name a person and are not in the header."""
    scanner: str = ""
    """Modality by the DICOM header."""
    segments: Mapping[int, str] = field(default_factory=dict)
    """Names of label values in a segmentation of 3D Slicer."""


def read_stored(path: Path, max_voxels: int) -> StoredVolume:
    """Read a whole ``.nii``, ``.nii.gz``, ``.nrrd``, ``.mha`` or DICOM series.

    Args:
        path: File of a single volume, NIfTI-1 or NIfTI-2, either byte order; or the folder of a DICOM series.
        max_voxels: Largest volume that is read.

    Raises:
        DataError: The file is missing, truncated, damaged, not NIfTI, not what its name says, or too large.
    """
    if is_series(path):
        return StoredVolume(*read_dicom(path, max_voxels))
    if not os.path.lexists(path):
        raise DataError(f"{path}: there is no such file; check the path")
    if not has_ending(path.name, VOLUME_ENDINGS):
        raise DataError(
            f"{path} is {_other_format(path)}; expected .nii, .nii.gz, .nrrd, .mha or a folder with a DICOM series"
        )
    try:
        if not path.is_file() and path.exists():
            raise DataError(f"{path} is no regular file, expected a NIfTI volume; check the path")
        size = path.stat().st_size
        if has_ending(path.name, ITK_ENDINGS) and size:
            return StoredVolume(*read_itk(path, max_voxels))
        with path.open("rb") as file:
            return _read(path, file, size, has_ending(path.name, (".gz",)), max_voxels)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}); check the path and its permissions"
        ) from error


def _read(path: Path, file: BinaryIO, size: int, zipped: bool, max_voxels: int) -> StoredVolume:
    if size == 0:
        raise DataError(f"{path} is empty (0 bytes), expected a NIfTI volume; copy or download it again")
    _check_name(path, file.read(540), zipped)
    file.seek(0)
    digest = hashlib.sha256()
    stream = _Stream(_gunzip(path, file, digest) if zipped else _plain(file, digest))
    start = stream.take(352)
    header_size, endianness = _header_kind(path, start)
    start += stream.take(header_size + 4 - len(start))
    if len(start) < header_size + 4:
        raise DataError(f"{path} ends after {len(start)} bytes, within the header; copy or download it again")
    header_class: Any = _SIZE_OF_HEADER[header_size]
    header = header_class(start[:header_size], endianness=endianness, check=False)
    shape, dtype = _check_header(path, header, max_voxels)
    offset = _check_offset(path, header, len(start), dtype.itemsize)
    wanted = math.prod(shape) * dtype.itemsize
    room = size * DEFLATE_LIMIT if zipped else size
    if offset + wanted > room:
        held = f"its {size} bytes" + (" of gzip data" if zipped else "")
        raise DataError(
            f"{path} is truncated or its header is wrong: {held} cannot hold the {offset + wanted} bytes of a volume "
            f"of {_times(shape)} {dtype.name} voxels; copy or download it again"
        )
    between = stream.take(offset - len(start))
    voxels = np.empty(wanted, dtype=np.uint8)
    filled = len(between) + len(start) + stream.fill(voxels)
    if filled < offset + wanted:
        raise DataError(
            f"{path} is truncated: it holds {filled} bytes, expected {offset + wanted} for a volume of {_times(shape)} "
            f"{dtype.name} voxels; copy or download it again"
        )
    notices = []
    if complaint := _add_extensions(header, (start + between)[header_size:], endianness):
        notices.append(complaint)
    surplus = stream.drain(_TRAILING_LIMIT)
    if surplus > _TRAILING_LIMIT:
        raise DataError(
            f"{path} continues for more than {_TRAILING_LIMIT} bytes after its {_times(shape)} {dtype.name} voxels, so "
            f"header and data disagree; export it again"
        )
    if surplus:
        notices.append(f"{surplus} bytes after the voxels were ignored")
    stored = voxels.view(dtype)
    _check_byte_order(path, stored)
    return StoredVolume(header, stored, shape, digest.hexdigest(), tuple(notices))


class _Stream:
    """A sequence of byte strings, read like a stream."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def _next(self, most: int) -> memoryview:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return memoryview(b"")
            self._rest = memoryview(piece)
        taken, self._rest = self._rest[:most], self._rest[most:]
        return taken

    def take(self, count: int) -> bytes:
        """At most this many bytes; fewer only at the end."""
        parts = []
        while count > 0 and (part := self._next(count)):
            parts.append(bytes(part))
            count -= len(part)
        return b"".join(parts)

    def fill(self, target: npt.NDArray[np.uint8]) -> int:
        """Fill the array; returns the number of bytes there were."""
        done = 0
        while done < target.size and (part := self._next(target.size - done)):
            target[done : done + len(part)] = np.frombuffer(part, dtype=np.uint8)
            done += len(part)
        return done

    def drain(self, most: int) -> int:
        """Read to the end, or until more than ``most`` bytes were read; returns the number of bytes."""
        count = 0
        while count <= most and (part := self._next(_CHUNK)):
            count += len(part)
        return count


def _plain(file: BinaryIO, digest: hashlib._Hash) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
        yield chunk


def _gunzip(path: Path, file: BinaryIO, digest: hashlib._Hash) -> Iterator[bytes]:
    """Decompressed pieces of all gzip members; their checksums and lengths are compared."""
    decompressor = zlib.decompressobj(wbits=31)
    pending = b""
    try:
        while True:
            if not pending:
                pending = file.read(_CHUNK)
                digest.update(pending)
                if not pending:
                    break
            if decompressor.eof:
                # Between members: zero padding is allowed, as gzip itself allows it.
                pending = pending.lstrip(b"\0")
                if not pending:
                    continue
                decompressor = zlib.decompressobj(wbits=31)
            piece = decompressor.decompress(pending, _CHUNK)
            pending = decompressor.unused_data if decompressor.eof else decompressor.unconsumed_tail
            if piece:
                yield piece
    except zlib.error as error:
        raise DataError(
            f"{path} is damaged: its gzip data do not decompress to what was stored ({error}); copy or download it "
            f"again"
        ) from error
    if not decompressor.eof:
        raise DataError(f"{path} is truncated: its gzip data end too early; copy or download it again")


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in shape)


def _other_format(path: Path) -> str:
    if is_dicom(path):
        what = "the index of a DICOM disc" if is_directory_file(path) else "one file of a DICOM series"
        return f"{what}: give the folder that holds the slices"
    return f"a file that ends in {path.suffix!r}" if path.suffix else "a file without an ending"


def _kind_of(start: bytes) -> tuple[int, str] | None:
    """Header size and byte order if the bytes begin like NIfTI-1, Analyze or NIfTI-2."""
    for endianness in "<>":
        if len(start) >= 4 and (size := struct.unpack(endianness + "i", start[:4])[0]) in _SIZE_OF_HEADER:
            return size, endianness
    return None


def _looks_like(start: bytes) -> str:
    if start[128:132] == b"DICM":
        return "a DICOM file; give the folder of its series"
    for magic, description in _LOOKS_LIKE:
        if start.lstrip().startswith(magic):
            return description
    return "no format known here; export or download it again"


def _check_name(path: Path, start: bytes, zipped: bool) -> None:
    is_gzip = start.startswith(b"\x1f\x8b")
    if zipped and not is_gzip:
        if _kind_of(start):
            raise DataError(f"{path} is not compressed although its name says so; rename it to end in .nii")
        raise DataError(f"{path} is not NIfTI: its first bytes {start[:8]!r} are those of {_looks_like(start)}")
    if is_gzip and not zipped:
        raise DataError(
            f"{path} is compressed with gzip although its name does not say so; rename it to end in .nii.gz"
        )


def _header_kind(path: Path, start: bytes) -> tuple[int, str]:
    kind = _kind_of(start)
    if kind is None:
        raise DataError(f"{path} is not NIfTI: its first bytes {start[:8]!r} are those of {_looks_like(start)}")
    if len(start) < 348:
        raise DataError(
            f"{path} ends after {len(start)} bytes, too few for a NIfTI header of {kind[0]}; copy or download it again"
        )
    position, magic = _MAGIC[kind[0]]
    found = start[position : position + 3]
    if found == b"ni1" or found == b"ni2":
        raise DataError(f"{path} holds only the header of a .hdr/.img pair; convert the pair to one .nii.gz file")
    if found != magic:
        raise DataError(
            f"{path} has no NIfTI mark (found {found!r}, expected {magic!r}), as in Analyze files, which do not say "
            f"left from right; convert it to NIfTI"
        )
    return kind


def _check_header(path: Path, header: Any, max_voxels: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
    code = int(header["datatype"])
    if code not in READABLE_TYPES:
        found = _OTHER_TYPES.get(code, "unknown")
        raise DataError(
            f"{path} has voxels of type {found} (NIfTI code {code}); expected integers or real numbers of up to 64 "
            f"bits, convert it to a grey-value image"
        )
    dim = [int(n) for n in header["dim"]]
    shape = tuple(dim[1 : dim[0] + 1]) if 1 <= dim[0] <= 7 else ()
    if not shape or min(shape) < 1:
        raise DataError(f"{path} has impossible dimensions {dim} in its header; export or download it again")
    if math.prod(shape) > max_voxels:
        raise DataError(
            f"{path} claims {_times(shape)} voxels, more than the limit of {max_voxels}; its header is damaged, or the "
            f"volume has to be cropped or resampled first"
        )
    return shape, np.dtype(READABLE_TYPES[code]).newbyteorder(header.endianness)


def _check_offset(path: Path, header: Any, header_bytes: int, itemsize: int) -> int:
    offset = float(header["vox_offset"])
    # Zero is written by some tools and means: directly after the header.
    if offset == 0:
        return header_bytes
    if not (math.isfinite(offset) and header_bytes <= offset <= _EXTENSIONS_LIMIT):
        raise DataError(
            f"{path} says that its voxels begin at byte {offset:g}; expected {header_bytes} or a little more, "
            f"export it again"
        )
    # NIfTI-1 asks for a multiple of 16; any whole voxel is fine, but half a voxel turns the image into noise.
    if offset % math.gcd(itemsize, 16):
        raise DataError(
            f"{path} says that its voxels of {itemsize} bytes begin at byte {offset:g}; expected {header_bytes} or "
            f"another multiple of 16, export it again"
        )
    return int(offset)


def _check_byte_order(path: Path, voxels: npt.NDArray[Any]) -> None:
    """Refuse integers that are noise as stored and an image when their bytes are swapped."""
    if voxels.dtype.kind not in "iu" or voxels.dtype.itemsize == 1:
        return
    middle = voxels[max(0, (voxels.size - _CHUNK) // 2) :][:_CHUNK]
    types = np.iinfo(voxels.dtype)
    if float(middle.max()) - float(middle.min()) < 0.5 * (float(types.max) - float(types.min)):
        return  # low bytes in place of high ones fill most of the range
    found = _roughness(middle)
    if found > 0.3 and _roughness(middle.byteswap()) < 0.7 * found:
        raise DataError(
            f"{path} has noise as voxels, but an image if the bytes of each are swapped: the byte order in its "
            f"header is not that of its voxels; export it again"
        )


def _roughness(voxels: npt.NDArray[Any]) -> float:
    """Mean difference of neighbours by the standard deviation."""
    values = voxels.astype(np.float64)
    deviation = float(values.std())
    return float(np.abs(np.diff(values)).mean()) / deviation if deviation > 0 else 0.0


def _add_extensions(header: Any, block: bytes, endianness: str) -> str:
    """Add the extensions between header and voxels to the header, as plain bytes; returns what is wrong with them.

    They may hold names of people: they are reported and never written to another file.
    """
    if block[:1] in (b"", b"\0"):
        return ""
    block = block[4:]
    while len(block) >= 16:
        size, code = struct.unpack(endianness + "2i", block[:8])
        if not 8 <= size <= len(block):
            return "a header extension of impossible size was ignored"
        header.extensions.append(nib.nifti1.Nifti1Extension(code, block[8:size]))
        block = block[size:]
    return ""
