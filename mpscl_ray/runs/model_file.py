"""A model as one file: a zip archive with the weights of one checkpoint and all that a prediction needs besides.

Members, in this order::

    model.json            classes, network, how volumes become slices, label ids, which checkpoint; the format's version
    config.yaml           settings of the training, without paths
    card.json, card.md    what it was trained on, how well it did, what it is for
    weights.safetensors   the segmenter
    SHA256SUMS            of the others, as ``sha256sum -c`` reads it

They are stored as they are, with one date, so that equal contents give equal files. Nothing is pickled.

A file may come from anybody. :func:`unpack` allocates nothing by what the file says of itself before that is checked
against the file's real size, takes no other names than these, and verifies all hashes before it parses a member.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

from mpscl_ray.errors import DataError
from mpscl_ray.runs import safe_json

FORMAT = "mpscl_ray model"
VERSION = 1
SUFFIX = ".mpscl"
MODEL, CONFIG, CARD, CARD_TEXT = "model.json", "config.yaml", "card.json", "card.md"
WEIGHTS, SUMS = "weights.safetensors", "SHA256SUMS"
MEMBERS = (MODEL, CONFIG, CARD, CARD_TEXT, WEIGHTS, SUMS)

LARGEST_FILE = 1 << 30
"""Bytes of a whole file: six times the paper's network."""
_LARGEST_TEXT = 1 << 20
"""Bytes of any member but the weights, and of the header of the weights."""
_LARGEST_NUMBER = 8192
"""Limit of what decides how much memory a network or a slice takes: channels, classes, rows and columns."""
_DATE = (1980, 1, 1, 0, 0, 0)
_END = struct.Struct("<4s4H2LH")
"""Record at the end of an archive; its fields: signature, disks, counts, size and place of the directory, comment."""
_LARGEST_DIRECTORY = 1 << 12
_ADVICE = "copy it again from where it came, or export it again"


def pack(members: Mapping[str, bytes]) -> bytes:
    """The file with these members, all of :data:`MEMBERS` but the sums."""
    contents = {name: members[name] for name in MEMBERS if name != SUMS}
    lines = [f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in contents.items()]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in {**contents, SUMS: "".join(lines).encode()}.items():
            entry = zipfile.ZipInfo(name, _DATE)
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            archive.writestr(entry, data)
    return buffer.getvalue()


def unpack(data: bytes, file: str) -> dict[str, bytes]:
    """The members of a model file, verified.

    Args:
        data: contents of the file, at most :data:`LARGEST_FILE` bytes.
        file: its name, for messages.

    Raises:
        DataError: it is no model file, damaged, of a newer version, or holds what no model file holds.
    """
    try:
        return _unpack(data)
    except _Wrong as wrong:
        raise DataError(f"{file} {wrong}") from wrong
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, struct.error) as error:
        raise DataError(f"{file} is damaged, its archive cannot be read ({error}); {_ADVICE}") from error


class _Wrong(ValueError):
    """What is wrong with a file, after its name."""


def _unpack(data: bytes) -> dict[str, bytes]:
    _check_directory(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        _check_entries(entries, len(data))
        names = [entry.filename for entry in entries]
        if MODEL in names:
            _check_version(archive.read(MODEL))
        if extra := sorted(set(names) - set(MEMBERS)):
            raise _Wrong(
                f"holds {extra[0]!r}, which no model file holds; use it only if you know who changed it, and how"
            )
        if missing := sorted(set(MEMBERS) - set(names)):
            raise _Wrong(f"is no model file: it has no {missing[0]}; give one that python -m mpscl_ray.export wrote")
        if len(names) != len(MEMBERS):
            raise _Wrong(f"is damaged: it has a member twice; {_ADVICE}")
        members = {entry.filename: archive.read(entry) for entry in entries}
    _check_sums(members)
    _check_contents(members)
    return members


def _check_directory(data: bytes) -> None:
    """The end of an archive, before zipfile makes an object of each entry that it announces."""
    if not data.startswith(b"PK\x03\x04"):
        raise _Wrong(
            f"is no model file (first bytes {data[:4]!r}); give the folder of a run, or a file that python -m "
            "mpscl_ray.export wrote"
        )
    end = data[-_END.size :]
    signature, *_, count, size, place, comment = _END.unpack(end) if len(end) == _END.size else (b"", 0, 0, 0, 0)
    large = data[-_END.size - 20 : -_END.size - 16] == b"PK\x06\x07"  # a second record, with larger numbers
    if signature != b"PK\x05\x06" or comment or large or place + size + _END.size != len(data):
        raise _Wrong(f"is truncated or damaged: it does not end as a model file does; {_ADVICE}")
    if count > 4 * len(MEMBERS) or size > _LARGEST_DIRECTORY:
        raise _Wrong(f"is no model file: it has {count} members, a model file {len(MEMBERS)}")


def _check_entries(entries: list[zipfile.ZipInfo], available: int) -> None:
    """Names and sizes, before anything is read: a stored member is as large as it says, so nothing can expand."""
    for entry in entries:
        if entry.filename.startswith("/") or ".." in entry.filename or re.search(r"[\\/:\0]", entry.filename):
            raise _Wrong(f"holds {entry.filename!r}, a path that leads out of it; do not use it")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise _Wrong(
                f"holds {entry.filename} compressed ({entry.compress_size} bytes for {entry.file_size}), which model "
                f"files are not; {_ADVICE}"
            )
        if entry.filename != WEIGHTS and entry.file_size > _LARGEST_TEXT:
            raise _Wrong(f"holds {entry.filename} of {entry.file_size} bytes, expected at most {_LARGEST_TEXT}")
    if sum(entry.file_size for entry in entries) > available:
        raise _Wrong(f"is damaged: its members are larger than the file; {_ADVICE}")


def _check_version(text: bytes) -> None:
    """Refuse a newer format, which may have other members; what is damaged is found by its hash."""
    try:
        version = safe_json.loads(text)["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    if isinstance(version, int) and version > VERSION:
        raise _Wrong(f"has version {version} of the format, this mpscl_ray reads {VERSION}; use a newer mpscl_ray")


def _check_sums(members: Mapping[str, bytes]) -> None:
    lines = re.findall(r"^([0-9a-f]{64})  (.+)$", members[SUMS].decode("ascii", "replace"), re.MULTILINE)
    told = {name: digest for digest, name in lines}
    for name in MEMBERS[:-1]:
        found = hashlib.sha256(members[name]).hexdigest()
        if told.get(name) != found:
            raise _Wrong(f"is damaged: {name} has the SHA-256 {found}, {SUMS} says {told.get(name)}; {_ADVICE}")


def _check_contents(members: Mapping[str, bytes]) -> None:
    """Whether description and weights are of one network, found without making one."""
    try:
        model = safe_json.loads(members[MODEL])
        network, size = model["network"], model["size"]
        if model["format"] != FORMAT or model["format_version"] != VERSION:
            raise ValueError(f"format {model['format']!r}, version {model['format_version']!r}")
        largest = max(_numbers([network, size, _recipes(model)]), default=0)
        stored = _stored_tensors(members[WEIGHTS])
        too_large = largest > _LARGEST_NUMBER or sum(network.get("layers", ())) > len(stored)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise _Wrong(f"is no model file that this version knows ({reason}); export it again") from error
    if too_large:
        raise _Wrong(f"describes a network that its {len(stored)} tensors cannot be of; export it again")
    if misfit := _misfit(network, stored):
        raise _Wrong(f"has weights of another network than the one that it describes: {misfit}; export it again")


def _recipes(model: Mapping[str, Any]) -> list[Any]:
    """What decides the size of slices in both domains."""
    return [model[domain]["recipe"].get(name) for domain in ("source", "target") for name in ("crop", "size")]


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)


def _stored_tensors(data: bytes) -> dict[str, tuple[str, list[int]]]:
    """Name -> type and shape, from the header of a safetensors file. Raises ValueError, KeyError or TypeError."""
    length = int.from_bytes(data[:8], "little")
    if length > min(_LARGEST_TEXT, len(data) - 8):
        raise ValueError(f"a header of {length} bytes in {WEIGHTS}")
    header = safe_json.loads(data[8 : 8 + length])
    return {name: (str(entry["dtype"]), list(entry["shape"])) for name, entry in header.items()}


def _misfit(network: Mapping[str, Any], stored: Mapping[str, tuple[str, list[int]]]) -> str:
    """How the stored tensors differ from those of a network; empty if they fit."""
    import torch

    from mpscl_ray.networks import build

    try:
        with torch.device("meta"):
            wanted = build(network).state_dict()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"there is no such network ({error})"
    kinds = {torch.float32: "F32", torch.int64: "I64"}
    shapes = {name: (kinds.get(tensor.dtype, ""), list(tensor.shape)) for name, tensor in wanted.items()}
    different = sorted(name for name in shapes.keys() | stored.keys() if shapes.get(name) != stored.get(name))
    return f"{len(different)} of {len(shapes)} tensors differ, such as {different[0]}" if different else ""
