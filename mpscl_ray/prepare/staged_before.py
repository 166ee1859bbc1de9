"""Cases that a prepare which was stopped has read already, so that the same command need not read them again."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

import mpscl_ray
from mpscl_ray.data.volumes.dicom_paths import is_series, series_files
from mpscl_ray.prepare.pictures.case import CasePicture
from mpscl_ray.prepare.pictures.tiles import Tile
from mpscl_ray.prepare.staged_case import Request, Settings, StagedCase
from mpscl_ray.runs import safe_json
from mpscl_ray.runs.atomic_files import replacing, storage_errors

_PATTERN = "*_staged.json"


def has_staged(folder: Path) -> bool:
    """Whether a folder for staged slices has any case that can be used again."""
    return any(folder.glob(_PATTERN))


def take(request: Request, settings: Settings) -> StagedCase | None:
    """The case as it was staged by the same version with the same settings from the same files.

    Files of another case in its place are removed.
    """
    file = _file(request)
    with suppress(OSError, ValueError):  # nothing was kept, or its files are gone
        kept = safe_json.read(file)
        if kept["key"] == _key(request, settings) and kept["bytes"] == _sizes(request):
            values: dict[str, Any] = kept["case"] | {"picture": _picture(kept["case"]["picture"])}
            tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
            return StagedCase(request=request, **values | tuples)
    with storage_errors(file):
        for path in (file, *_parts(request)):
            path.unlink(missing_ok=True)
    return None


def keep(staged: StagedCase, settings: Settings) -> None:
    """Note a case whose slices are on disk."""
    request = staged.request
    values = asdict(replace(staged, request=None))  # type: ignore[arg-type]
    del values["request"]
    content = {"key": _key(request, settings), "bytes": _sizes(request), "case": values}
    data, file = json.dumps(content, default=_plain).encode(), _file(request)
    with storage_errors(file, len(data)), replacing(file) as partial:  # not synced: it is of use until a power cut
        partial.write_bytes(data)


def _file(request: Request) -> Path:
    return request.image_file.with_name(f"{request.number:06d}_staged.json")


def _parts(request: Request) -> Sequence[Path]:
    return request.image_file, request.label_file, request.label_map_file


def _sizes(request: Request) -> list[int | None]:
    """A file that a kill has cut short has another size."""
    return [path.stat().st_size if path.exists() else None for path in _parts(request)]


def _key(request: Request, settings: Settings) -> str:
    """Changes with the version, the settings, the request and its files, by their sizes and times of change."""
    images = [file for path in request.source.images for file in (series_files(path) if is_series(path) else [path])]
    about = [file.stat() for file in (*images, *request.source.labels)]
    stamps = [(found.st_size, found.st_mtime_ns) for found in about]
    parts = (mpscl_ray.__version__, settings, replace(request, folder=None), stamps)
    return hashlib.sha256(repr(parts).encode(errors="backslashreplace")).hexdigest()


def _plain(value: Any) -> Any:
    """What is no JSON: a PNG, an array or a number of numpy."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value.tolist()


def _picture(values: dict[str, Any] | None) -> CasePicture | None:
    """A picture as it was before it became JSON."""
    if values is None:
        return None
    tiles = tuple(
        Tile(**tile | {"png": base64.b64decode(tile["png"]), "edges": tuple(tile["edges"])}) for tile in values["tiles"]
    )
    return CasePicture(
        tiles=tiles,
        quantiles=np.asarray(values["quantiles"], np.float32),
        coarse=np.asarray(values["coarse"], np.float32),
        letters=values["letters"],
        voxel_mm=None if values["voxel_mm"] is None else tuple(values["voxel_mm"]),
        extent=tuple(values["extent"]),
    )
