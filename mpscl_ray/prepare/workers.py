"""How many volumes are read at a time, and doing so with a progress line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from mpscl_ray.data.volumes.dicom_paths import is_series, series_files
from mpscl_ray.distributed.parallel_map import map_volumes
from mpscl_ray.prepare.staged_case import Request
from mpscl_ray.runs.progress import ProgressLine

Item = TypeVar("Item")
Result = TypeVar("Result")

_WORTH_RAY = 500 * 2**20
"""Bytes of input below which starting Ray takes longer than preparing."""
_BYTES_IN_MEMORY = 20
"""Most memory that preparing takes for each byte of a compressed image."""


def worker_count(wanted: int | None, requests: Sequence[Request]) -> int:
    """Number of volumes at a time: the wanted one; without it as many as fit, 0 if starting Ray does not pay off."""
    if wanted is not None:
        return min(wanted, len(requests))
    if not requests:
        return 0
    ray = sys.modules.get("ray")
    running = ray is not None and ray.is_initialized()
    size = sum(map(_size, requests))
    if not running and size < _WORTH_RAY:
        return 0
    return min(os.cpu_count() or 1, len(requests), _fitting(requests))


def _size(request: Request) -> int:
    """Bytes of the images of a case."""
    images = request.source.images
    return sum(file.stat().st_size for path in images for file in (series_files(path) if is_series(path) else [path]))


def _fitting(requests: Sequence[Request]) -> int:
    """Volumes that fit into the free memory of this machine together, at least 1."""
    largest = max(map(_size, requests))
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return len(requests)
    return max(1, int(free / (_BYTES_IN_MEMORY * largest)))


def map_cases(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    name: Callable[[Item], str],
    label: str,
    *,
    here: bool,
    progress: bool,
) -> list[Result]:
    """Results of :func:`map_volumes`, with a progress line called ``label`` if wanted."""
    if not progress:
        return map_volumes(function, items, workers=workers, name=name, done=lambda count: None, here=here)
    with ProgressLine(len(items), label) as line:
        return map_volumes(function, items, workers=workers, name=name, done=line.update, here=here)
