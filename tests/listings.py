"""Folders of empty files, and the cases that a layout finds in them."""

from __future__ import annotations

from pathlib import Path

from mpscl_ray.prepare.layouts import Scan


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return folder


def pairs(found: Scan, folder: Path) -> dict[str, tuple[str, ...]]:
    return {
        f"{case.modality}/{case.id}": tuple(
            path.relative_to(folder).as_posix() for path in (*case.images, *case.labels)
        )
        for case in found.cases
    }


def ids(found: Scan) -> list[str]:
    return [case.id for case in found.cases]
