"""Reading a model file as if it were the directory of a run with one checkpoint."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from mpscl_ray.errors import ConfigError, DataError, StorageError
from mpscl_ray.runs import checkpoint, safe_json
from mpscl_ray.runs.atomic_files import storage_errors
from mpscl_ray.runs.local_store import LocalStore
from mpscl_ray.runs.model_file import (
    CARD,
    CARD_TEXT,
    CONFIG,
    LARGEST_FILE,
    MODEL,
    SUFFIX,
    WEIGHTS,
    unpack,
)
from mpscl_ray.runs.run_directory import RunDirectory, open_run
from mpscl_ray.runs.storage import S3Path, cache_folder, parse_location

_CHECKPOINT = "weights"
"""Folder of the unpacked weights, a checkpoint."""


def open_model(location: RunDirectory | Path | S3Path | str) -> RunDirectory:
    """The directory of a run, by its path or URL; or a model file, verified and unpacked on this node.

    Raises:
        ConfigError: The URL cannot be used, or there is no such model file.
        DataError: The model file is damaged, of a newer version, or something else.
        StorageError: It cannot be read, or unpacked into the cache folder.
    """
    if isinstance(location, RunDirectory):
        return location
    found = parse_location(location)
    named_so = found.name.endswith(SUFFIX)
    if isinstance(found, Path) and (found.is_dir() or not (named_so or found.is_file())):
        return open_run(found)
    if isinstance(found, S3Path) and not named_so:
        return open_run(found)
    store = ModelStore(found, _unpacked(found))
    return RunDirectory(store.path, store)


class ModelStore(LocalStore):
    """Access to an unpacked model file, with the methods of the store of a run. It has one checkpoint.

    Args:
        file: The model file.
        path: Folder where it is unpacked.
    """

    def __init__(self, file: Path | S3Path, path: Path) -> None:
        super().__init__(path)
        self._file = file
        self.name = file.name

    @property
    def display_path(self) -> str:
        return str(self._file)

    @property
    def uri(self) -> str:
        return str(self._file if isinstance(self._file, S3Path) else self._file.absolute())

    @property
    def weights(self) -> Path:
        """The checkpoint."""
        return self.path / _CHECKPOINT

    @property
    def weights_name(self) -> str:
        """Name of the checkpoint in the run that the model was exported from."""
        return str(safe_json.read_object(self.path / MODEL)["weights"]["name"])

    @property
    def card(self) -> dict[str, Any]:
        """The model card, as somebody wrote it. Raises ValueError or TypeError where it is no JSON object."""
        return dict(safe_json.read(self.path / CARD))


def _unpacked(file: Path | S3Path) -> Path:
    """Folder of the unpacked file, by its SHA-256 in the cache folder of this node."""
    data = _read(file)
    models = cache_folder() / "models"
    folder = models / hashlib.sha256(data).hexdigest()
    if folder.is_dir():
        return folder
    members = unpack(data, str(file))
    partial = models / f".{folder.name}.partial-{os.getpid()}"
    with storage_errors(folder, len(data)):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            for name in (MODEL, CONFIG, CARD, CARD_TEXT):
                (partial / name).write_bytes(members[name])
            checkpoint.save(partial / _CHECKPOINT, _state(members, str(file)))
            os.rename(partial, folder)
        except OSError:
            if not folder.is_dir():  # another process of this node was faster
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _state(members: dict[str, bytes], file: str) -> dict[str, Any]:
    """What a checkpoint of a training has of a segmenter."""
    import safetensors
    import safetensors.torch

    model = safe_json.loads(members[MODEL])
    try:
        origin = model["weights"]
        if not isinstance(origin["name"], str):
            raise TypeError(f"the name {origin['name']!r} of its weights")
        tensors = safetensors.torch.load(members[WEIGHTS])
        return {
            "method": {"networks": {"segmenter": tensors}},
            "network": model["network"],
            "classes": [str(name) for name in model["classes"]],
            "phase": origin["phase"],
            "position": {"step": origin["step"]},
            "selected_by": origin["selected_by"],
        }
    except (safetensors.SafetensorError, KeyError, TypeError) as error:
        raise DataError(f"{file} is no model file that this version knows ({error}); export it again") from error


def _read(file: Path | S3Path) -> bytes:
    try:
        if isinstance(file, S3Path):
            stamp = file.version_stamp()
            if stamp is None:
                raise FileNotFoundError
            size = stamp[0]
        else:
            size = file.stat().st_size
        if size > LARGEST_FILE:
            raise DataError(f"{file} is no model file: it has {size} bytes, expected at most {LARGEST_FILE}")
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{file}: no such file, expected a model that python -m mpscl_ray.export wrote") from None
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error.strerror or error}") from error
