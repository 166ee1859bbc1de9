"""Prepare and check data from Python: the options of the prepare command as keyword arguments."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mpscl_ray.config.load import expected
from mpscl_ray.data.volumes.recipe import Recipe
from mpscl_ray.errors import ConfigError
from mpscl_ray.prepare.check_command import local_folder
from mpscl_ray.prepare.check_run import Checked, check_datasets, check_images
from mpscl_ray.prepare.options import PrepareOptions
from mpscl_ray.prepare.run import prepare
from mpscl_ray.runs.cli import did_you_mean
from mpscl_ray.runs.storage import S3Path, parse_location

_RECIPE = frozenset(item.name for item in dataclasses.fields(Recipe))
_OPTIONS = frozenset(item.name for item in dataclasses.fields(PrepareOptions)) - {"input", "out", "layout", "recipe"}


def prepare_dataset(
    images: Path | str, out: Path | str, layout: str, *, progress: bool = False, **options: Any
) -> dict[str, Path | S3Path]:
    """Make a dataset for training of each modality in a folder of images.

    Args:
        images: folder with the images and label maps.
        out: folder, or URL, in which each modality gets its own folder.
        layout: how files are named: ``mmwhs``, ``folder``, ``nnunet`` or another that ``python -m mpscl_ray.prepare
            --help`` lists.
        progress: whether to show progress lines on standard error.
        options: the other options of the command, with underscores: ``modality="mr"``, ``labels="200=MYO,500=LV"``,
            ``crop=(192, 192)``, ``spacing_mm=(None, 1.0, 1.0)``. ``workers=0`` reads one volume after the other in this
            process; without it Ray is started for more than 500 MB of images.

    Returns:
        Modality -> folder of its dataset; it goes into ``data.source`` or ``data.target`` of a config. With ``folds=K``
        the folders ``fold0``, ``fold1``, ... in it do.

    Raises:
        ConfigError: an option does not exist or cannot be used, or there is a dataset already.
        DataError: files cannot be used; the message lists all problems, and nothing is written.
        StorageError: ``out`` cannot be written.
    """
    return prepare(_options(images, parse_location(out), layout, options), progress=progress)


def check_dataset(
    data: Path | str | Sequence[Path | str], layout: str | None = None, *, progress: bool = False, **options: Any
) -> list[Checked]:
    """Everything that is wrong with images, before they are prepared, or with prepared datasets; nothing is written.

    Args:
        data: one or several folders: with images, with a dataset, or with several datasets.
        layout: how image files are named, as in :func:`prepare_dataset`; without it ``data`` are prepared datasets.
        progress: whether to show progress lines on standard error.
        options: the options of ``prepare`` that describe images. With datasets only ``workers``.

    Returns:
        What was found in each folder; a last one on the pair if there are two datasets. ``problems`` are what prepare
        or train would refuse, ``notes`` what they would only say.

    Raises:
        ConfigError: an option does not exist or cannot be used, a folder has no dataset, or is in a bucket.
    """
    given = [data] if isinstance(data, Path | str) else list(data)
    folders = [local_folder(str(one)) for one in given]
    if layout is not None:
        return [check_images(_options(one, None, layout, options), progress=progress) for one in folders]
    workers = options.pop("workers", None)
    if options:
        raise ConfigError(f"{', '.join(options)}: describes images, and without layout data are prepared datasets")
    return check_datasets(folders, _checked("workers", workers), progress=progress)


def _options(images: Path | str, out: Path | S3Path | None, layout: str, options: Mapping[str, Any]) -> PrepareOptions:
    """Options of prepare from keyword arguments; ConfigError for those that it does not have."""
    for name in options.keys() - _RECIPE - _OPTIONS:
        near = did_you_mean(name, sorted(_RECIPE | _OPTIONS), cutoff=0.6)
        hint = near or "python -m mpscl_ray.prepare --help lists them"
        raise ConfigError(f"{name!r} is not an option of prepare; {hint}")
    values = {name: _checked(name, value) for name, value in options.items()}
    recipe = Recipe(**{name: value for name, value in values.items() if name in _RECIPE})
    others = {name: value for name, value in values.items() if name in _OPTIONS}
    return PrepareOptions(Path(str(parse_location(images))), out, layout, recipe=recipe, **others)


def _checked(name: str, value: Any) -> Any:
    """The value of an option; ConfigError where it is of another type."""
    hints = typing.get_type_hints(Recipe if name in _RECIPE else PrepareOptions)
    try:
        return TypeAdapter(hints[name]).validate_python(str(value) if isinstance(value, Path) else value)
    except ValidationError as error:
        raise ConfigError(f"{name}={value!r}: {expected(error.errors()[0])}") from None
