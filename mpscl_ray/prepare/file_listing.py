"""The files below a folder, and pairing them by name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mpscl_ray.errors import DataError

LABEL_ENDINGS = ("_label", "_labels", "_manual", "_seg", "_segmentation", "_mask", "_gt")
"""Endings of names, before ``.nii``, that make a file a label map and no image."""


@dataclass
class Listing:
    """Files below a folder, with the problems and warnings collected while reading it."""

    root: Path
    files: list[Path]
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def relative(self, path: Path) -> str:
        """Path below the folder."""
        return path.relative_to(self.root).as_posix()

    def some(self, paths: Sequence[Path], count: int = 5) -> str:
        """The first few of many paths, for a sentence."""
        shown = ", ".join(self.relative(path) for path in paths[:count])
        return printable(shown + (", ..." if len(paths) > count else ""))


def list_files(root: Path) -> Listing:
    """All files below ``root`` that are not hidden. Symlinks are followed, but no folder is entered twice.

    Raises:
        DataError: there is no such folder, or no file in it.
    """
    if not root.exists():
        raise DataError(f"{root}: no such folder")
    if not root.is_dir():
        raise DataError(f"{root}: a file; give the folder that holds it")
    listing = Listing(root, [])
    seen: set[tuple[int, int]] = set()

    def unreadable(error: OSError) -> None:
        listing.problems.append(f"{error.filename}: cannot be read: {error.strerror}")

    for parent, folders, names in os.walk(root, followlinks=True, onerror=unreadable):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            listing.notices.append(f"{parent}: leads to a folder that was already read; skipped")
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            if name.startswith("."):
                continue
            if not path.exists():
                listing.problems.append(f"{path}: a symlink to something that does not exist")
            elif path.is_file():
                listing.files.append(path)
    if not listing.files and not listing.problems:
        raise DataError(f"{root}: the folder holds no files")
    return listing


def printable(name: str) -> str:
    """The name, its bytes that are not text written as escapes, so that JSON can hold it."""
    return name.encode(errors="backslashreplace").decode()


def pair_by_name(
    listing: Listing, images: Mapping[str, list[Path]], labels: Mapping[str, list[Path]]
) -> Iterable[tuple[str, Path, tuple[Path, ...]]]:
    """Case id, image and label (if any); duplicates and labels without an image become problems."""
    for kind, found in (("image", images), ("label", labels)):
        for case, paths in found.items():
            if len(paths) > 1:
                other = (
                    ", or, for a mask in each, name the files: --labels NAME=CLASS,..."
                    if kind == "label"
                    else ", or tell them apart, e.g. by {patient}/{case}"
                )
                listing.problems.append(
                    f"case {case} has {len(paths)} {kind} files: {listing.some(paths)}; keep one{other}"
                )
    for case in sorted(set(labels) - set(images)):
        listing.problems.append(f"{listing.relative(labels[case][0])}: a label whose image is missing")
    for case in sorted(images):
        yield case, images[case][0], tuple(labels.get(case, ())[:1])
