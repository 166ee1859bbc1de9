"""The phantom hearts as a prepared dataset: made once for a storage folder, by the same code as real data.

Several commands may start at the same moment: each makes the hearts in its own folder, which is renamed once it is
complete. The second command uses what is there. In a bucket both upload the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from mpscl_ray.config import Config
from mpscl_ray.data.dataset import MANIFEST, load_manifest, save_manifest
from mpscl_ray.data.phantom import anatomy, case, imaging, shapes
from mpscl_ray.data.phantom.files import FIRST_CASE, make_phantom
from mpscl_ray.data.volumes.recipe import Recipe
from mpscl_ray.errors import ConfigError
from mpscl_ray.prepare.options import PrepareOptions
from mpscl_ray.prepare.output_folder import temporary_output_dir, upload
from mpscl_ray.prepare.run import prepare
from mpscl_ray.runs.atomic_files import storage_errors, write_atomically
from mpscl_ray.runs.storage import S3Path, parse_location

PREFIX = "phantom:"
"""``data.source=phantom:mr`` means the dataset made here."""

MODALITIES = ("mr", "ct")

CASES = {"train": 12, "val": 2, "test": 4}
"""Cases of each modality, by split."""

SEED = 7
"""Seed of the hearts; the same for all runs, so that seeds of runs are compared on the same data."""

RECIPE = Recipe(spacing_mm=(2.4, 2.4, 2.4), crop=(64, 64), crop_depth=44)
"""Coronal slices of 64 x 64 at 2.4 mm, which hold the heart."""


def resolve(config: Config, *, progress: bool = True) -> Config:
    """Replace ``phantom:mr`` and ``phantom:ct`` by folders of prepared datasets, made first if they are missing.

    Args:
        config: of a run.
        progress: whether to say that they are made, and show progress lines.

    Raises:
        ConfigError: another word after ``phantom:``.
        DataError: there is no dataset in the folder that is the other domain.
        StorageError: the storage folder cannot be written.
    """
    check(config)
    source, target = (_resolved(config, key, progress) for key in ("source", "target"))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, source=source, target=target))


def check(config: Config) -> None:
    """Check the datasets of a run with a phantom as far as that needs no phantom; errors as in :func:`resolve`."""
    values = {key: getattr(config.data, key) for key in ("source", "target")}
    if not any(value.startswith(PREFIX) for value in values.values()):
        return
    for key, value in values.items():
        if not value.startswith(PREFIX):
            load_manifest(value)
        elif value.removeprefix(PREFIX) not in MODALITIES:
            raise ConfigError(
                f"data.{key}={value}: the phantom has {' and '.join(PREFIX + name for name in MODALITIES)}"
            )


def _resolved(config: Config, key: str, progress: bool) -> str:
    value: str = getattr(config.data, key)
    if not value.startswith(PREFIX):
        return value
    return str(phantom_dataset(parse_location(config.run.storage), progress=progress) / value.removeprefix(PREFIX))


def phantom_dataset(
    storage: Path | S3Path, cases: Mapping[str, int] = CASES, *, progress: bool = True
) -> Path | S3Path:
    """Folder with the prepared datasets ``mr`` and ``ct`` of the phantom, made on first use.

    The folder name has a hash of everything that decides its content: another version of the phantom is another
    dataset.

    Args:
        storage: folder, or folder of a bucket, that the dataset is made in.
        cases: number of cases of each modality, by split.
        progress: whether to say that it is made, and show progress lines.
    """
    recipe = json.dumps([*cases.values(), SEED, RECIPE.to_json(), _code_hash()])
    folder = storage / f"phantom-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"
    prepared = folder / "prepared"
    if _is_complete(prepared):
        return prepared
    if progress:
        print(f"making the phantom hearts in {folder}", flush=True)
    with temporary_output_dir(storage, folder.name) as here:
        # Other nodes cannot read what is in this node's cache.
        _make(here, str(folder), cases, 0 if isinstance(folder, S3Path) else None, progress)
        _publish(here, folder)
    return prepared


def _is_complete(prepared: Path | S3Path) -> bool:
    return all((prepared / modality / MANIFEST).exists() for modality in MODALITIES)


def _make(here: Path, name: str, cases: Mapping[str, int], workers: int | None, progress: bool) -> None:
    """Make hearts and datasets in a folder that will be renamed; manifests have its final name already."""
    count = sum(cases.values())
    raw = here / "nifti"
    make_phantom(raw, count, count, SEED)
    for modality in MODALITIES:
        names = (f"{modality}_{FIRST_CASE + number}" for number in range(count))
        split = {name: list(itertools.islice(names, number)) for name, number in cases.items()}
        file = here / f"split-{modality}.json"
        write_atomically(file, json.dumps(split, indent=1).encode())
        dataset = here / "prepared" / modality
        prepare(
            PrepareOptions(
                raw,
                dataset.parent,
                "mmwhs",
                modality=modality,
                split=str(file),
                recipe=RECIPE,
                workers=workers,
                pictures=False,
            ),
            progress=progress,
        )
        manifest = load_manifest(dataset)
        save_manifest(dataset, dataclasses.replace(manifest, command=manifest.command.replace(str(here), name)))


def _publish(here: Path, folder: Path | S3Path) -> None:
    """Rename or upload the complete folder, unless another command was faster."""
    if isinstance(folder, S3Path):
        for modality in MODALITIES:
            upload(here / "prepared" / modality, folder / "prepared" / modality)
        return
    with storage_errors(folder):
        try:
            here.rename(folder)
        except OSError:
            if _is_complete(folder / "prepared"):
                return
            # An incomplete one, left by a killed command of an earlier version.
            shutil.rmtree(folder, ignore_errors=True)
            here.rename(folder)


def _code_hash() -> str:
    """Hash of the source that makes the hearts, so that a changed phantom is not mistaken for the old one."""
    sources = [Path(module.__file__ or "").read_bytes() for module in (anatomy, case, shapes, imaging)]
    return hashlib.sha256(b"".join(sources)).hexdigest()
