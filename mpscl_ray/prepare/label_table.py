"""What the numbers in a label file mean."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.data.volumes.file_names import composed
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.runs import safe_json

BACKGROUND = "background"
_NOT_ANNOTATED = frozenset(("void", "unannotated", "notannotated", "unlabelled", "unlabeled", "dontcare", "donotcare"))
_DOUBTFUL = re.compile(
    r"unknown|uncertain|exclu|ambiguous|outside|masked|invalid|undefined|unclear|unspecified|unassigned|missing|"
    r"\b(none|nan|na|n/a|fov|other)\b"
)
UnknownLabels = Literal["error", "background"]


@dataclass(frozen=True)
class LabelTable:
    """Class names in the order of the prepared label values, and the class of each raw id."""

    classes: tuple[str, ...]
    """Background first."""
    values: Mapping[int, int]
    """Raw id -> prepared label value."""
    ignored: frozenset[int] = frozenset()
    """Raw ids that are background on purpose."""
    unknown: UnknownLabels = "error"
    """What becomes of any other raw id: an error, or background with a warning."""
    not_annotated: frozenset[int] = frozenset()
    """Raw ids of voxels that nobody annotated (nnU-Net's ``ignore``): they count in no loss and no score."""
    masks: tuple[str, ...] = ()
    """Names of the mask files of a case, whose raw ids are 1, 2, ...; empty if a label map holds all structures."""
    corrections: Mapping[int, int] = field(default_factory=dict)
    """Wrong raw id -> the raw id that was meant; corrected first."""

    def record(self) -> dict[str, Any]:
        """The table for the manifest."""
        return {
            "values": {str(raw): self.classes[value] for raw, value in sorted(self.values.items())},
            "background": sorted(self.ignored),
            "unknown": self.unknown,
            "corrections": {str(wrong): right for wrong, right in sorted(self.corrections.items())},
            **({"not_annotated": sorted(self.not_annotated)} if self.not_annotated else {}),
            **({"masks": list(self.masks)} if self.masks else {}),
        }

    def effective(self) -> dict[int, int]:
        """Raw id -> prepared label value with the corrections applied."""
        values = {**self.values, **dict.fromkeys(self.not_annotated, NOT_ANNOTATED)}
        for wrong, right in self.corrections.items():
            values[wrong] = 0 if right in self.ignored else values[right]
        return values


def is_not_annotated(name: str) -> bool:
    """Whether the name of a label says that its voxels were not annotated, as every one with ``ignore`` does."""
    letters = re.sub(r"[\W_]+", "", name.lower())
    return "ignore" in letters or letters in _NOT_ANNOTATED


def doubtful_names(classes: Iterable[str]) -> list[str]:
    """Warnings on classes whose name may mean voxels that nobody annotated."""
    return [
        f"{name!r} is a class like the others, trained and scored; if it marks voxels that nobody annotated, "
        "call it ignore"
        for name in classes
        if _DOUBTFUL.search(name.lower().replace("_", " "))
    ]


def read_json(path: Path) -> Any:
    """The content of a JSON file with a label table or a split.

    Raises:
        OSError: it cannot be read.
        DataError: it is not JSON, or a name in it has two values.
    """
    try:
        return safe_json.read(path, pairs=partial(_once, path))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from None


def _once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if found.setdefault(key, value) != value:
            raise DataError(
                f"{path}: {key!r} is there twice, as {json.dumps(found[key])[:60]} and {json.dumps(value)[:60]}; "
                "correct the file"
            )
    return found


def check_names(path: Path, names: Iterable[tuple[int, str]]) -> None:
    """Refuse names in a file that differ only in blanks or case, and a background that is not 0 where 0 has a name.

    Raises:
        DataError: there are such names.
    """
    spellings: dict[str, str] = {}
    background: list[int] = []
    zero = BACKGROUND
    for value, name in names:
        plain = " ".join(name.split()).casefold()
        if spellings.setdefault(plain, name) != name and plain != BACKGROUND:
            raise DataError(
                f"{path}: the labels {spellings[plain]!r} and {name!r} differ only in upper and lower case or blanks; "
                "use one spelling, or two names"
            )
        if plain == BACKGROUND:
            background.append(value)
        elif value == 0:
            zero = name
    if background and zero != BACKGROUND:
        raise DataError(
            f"{path}: the label 0 is called {zero!r} and {background[0]} background; 0 is background here, so give "
            f"{zero!r} another id in the label maps"
        )


def is_region(value: object) -> bool:
    """Whether the value of a label in nnU-Net's ``dataset.json`` is a region: a list of ids, which may overlap."""
    return isinstance(value, list) and len(value) > 0 and all(type(raw) is int for raw in value)


MMWHS = LabelTable(
    (BACKGROUND, "MYO", "LAC", "LVC", "AA"),
    {0: 0, 205: 1, 420: 2, 500: 3, 820: 4},
    frozenset({550, 600, 850}),
)
"""Raw ids of MM-WHS 2017; right atrium, right ventricle and pulmonary artery are background.

Source: Sec. IV-A, Liu et al. 2022 (the four structures).
"""

RELEASED = LabelTable(MMWHS.classes, {0: 0, 1: 1, 2: 2, 3: 3, 4: 4}, frozenset(), "background")
"""Values in the SIFA, PnP-AdaNet and MPSCL releases; 5 occurs too, and is none of the four structures."""


def parse_label_table(text: str) -> LabelTable:
    """Table from ``200=MYO,500=LV,600=RV``: classes in the order of first mention; several ids may share a class.

    ``0=background`` is understood and may be left out. Names instead of ids are those of mask files:
    ``heart_myocardium=MYO,heart_ventricle_left=LV``.

    Raises:
        ConfigError: the text is anything else.
    """
    text = composed(text)
    classes = [BACKGROUND]
    values = {0: 0}
    masks = mask_names(text)
    for number, mask in enumerate(masks, start=1):
        text = re.sub(rf"(^|,)\s*{re.escape(mask)}\s*=", rf"\g<1>{number}=", text, count=1)
    not_annotated: set[int] = set()
    for entry in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(-?\d+)\s*=\s*(\S(?:.*\S)?)", entry)
        if not match:
            raise ConfigError(f"--labels: {entry!r} is not ID=NAME; write e.g. 200=MYO,500=LV,600=RV")
        raw, name = int(match[1]), match[2]
        if raw in values and (raw != 0 or name.lower() != BACKGROUND):
            raise ConfigError(f"--labels: id {raw} has two meanings, {classes[values[raw]]} and {name}")
        if name.lower() == BACKGROUND:
            values[raw] = 0
            continue
        if is_not_annotated(name):
            not_annotated.add(raw)
            continue
        present = next((other for other in classes if other.lower() == name.lower()), name)
        if present != name:
            raise ConfigError(f"--labels: {present} and {name} differ only in upper and lower case; use one spelling")
        if name not in classes:
            classes.append(name)
        values[raw] = classes.index(name)
    if len(classes) < 2:
        raise ConfigError("--labels: no class but background; write e.g. 200=MYO,500=LV,600=RV")
    if len(classes) > NOT_ANNOTATED:
        raise ConfigError(f"--labels: {len(classes)} classes; at most {NOT_ANNOTATED} fit the label type uint8")
    return LabelTable(tuple(classes), values, not_annotated=frozenset(not_annotated), masks=masks)


def mask_names(text: str | None) -> tuple[str, ...]:
    """The names of mask files in ``heart_myocardium=MYO,...``, in their order; none if the text has ids.

    Raises:
        ConfigError: ids and names are mixed, or a name is there twice.
    """
    entries = [part.partition("=") for part in composed(text or "").split(",") if "=" in part]
    keys = [key.strip() for key, _, name in entries if not name.strip().isdecimal()]  # NAME=ID is a slip
    names = [key for key in keys if not re.fullmatch(r"-?\d+", key) and re.fullmatch(r"[^\s=]+", key)]
    if not names:
        return ()
    if len(names) < len(keys):
        raise ConfigError(f"--labels {text}: ids and names of mask files are mixed; give one of the two")
    if len(set(names)) < len(names):
        raise ConfigError(f"--labels {text}: a mask file is named twice")
    return tuple(names)


def with_ignored(table: LabelTable, text: str) -> LabelTable:
    """Table in which the ids of ``550,600,850`` are background on purpose too.

    Raises:
        ConfigError: the text is anything else, or an id means a class.
    """
    ids = _without_class(table, "--ignore-labels", text)
    return replace(table, ignored=table.ignored | ids, not_annotated=table.not_annotated - ids)


def with_not_annotated(table: LabelTable, text: str) -> LabelTable:
    """Table in which the ids of ``5,6`` mark voxels that nobody annotated.

    Raises:
        ConfigError: the text is anything else, or an id means a class.
    """
    ids = _without_class(table, "--not-annotated-labels", text)
    return replace(table, ignored=table.ignored - ids, not_annotated=table.not_annotated | ids)


def label_ids(option: str, text: str) -> frozenset[int]:
    """The ids of ``550,600,850``.

    Raises:
        ConfigError: the text is anything else.
    """
    try:
        return frozenset(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"{option} {text!r}: expected comma-separated whole numbers, e.g. 550,600,850") from None


def _without_class(table: LabelTable, option: str, text: str) -> frozenset[int]:
    ids = label_ids(option, text)
    for raw in sorted(ids):
        if table.values.get(raw, 0) != 0:
            raise ConfigError(
                f"{option} {text}: {raw} means {table.classes[table.values[raw]]}; a table without it (--labels) "
                "leaves that class out"
            )
    return ids


def with_corrections(table: LabelTable, text: str) -> LabelTable:
    """Table that also maps wrong ids, given as ``421=420``: the wrong raw id and the one that was meant.

    Raises:
        ConfigError: an entry is no such pair, or the meant id is not in the table.
    """
    corrections = dict(table.corrections)
    for entry in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(-?\d+)\s*=\s*(-?\d+)", entry)
        if not match:
            raise ConfigError(f"--fix-label: {entry!r} is not WRONG=MEANT; write e.g. 421=420")
        wrong, meant = int(match[1]), int(match[2])
        known_ids = {*table.values, *table.ignored, *table.not_annotated}
        if meant not in known_ids:
            known = ", ".join(str(raw) for raw in sorted(known_ids))
            raise ConfigError(f"--fix-label {entry}: {meant} is not in the label table, which has {known}")
        if wrong in table.values:
            raise ConfigError(f"--fix-label {entry}: {wrong} already means {table.classes[table.values[wrong]]}")
        corrections[wrong] = meant
    return replace(table, corrections=corrections)
