"""Slices from TFRecord files, read without TensorFlow.

A TFRecord file is a chain of frames ``u64 length, u32 crc(length), payload, u32 crc(payload)``; each payload here is a
``tf.train.Example``, a protocol buffer whose one field maps names to lists of bytes, floats or integers. The records
of the SIFA / PnP-AdaNet release hold three neighbouring slices each (``data_vol``, ``label_vol``); the middle one is
the sample and the only labelled one.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpscl_ray.errors import DataError
from mpscl_ray.runs.storage import read_limited

Feature = list[bytes] | NDArray[np.float32] | list[int]

_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), bits reversed
_MASK_DELTA = 0xA282EAD8
_MAX_FILE_BYTES = 1 << 30
_MAX_RECORD_BYTES = 1 << 27
_MAX_INTEGERS = 1 << 16
"""Of one list; the sizes of slices are single ones."""
_LANES = 1024


class SliceRecord(NamedTuple):
    """One sample: an image slice and its raw label ids, both (H, W); the label is None if the record has none."""

    image: NDArray[np.float32]
    label: NDArray[np.float32] | None


# ---------------------------------------------------------------------------------------------------- checksums


@cache
def _byte_table() -> NDArray[np.uint32]:
    """CRC of each single byte."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_POLYNOMIAL), table >> 1).astype(np.uint32)
    return table


@cache
def _shift_tables(zero_bytes: int) -> tuple[tuple[int, ...], ...]:
    """Tables that advance a CRC register over ``zero_bytes`` zero bytes, one for each byte of the register."""
    table = [int(value) for value in _byte_table()]

    def advance_one(register: int) -> int:
        return table[register & 0xFF] ^ (register >> 8)

    def apply(columns: list[int], register: int) -> int:
        result = 0
        while register:
            lowest = register & -register
            result ^= columns[lowest.bit_length() - 1]
            register ^= lowest
        return result

    power = [advance_one(1 << bit) for bit in range(32)]  # the linear map "one zero byte", by its columns
    total = [1 << bit for bit in range(32)]
    remaining = zero_bytes
    while remaining:
        if remaining & 1:
            total = [apply(power, column) for column in total]
        power = [apply(power, column) for column in power]
        remaining >>= 1
    return tuple(tuple(apply(total, byte << (8 * position)) for byte in range(256)) for position in range(4))


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C of ``data``.

    A CRC is linear, so the buffer is cut into lanes that NumPy advances concurrently, and the lanes are joined by the
    map "advance over a lane of zeros": about 100 times faster than a loop over bytes.

    Source: RFC 3720, appendix B.4 (the test vectors).
    """
    table = _byte_table()
    values = np.frombuffer(data, dtype=np.uint8)
    length = len(values) // _LANES
    register = 0xFFFFFFFF
    if length:
        lanes = np.ascontiguousarray(values[: length * _LANES].reshape(_LANES, length).T)
        registers = np.zeros(_LANES, dtype=np.uint32)
        for column in lanes:
            registers = table[(registers ^ column) & 0xFF] ^ (registers >> 8)
        t0, t1, t2, t3 = _shift_tables(length)
        for lane in registers.tolist():
            register = (
                t0[register & 0xFF] ^ t1[register >> 8 & 0xFF] ^ t2[register >> 16 & 0xFF] ^ t3[register >> 24] ^ lane
            )
    plain = table.tolist()
    for value in values[length * _LANES :].tolist():
        register = plain[(register ^ value) & 0xFF] ^ (register >> 8)
    return register ^ 0xFFFFFFFF


def masked_crc32c(data: bytes | memoryview) -> int:
    """The rotated and offset CRC-32C that TFRecord frames carry."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


# ------------------------------------------------------------------------------------------------------ framing


def read_records(path: Path) -> Iterator[memoryview]:
    """Payload of each record of a file, both checksums verified.

    Raises:
        DataError: the file is empty, cut short, damaged or no TFRecord file.
    """
    try:
        data = memoryview(read_limited(path, _MAX_FILE_BYTES))
    except ValueError as error:
        raise DataError(f"{path}: {error}, expected one file for each slice, as in the release") from None
    if not data:
        raise DataError(f"{path}: the file is empty; copy or download it again")
    start = 0
    while start < len(data):
        if len(data) - start < 12:
            raise DataError(f"{path}: {len(data) - start} extra bytes after the last record; the file was cut short")
        header = data[start : start + 8]
        (length,) = struct.unpack("<Q", header)
        (crc,) = struct.unpack("<I", data[start + 8 : start + 12])
        if crc != masked_crc32c(header):
            what = "is not a TFRecord file (or is compressed)" if start == 0 else "is damaged"
            raise DataError(f"{path}: {what}: wrong checksum of the record header at byte {start}")
        if length > _MAX_RECORD_BYTES:
            raise DataError(f"{path}: a record of {length} bytes at byte {start}; at most {_MAX_RECORD_BYTES} are read")
        stop = start + 12 + length
        if len(data) < stop + 4:
            raise DataError(
                f"{path}: cut short: the record at byte {start} needs {length + 16} bytes, {len(data) - start} are left"
            )
        payload = data[start + 12 : stop]
        (crc,) = struct.unpack("<I", data[stop : stop + 4])
        if crc != masked_crc32c(payload):
            raise DataError(f"{path}: damaged: wrong checksum of the record at byte {start}; copy or download it again")
        yield payload
        start = stop + 4


# ------------------------------------------------------------------------------------------- protocol buffers


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Unsigned integer at ``at`` and the position after it; at most 10 bytes (a negative int64 takes all ten)."""
    value = 0
    for count in range(10):
        if at >= len(data):
            raise ValueError("a number runs over the end of the message")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value, at
    raise ValueError("a number longer than 10 bytes")


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field number and value of each field: an integer, or the bytes of a string, sub-message or fixed number."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire == 1:
            length = 8
        elif wire == 5:
            length = 4
        else:
            raise ValueError(f"protocol buffers have no wire type {wire}")
        if at + length > len(data):
            raise ValueError("a field runs over the end of the message")
        yield number, data[at : at + length]
        at += length


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number, expected text or a message")
    return value


def _signed(value: int) -> int:
    return ((value + 2**63) % 2**64) - 2**63


def _feature(data: memoryview) -> Feature:
    """The one list that a feature holds: bytes (1), floats (2) or integers (3), the last two packed or not."""
    for kind, body in _fields(data):
        entries = [value for number, value in _fields(_bytes(body)) if number == 1]
        if kind == 1:
            return [bytes(_bytes(value)) for value in entries]
        if kind == 2:
            return np.frombuffer(b"".join(bytes(_bytes(value)) for value in entries), dtype="<f4").astype(np.float32)
        if kind == 3:
            integers: list[int] = []
            for value in entries:
                if isinstance(value, int):
                    integers.append(_signed(value))
                    continue
                at = 0
                while at < len(value):
                    number, at = _varint(value, at)
                    integers.append(_signed(number))
                    if len(integers) > _MAX_INTEGERS:
                        raise ValueError(f"a list of more than {_MAX_INTEGERS} integers")
            return integers
    return []


def parse_example(payload: bytes | memoryview) -> dict[str, Feature]:
    """Features of a ``tf.train.Example`` by name.

    Raises:
        ValueError: the message is malformed.
    """
    features: dict[str, Feature] = {}
    for number, body in _fields(memoryview(payload)):
        if number != 1:
            continue
        for entry_number, entry in _fields(_bytes(body)):
            if entry_number != 1:
                continue
            name, value = "", memoryview(b"")
            for part, content in _fields(_bytes(entry)):
                if part == 1:
                    name = bytes(_bytes(content)).decode("utf-8")
                elif part == 2:
                    value = _bytes(content)
            features[name] = _feature(value)
    return features


# -------------------------------------------------------------------------------------------------------- slices


def _shape(features: dict[str, Feature], prefix: str) -> tuple[int, ...]:
    shape = []
    for axis in range(3):
        size = features.get(f"{prefix}_dim{axis}")
        if not isinstance(size, list) or len(size) != 1 or not isinstance(size[0], int):
            raise ValueError(f"`{prefix}_dim{axis}` is missing or no single integer")
        shape.append(size[0])
    return tuple(shape)


def _middle_slice(features: dict[str, Feature], name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Middle slice of a raw little-endian float32 volume (H, W, neighbours), C order."""
    raw = features[name]
    if isinstance(raw, np.ndarray):
        values = raw
    elif len(raw) == 1 and isinstance(raw[0], bytes) and len(raw[0]) % 4 == 0:
        values = np.frombuffer(raw[0], dtype="<f4").astype(np.float32)
    else:
        raise ValueError(f"`{name}` is neither one string of float32 values nor a list of floats")
    if min(shape) < 1 or values.size not in (math.prod(shape), shape[0] * shape[1]):
        raise ValueError(f"`{name}` has {values.size} values, its sizes say {' x '.join(map(str, shape))}")
    volume = values.reshape(shape[0], shape[1], -1)  # some records give the label's one slice under the size of three
    return np.ascontiguousarray(volume[:, :, volume.shape[2] // 2])


def read_slices(path: Path) -> list[SliceRecord]:
    """The labelled middle slice of every record of a SIFA / PnP-AdaNet file; other features are ignored.

    Raises:
        DataError: the file is damaged, or a record is no such sample.
    """
    slices = []
    for index, payload in enumerate(read_records(path)):
        try:
            features = parse_example(payload)
            if "data_vol" not in features:
                raise ValueError(f"no feature `data_vol` among {sorted(features)}")
            image = _middle_slice(features, "data_vol", _shape(features, "dsize"))
            label = None
            if "label_vol" in features:
                label = _middle_slice(features, "label_vol", _shape(features, "lsize"))
        except (ValueError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path}: record {index} is no SIFA / PnP-AdaNet sample: {error}; expected `data_vol` and `label_vol` "
                "with `dsize_dim0..2` and `lsize_dim0..2`"
            ) from error
        if label is not None and label.shape != image.shape:
            raise DataError(
                f"{path}: record {index}: the image is {image.shape[0]} x {image.shape[1]}, "
                f"its label {label.shape[0]} x {label.shape[1]}"
            )
        slices.append(SliceRecord(image, label))
    return slices
