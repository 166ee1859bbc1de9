"""The output folder of a dataset: hidden until it is finished, then renamed or uploaded."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpscl_ray.data.dataset import MANIFEST, fold_folder, fold_numbers
from mpscl_ray.errors import ConfigError, Interrupted, StorageError
from mpscl_ray.prepare.staged_before import has_staged
from mpscl_ray.runs.atomic_files import fsync_directory, storage_errors
from mpscl_ray.runs.lock import process_alive
from mpscl_ray.runs.storage import S3Path, cache_folder

STAGED = ".staged"
"""Folder in it for cases that are read and not yet written."""


def check_target(target: Path | S3Path, overwrite: bool) -> None:
    """Refuse a target folder that is in use, before any work is done."""
    inside = target.files() if isinstance(target, S3Path) else target.is_dir() and any(target.iterdir())
    if not inside and (isinstance(target, S3Path) or target.is_dir() or not target.exists()):
        return
    if not _manifests(target):
        raise StorageError(f"{target}: there is something else than a dataset; move it away or choose another --out")
    if not overwrite:
        raise ConfigError(f"{target}: there is a finished dataset already; give --overwrite to replace it")


def _manifests(target: Path | S3Path) -> list[Any]:
    """Where the manifest of a dataset is, or those of its folds."""
    folders = [target, *(target / fold_folder(number) for number in fold_numbers(target))]
    return [folder / MANIFEST for folder in folders if (folder / MANIFEST).exists()]


@contextmanager
def temporary_output_dir(out: Path | S3Path, name: str) -> Iterator[Path]:
    """A hidden folder of this process beside the finished ones (in the cache folder if these are in a bucket).

    It is removed after the block unless it was renamed, or the block was interrupted after cases were staged. Folders
    left by processes of this host that have ended are removed; one of them passes on its staged cases.
    """
    if isinstance(out, S3Path):
        out = cache_folder() / "unfinished"
    prefix = f".{name}.unfinished-{socket.gethostname()}-"
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        ended = []
        for left in out.glob(f"{prefix}*"):
            process = left.name.removeprefix(prefix).partition("-")[0]
            if process.isdecimal() and not process_alive(process):
                ended.append(left)
        folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=out))
        folder.chmod(0o777 & ~_umask())  # mkdtemp lets no other user in; a dataset is readable like any other folder
        for left in ended:
            if has_staged(left / STAGED) and not (folder / STAGED).exists():
                (left / STAGED).rename(folder / STAGED)
            shutil.rmtree(left)
    keep = False
    try:
        yield folder
    except (KeyboardInterrupt, Interrupted):
        keep = has_staged(folder / STAGED)
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def publish(folder: Path, target: Path | S3Path, overwrite: bool) -> Path | S3Path:
    """Rename or upload a finished folder; an old dataset of that name is removed once the new one is there."""
    check_target(target, overwrite)
    if isinstance(target, S3Path):
        # The old manifest goes first: an interruption never leaves a manifest whose files are not all there.
        for manifest in _manifests(target):
            manifest.delete()
        target.delete_folder()
        upload(folder, target)
        return target
    old = folder.with_name(folder.name.replace("unfinished", "replaced"))
    with storage_errors(target):
        fsync_directory(folder)
        if target.exists():
            target.rename(old)
        folder.rename(target)
        fsync_directory(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    return target


def upload(folder: Path, target: S3Path) -> None:
    """Upload a dataset folder, its manifest, or those of its folds, last."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in sorted(files, key=lambda path: path.name == MANIFEST):
        with path.open("rb") as stream:
            (target / path.relative_to(folder)).upload(stream)
