"""Checkpoints: plain folders of safetensors and JSON, written so that no kill and no full disk can lose one.

A checkpoint is a folder of three files, or four::

    step-0000300/
        tensors.safetensors   every tensor of the state; any safetensors reader opens it
        fixed.safetensors     those below its key "fixed" instead, if it has that key: what stays the same for long
        state.json            {"format", "version", "state", "fixed"}: the nesting, plain values, names of tensors
        SHA256SUMS            of the others, as ``sha256sum -c`` reads it; written last

Successive checkpoints share ``fixed.safetensors`` by hard links where the file system has them.

It is written aside as ``.step-0000300.partial-<pid>``; each file is synced, the folder is synced, renamed, and the
folder above is synced. A kill at any moment leaves the checkpoints before it untouched, and at most a leftover whose
name starts with a dot, which the next :func:`save` removes. One process at a time may save into a folder; any number
may read.

What a state may hold, and how exactly it comes back, is in :mod:`mpscl_ray.runs.checkpoint_format`. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from mpscl_ray.errors import DataError, StorageError
from mpscl_ray.runs import safe_json
from mpscl_ray.runs.atomic_files import disk_full, free_bytes, fsync_directory, partial_path, storage_errors
from mpscl_ray.runs.checkpoint_files import FIXED as FIXED
from mpscl_ray.runs.checkpoint_files import (
    FORMAT,
    VERSION,
    compare_sums,
    files,
    hash_file,
    read_document,
    read_file,
    sums_text,
)
from mpscl_ray.runs.checkpoint_files import STATE as STATE
from mpscl_ray.runs.checkpoint_files import SUMS as SUMS
from mpscl_ray.runs.checkpoint_files import TENSORS as TENSORS
from mpscl_ray.runs.checkpoint_files import CheckpointDamaged as CheckpointDamaged
from mpscl_ray.runs.checkpoint_format import decode, encode, safetensors_chunks, safetensors_layout

_NAME = re.compile(r"step-\d{7,}")
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|replaced|removed)-\d+")
_CHUNK = 1 << 24
# Room for the folder itself and the blocks that files are rounded up to.
_SLACK = 1 << 16


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint of a global step: ``step-0000300``."""
    return f"step-{step:07d}"


@dataclass(frozen=True)
class Snapshot:
    """A state at one moment, ready to be written."""

    encoded: Mapping[str, Any]
    """The state as JSON, which names its tensors."""
    tensors: Mapping[str, torch.Tensor]
    """On the CPU."""
    encoded_fixed: Mapping[str, Any]
    """What the state has below its key "fixed", as JSON; may be empty."""
    fixed: Mapping[str, torch.Tensor]
    """The tensors of that, on the CPU. They are never copied."""

    @classmethod
    def take(cls, state: Mapping[str, Any], *, copy: bool = True) -> Snapshot:
        """Keep a state as it is now.

        Args:
            state: See :mod:`mpscl_ray.runs.checkpoint_format` for what it may hold.
            copy: Whether the state may change before the snapshot is written; its tensors are then copied.

        Raises:
            TypeError: The state holds something that cannot be kept exactly.
        """
        tensors: dict[str, torch.Tensor] = {}
        fixed: dict[str, torch.Tensor] = {}
        changing = {key: value for key, value in state.items() if key != "fixed"}
        encoded = encode(changing, (), tensors, copy=copy)
        return cls(encoded, tensors, encode(state.get("fixed", {}), ("fixed",), fixed), fixed)

    def replace(self, **values: Any) -> Snapshot:
        """The same with other plain values at the top of the state."""
        return dataclasses.replace(self, encoded={**self.encoded, **values})


def save(directory: Path, state: Mapping[str, Any]) -> Path:
    """Write a state as the checkpoint ``directory``; see :meth:`Snapshot.take` and :func:`write`."""
    return write(directory, Snapshot.take(state, copy=False))


def write(directory: Path, snapshot: Snapshot, *, same_tensors: Path | None = None, before: Path | None = None) -> Path:
    """Write the checkpoint ``directory``, replacing one of that name only when the new one is complete.

    Args:
        directory: Folder to make, such as ``RUN/checkpoints/step-0000300``.
        snapshot: What to keep.
        same_tensors: Checkpoint, just written, with the tensors of the snapshot: its file gets a second name (a hard
            link) where the file system can, instead of being written again.
        before: An earlier checkpoint, which need not exist any more: where its fixed tensors have the same bytes,
            their file gets a second name.

    Returns:
        ``directory``.

    Raises:
        StorageError: No space (with the bytes needed and free), no permission, or a file in the way. Checkpoints
            that were there are intact, and nothing half-written is left.
    """
    content = {"format": FORMAT, "version": VERSION, "state": snapshot.encoded}
    layouts = {TENSORS: safetensors_layout(snapshot.tensors)}
    if snapshot.encoded_fixed:
        content["fixed"] = snapshot.encoded_fixed
        layouts[FIXED] = safetensors_layout(snapshot.fixed)
    document = json.dumps(content, allow_nan=False).encode("ascii")
    assert len(document) <= safe_json.MAX_BYTES, "a state has its numbers in tensors"
    size = sum(len(header) + sum(tensor.nbytes for tensor in ordered) for header, ordered in layouts.values())
    needed = size + len(document) + _SLACK

    parent = directory.parent
    partial = partial_path(directory)
    with storage_errors(directory, needed):
        parent.mkdir(parents=True, exist_ok=True)
        if directory.exists() and not directory.is_dir():
            raise StorageError(f"cannot write the checkpoint {directory}: a file of that name is in the way; move it")
        _recover(parent)
        _clean(parent)
        free = free_bytes(parent) if same_tensors is None else None
        if free is not None and free < needed:
            raise disk_full(directory, needed, free)
        try:
            partial.mkdir()
            sums = [(STATE, _write(partial / STATE, [memoryview(document)]))]
            for name, layout in layouts.items():
                linked = _link(same_tensors, partial / name) if same_tensors is not None else None
                if linked is None and name == FIXED and before is not None:
                    linked = _link(before, partial / name, _sha256(safetensors_chunks(*layout)))
                sums.append((name, linked or _write(partial / name, safetensors_chunks(*layout))))
            _write(partial / SUMS, [memoryview(sums_text(sums))])
            fsync_directory(partial)
            _rename(partial, directory)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            _recover(parent)
            raise
    return directory


def load(directory: Path) -> dict[str, Any]:
    """Read a checkpoint back, after its hashes have been verified.

    Raises:
        CheckpointDamaged: Names the file, and the hash found and expected.
        DataError: Intact, but not a checkpoint that this version understands.
    """
    _recover(directory.parent, directory.name)
    contents = {name: read_file(directory, name) for name in files(read_file(directory, SUMS))}
    compare_sums(directory, [(name, hashlib.sha256(data).hexdigest()) for name, data in contents.items()])
    document = read_document(directory, contents[STATE], list(contents))
    try:
        state = decode(document["state"], safetensors.torch.load(contents[TENSORS]))
        if not isinstance(state, dict):
            raise TypeError("its state is no object")
        if FIXED in contents:
            state["fixed"] = decode(document["fixed"], safetensors.torch.load(contents[FIXED]))
    except (safetensors.SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{directory} is not a checkpoint of mpscl_ray, though its hashes are right: {STATE} and the tensors do "
            f"not belong together ({error}); use it only if you know who changed it"
        ) from error
    return state


def verify(directory: Path) -> None:
    """Check the hashes of a checkpoint without loading it. Raises as :func:`load` does."""
    document, names = read_file(directory, STATE), files(read_file(directory, SUMS))
    compare_sums(directory, [(name, hash_file(directory, name)) for name in names])
    read_document(directory, document, names)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints ``step-NNNNNNN`` in a folder, oldest step first, damaged ones included; [] without a folder."""
    try:
        entries = [entry for entry in folder.iterdir() if _NAME.fullmatch(entry.name) and entry.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"cannot read the folder of checkpoints {folder}: {error.strerror}") from error
    return sorted(entries, key=step_of)


def step_of(directory: Path) -> int:
    """Global step in a checkpoint's name."""
    return int(directory.name.removeprefix("step-"))


def latest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose hashes verify.

    Returns:
        The checkpoint, or None where there is none, and a sentence for each newer one that is damaged and skipped.

    Raises:
        DataError: The newest intact checkpoint is of another format or version: resuming from an older one
            would lose good work.
    """
    if folder.is_dir():
        _recover(folder)
    warnings: list[str] = []
    for directory in reversed(list_checkpoints(folder)):
        try:
            verify(directory)
        except CheckpointDamaged as damage:
            warnings.append(f"skipped: {damage}")
        else:
            return directory, warnings
    return None, warnings


def prune(folder: Path, keep: int, intact: Path | None = None) -> None:
    """Remove all but the newest ``keep`` (1 or more) checkpoints.

    The newest checkpoint that verifies is never removed, even where ``keep`` newer ones are damaged. ``intact`` is one
    that the caller has just written: it is not read again.
    """
    older = list_checkpoints(folder)[:-keep]
    newest_valid = intact or (latest(folder)[0] if older else None)
    for path in older:
        if path == newest_valid:
            continue
        # Renamed first: a kill half-way through the removal must not leave a checkpoint that looks damaged.
        aside = path.with_name(f".{path.name}.removed-{os.getpid()}")
        with storage_errors(path):
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
            shutil.rmtree(aside, ignore_errors=True)


def _write(path: Path, chunks: Sequence[memoryview] | Iterator[memoryview]) -> str:
    """Write a new file, sync it, and return the SHA-256 of what it should hold."""
    digest = hashlib.sha256()
    with open(path, "xb", buffering=0) as file:
        for chunk in chunks:
            for start in range(0, len(chunk), _CHUNK):
                piece = chunk[start : start + _CHUNK]
                digest.update(piece)
                while piece:
                    piece = piece[file.write(piece) :]
        os.fsync(file.fileno())
    return digest.hexdigest()


def _sha256(chunks: Iterator[memoryview]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _link(other: Path, file: Path, sha256: str | None = None) -> str | None:
    """Give a file of another checkpoint a second name; returns its SHA-256, None where that is not possible.

    With ``sha256`` only a file that has it according to its SHA256SUMS.
    """
    try:
        sums = (other / SUMS).read_text("ascii")
        match = re.search(rf"^([0-9a-f]{{64}})  {re.escape(file.name)}$", sums, re.MULTILINE)
        if match is None or sha256 not in (None, match.group(1)):
            return None
        os.link(other / file.name, file)
    except OSError:
        return None
    return match.group(1)


def _rename(partial: Path, directory: Path) -> None:
    """Give a complete checkpoint its name. A folder cannot replace another, so an old one is renamed first."""
    aside = directory.with_name(f".{directory.name}.replaced-{os.getpid()}")
    for attempt in range(3):
        if directory.exists():
            os.rename(directory, aside)
        try:
            os.rename(partial, directory)
        except OSError:
            # A reader that came between the two renames has put the old one back (_recover).
            if attempt == 2 or not directory.exists():
                raise
        else:
            break
    fsync_directory(directory.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _leftovers(parent: Path) -> Iterator[tuple[Path, str, Path]]:
    """(leftover, kind, its checkpoint) for what interrupted saves and removals have left."""
    for entry in list(parent.iterdir()):
        match = _LEFTOVER.fullmatch(entry.name)
        if match and entry.is_dir():
            yield entry, match["kind"], parent / match["name"]


def _recover(parent: Path, name: str | None = None) -> None:
    """Restore the name of a checkpoint whose replacement was interrupted between two renames."""
    try:
        for entry, kind, target in _leftovers(parent):
            if kind == "replaced" and not target.exists() and name in (None, target.name):
                os.rename(entry, target)
    except OSError:
        # No write permission, or another process was faster. Reading then says what is missing.
        return


def _clean(parent: Path) -> None:
    for entry, kind, target in _leftovers(parent):
        if kind != "replaced" or target.exists():
            shutil.rmtree(entry, ignore_errors=True)
