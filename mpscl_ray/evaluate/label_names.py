"""What the ids in label maps mean: from a table on the command line, or a file beside the label maps."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.prepare.label_table import (
    BACKGROUND,
    check_names,
    is_not_annotated,
    is_region,
    parse_label_table,
    read_json,
)
from mpscl_ray.runs.cli import did_you_mean
from mpscl_ray.runs.storage import read_limited

_LARGEST_TABLE = 1 << 20
_MOST = 254


@dataclass(frozen=True)
class LabelNames:
    """The structure of each id, on one side."""

    names: Mapping[int, str]
    """Id -> structure; several ids may share one."""
    background: frozenset[int]
    """Ids that are background by name; 0 is one of them."""
    ignored: int | None
    """Id of voxels that count nowhere: the one called ``ignore`` (nnU-Net), ``void``, ``unlabelled`` or the like."""
    origin: str
    """Option or file, for messages."""

    def __str__(self) -> str:
        return ", ".join(f"{value}={name}" for value, name in self.names.items()) + f" ({self.origin})"


def given_names(option: str, text: str | None) -> LabelNames | None:
    """Names of an option: ``1=MYO,2=LV``, or a JSON file; None where it is not given.

    Raises:
        ConfigError: the text is no such table.
        DataError: the file is none.
    """
    if text is None:
        return None
    if text.lower().endswith(".json"):
        return read_names(Path(text))
    try:
        table = parse_label_table(text)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--labels", option)) from None
    names = {value: table.classes[index] for value, index in table.values.items() if index}
    ignored = _ignored(table.not_annotated, option)
    return LabelNames(names, frozenset(table.values) - frozenset(names), ignored, option)


def names_beside(location: Path) -> LabelNames | None:
    """Names of a file beside label maps: ``dataset.json``, ``labels.json``, or the colour table that predict writes.

    For ``labelsTr`` and ``labelsTs`` of nnU-Net, also of the ``dataset.json`` in the folder above.
    """
    folder = location if location.is_dir() else location.parent
    for path in (folder / "dataset.json", folder / "labels.json"):
        if path.is_file():
            return read_names(path)
    if (folder / "slicer_labels.ctbl").is_file():
        return _slicer_names(folder / "slicer_labels.ctbl")
    above = folder.absolute().parent / "dataset.json"
    return read_names(above) if folder.name.startswith("labelsT") and above.is_file() else None


def read_names(path: Path) -> LabelNames:
    """Names of a JSON file: an object of ``"NAME": ID`` or ``"ID": "NAME"``, or one with such an object as ``labels``.

    Raises:
        DataError: it is none.
    """
    try:
        about = read_json(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); it should hold the label table") from None
    entries = about.get("labels", about) if isinstance(about, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise DataError(f'{path}: expected {{"NAME": ID, ...}}, alone or as "labels"; or give the names as 1=MYO,2=LV')
    return _checked(path, [_entry(path, key, value) for key, value in entries.items()])


def _entry(path: Path, key: str, value: Any) -> tuple[int, str]:
    """Id and name: nnU-Net v2 writes name: id, its older form and MSD id: name."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value, key
    if isinstance(value, str) and key.strip().lstrip("-").isdecimal():
        return int(key), value
    if is_region(value):
        one = ",".join(f"{number}={key}" for number in value)
        raise DataError(
            f"{path}: the label {key!r} is a region of the ids {', '.join(map(str, value))}, and regions may overlap; "
            f"score one region at a time: --labels {one} --prediction-labels {one}, with --ignore-label ID if there is "
            "one; or name each id, e.g. 1=MYO,2=LV"
        )
    raise DataError(
        f"{path}: the label {key!r}: {json.dumps(value)[:60]} is no NAME: ID pair; give the names as 1=MYO,2=LV"
    )


def _slicer_names(path: Path) -> LabelNames:
    try:
        lines = [
            line.split()
            for line in read_limited(path, _LARGEST_TABLE).decode().splitlines()
            if line[:1] not in ("#", "")
        ]
        return _checked(path, [(int(words[0]), words[1]) for words in lines if int(words[0])])
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"{path}: no colour table of 3D Slicer ({error}); give the names as 1=MYO,2=LV") from None


def _checked(path: Path, pairs: Iterable[tuple[int, str]]) -> LabelNames:
    names: dict[int, str] = {}
    for value, name in sorted(pairs):
        if names.setdefault(value, name) != name:
            raise DataError(f"{path}: the id {value} has two names, {names[value]} and {name}; correct the file")
    check_names(path, names.items())
    ignored = _ignored([value for value, name in names.items() if is_not_annotated(name)], str(path))
    background = {0} | {value for value, name in names.items() if name.lower() == BACKGROUND}
    structures = {value: name for value, name in names.items() if value not in background and value != ignored}
    if not 1 <= len(set(structures.values())) <= _MOST:
        raise DataError(
            f"{path}: {len(set(structures.values()))} names besides background; expected 1 to {_MOST}, give fewer with "
            "--labels"
        )
    return LabelNames(structures, frozenset(background), ignored, str(path))


def _ignored(ids: Collection[int], origin: str) -> int | None:
    if len(ids) > 1:
        raise ConfigError(
            f"{origin}: {', '.join(map(str, sorted(ids)))} are all called not annotated, and one id can be left out; "
            "give the label maps one id for all of them"
        )
    return next(iter(ids), None)


def match_names(labels: LabelNames, predictions: LabelNames) -> tuple[tuple[str, ...], dict[int, int], dict[int, int]]:
    """The structures to score, and the number of each id among them, for labels and predictions.

    Structures that only the predictions have are background (number 0).

    Returns:
        Names, background first; id -> index in them for labels, and for predictions.

    Raises:
        ConfigError: the predictions have no id for a structure of the labels.
    """
    classes = (BACKGROUND, *dict.fromkeys(labels.names.values()))
    there = set(predictions.names.values())
    missing = [name for name in classes[1:] if name not in there]
    if missing:
        hint = did_you_mean(missing[0], sorted(there))
        raise ConfigError(
            f"{predictions.origin} has no id for {', '.join(missing)} of {labels.origin}; it has {predictions}"
            + (f"; {hint}" if hint else "")
            + "; give --prediction-labels with all structures, or --labels without these"
        )
    index = {name: number for number, name in enumerate(classes)}
    return (
        classes,
        dict.fromkeys(labels.background, 0) | {value: index[name] for value, name in labels.names.items()},
        dict.fromkeys(predictions.background, 0)
        | ({} if predictions.ignored is None else {predictions.ignored: 0})
        | {value: index.get(name, 0) for value, name in predictions.names.items()},
    )
