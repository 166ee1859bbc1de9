"""The files of a checkpoint as they are on disk: read with a limit, hashed, and compared with its SHA256SUMS."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpscl_ray.errors import DataError, StorageError
from mpscl_ray.runs import safe_json
from mpscl_ray.runs.storage import read_limited

FORMAT = "mpscl_ray checkpoint"
VERSION = 1
TENSORS = "tensors.safetensors"
FIXED = "fixed.safetensors"
STATE = "state.json"
SUMS = "SHA256SUMS"

LARGEST_FILE = 1 << 34
"""Bytes of a file of tensors: a hundred times the paper's network with its optimisers."""
LARGEST_SUMS = 1 << 12


class CheckpointDamaged(DataError):
    """A checkpoint whose files are missing, unreadable or not what SHA256SUMS says."""


def files(sums: bytes) -> list[str]:
    """Names of the other files of a checkpoint, from its SHA256SUMS."""
    return [STATE, TENSORS, *([FIXED] if f"  {FIXED}\n".encode() in sums else [])]


def sums_text(hashes: Sequence[tuple[str, str]]) -> bytes:
    """Contents of SHA256SUMS for (SHA-256, name) pairs, in this order."""
    return "".join(f"{digest}  {name}\n" for name, digest in hashes).encode("ascii")


def damaged(directory: Path, what: str) -> CheckpointDamaged:
    """The error for a damaged checkpoint."""
    return CheckpointDamaged(
        f"checkpoint {directory} is damaged: {what}; use an earlier checkpoint, or copy this one again"
    )


def _unreadable(directory: Path, name: str, error: OSError) -> DataError | StorageError:
    if isinstance(error, PermissionError):
        return StorageError(f"cannot read {directory / name}: {error.strerror}")
    if isinstance(error, FileNotFoundError):
        return damaged(directory, f"{name} is missing")
    if isinstance(error, NotADirectoryError):
        return DataError(f"{directory} is a file, expected the folder of a checkpoint, such as step-0000300")
    return damaged(directory, f"{name} cannot be read ({error.strerror})")


def read_file(directory: Path, name: str) -> bytes:
    """Contents of a file. Raises as :func:`mpscl_ray.runs.checkpoint.load`."""
    limit = {SUMS: LARGEST_SUMS, STATE: safe_json.MAX_BYTES}.get(name, LARGEST_FILE)
    try:
        return read_limited(directory / name, limit)
    except OSError as error:
        raise _unreadable(directory, name, error) from error
    except ValueError as error:
        raise damaged(directory, f"{name} cannot be read: {error}") from error


def hash_file(directory: Path, name: str) -> str:
    """SHA-256 of a file, however large."""
    try:
        with open(directory / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(directory, name, error) from error


def compare_sums(directory: Path, hashes: Sequence[tuple[str, str]]) -> None:
    """Compare SHA256SUMS, byte for byte, with what it must say of the files as they are."""
    text = read_file(directory, SUMS)
    if text == sums_text(hashes):
        return
    for name, found in hashes:
        match = re.search(rf"^([0-9a-f]{{64}})  {re.escape(name)}$", text.decode("ascii", "replace"), re.MULTILINE)
        if match is None:
            raise damaged(directory, f"{SUMS} has no readable line for {name}")
        if match.group(1) != found:
            raise damaged(directory, f"{name} has the SHA-256 {found}, {SUMS} says {match.group(1)}")
    raise damaged(directory, f"{SUMS} has lines that do not belong there")


def read_document(directory: Path, data: bytes, names: Sequence[str]) -> dict[str, Any]:
    """Parse a verified state.json, and compare the files that SHA256SUMS names with those that it needs.

    Refuses one that this version of mpscl_ray does not understand.
    """
    try:
        document = safe_json.loads(data, any_text=True)
    except ValueError:
        document = None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise DataError(f'{directory} is not a checkpoint of mpscl_ray: {STATE} lacks "format": "{FORMAT}"')
    if document.get("version") != VERSION:
        raise DataError(
            f"checkpoint {directory} has version {document.get('version')!r}, this mpscl_ray reads version {VERSION}; "
            f"use the mpscl_ray that wrote it"
        )
    if ("fixed" in document) != (FIXED in names):
        lacks, has = (SUMS, STATE) if "fixed" in document else (STATE, SUMS)
        raise damaged(directory, f"{has} names {FIXED}, and {lacks} does not")
    return document
