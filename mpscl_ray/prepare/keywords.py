"""Prepare a dataset from Python: the options of the prepare command as keyword arguments."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mpscl_ray.config.load import expected
from mpscl_ray.data.volumes.recipe import Recipe
from mpscl_ray.errors import ConfigError
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
        Modality -> folder of its dataset; it goes into ``data.source`` or ``data.target`` of a config.

    Raises:
        ConfigError: an option does not exist or cannot be used, or there is a dataset already.
        DataError: files cannot be used; the message lists all problems, and nothing is written.
        StorageError: ``out`` cannot be written.
    """
    for name in options.keys() - _RECIPE - _OPTIONS:
        near = did_you_mean(name, sorted(_RECIPE | _OPTIONS), cutoff=0.6)
        hint = near or "python -m mpscl_ray.prepare --help lists them"
        raise ConfigError(f"{name!r} is not an option of prepare; {hint}")
    options = {name: _checked(name, value) for name, value in options.items()}
    recipe = Recipe(**{name: value for name, value in options.items() if name in _RECIPE})
    others = {name: value for name, value in options.items() if name in _OPTIONS}
    return prepare(
        PrepareOptions(Path(str(parse_location(images))), parse_location(out), layout, recipe=recipe, **others),
        progress=progress,
    )


def _checked(name: str, value: Any) -> Any:
    """The value of an option; ConfigError where it is of another type."""
    hints = typing.get_type_hints(Recipe if name in _RECIPE else PrepareOptions)
    try:
        return TypeAdapter(hints[name]).validate_python(str(value) if isinstance(value, Path) else value)
    except ValidationError as error:
        raise ConfigError(f"{name}={value!r}: {expected(error.errors()[0])}") from None
