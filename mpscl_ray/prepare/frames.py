"""Time points of 4-D volumes as cases of their own, such as the ED and ES frames of a cine scan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from mpscl_ray.errors import ConfigError
from mpscl_ray.prepare.source_cases import SourceCase

_MOST_FRAMES = 1 << 12
"""A header with more time points than this is wrong."""


def expand_frames(cases: Sequence[SourceCase], frames: str | None, problems: list[str]) -> list[SourceCase]:
    """The cases, each volume with a time axis replaced by one case for each of its chosen time points.

    Only headers are read, and labels for ``labelled``. A file that cannot be read stays as it is: reading it later says
    why.

    Args:
        cases: of one folder.
        frames: ``labelled`` (time points whose label map shows something), ``all``, or numbers from 0, e.g. ``0,9``;
            None leaves all cases as they are.
        problems: gets what is wrong with a case.

    Raises:
        ConfigError: frames are anything else.
    """
    if frames is None:
        return list(cases)
    numbers = _numbers(frames)
    found: list[SourceCase] = []
    for case in cases:
        count = _length(case.images[0]) if case.kind == "nifti" else 1
        if count < 2:
            found.append(case)
            continue
        with_time = [path for path in case.labels if _length(path) == count]
        if frames == "labelled" and not with_time:
            problems.append(
                f"case {case.id} has {count} time points and no label map with as many; give --frames N for the "
                "one that its label map belongs to"
            )
            continue
        chosen = list(range(count)) if frames == "all" else numbers or _labelled(with_time, count)
        wrong = [number for number in chosen if number >= count]
        if wrong or not chosen:
            what = f"no time point {wrong[0]}" if wrong else "no label at any time point"
            problems.append(f"case {case.id} has {count} time points, 0 to {count - 1}, and {what} (--frames {frames})")
            continue
        if case.labels and not with_time and len(chosen) > 1:
            problems.append(
                f"case {case.id}: {len(chosen)} of {count} time points are wanted, but its label map does not have as "
                "many; give --frames N for the one that it belongs to"
            )
            continue
        found += [replace(case, id=f"{case.id}_t{number:02d}", frame=number) for number in chosen]
    return found


def _numbers(frames: str) -> list[int]:
    if frames in ("labelled", "all"):
        return []
    try:
        numbers = sorted({int(part) for part in frames.split(",")})
    except ValueError:
        numbers = [-1]
    if numbers[0] < 0:
        raise ConfigError(f"--frames {frames!r}: expected labelled, all, or numbers from 0, e.g. 0,9")
    return numbers


def _length(path: Path) -> int:
    """Number of time points; 1 for a volume and for a file that cannot be read."""
    try:
        volume: Any = nib.load(path)
        shape = volume.shape
    except Exception:  # noqa: BLE001 nibabel raises many kinds; reading the case says what is wrong
        return 1
    return int(shape[3]) if len(shape) == 4 and shape[3] <= _MOST_FRAMES else 1


def _labelled(labels: Sequence[Path], count: int) -> list[int]:
    try:
        maps: list[Any] = [nib.load(path) for path in labels]
        return [
            number for number in range(count) if any(np.any(np.asarray(label.dataobj[..., number])) for label in maps)
        ]
    except Exception:  # noqa: BLE001 as above
        return list(range(count))
