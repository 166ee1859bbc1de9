"""What the page of a report needs of the held-out cases: rows of the table, and the data of the viewer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.evaluate.metrics import StructureScore
from mpscl_ray.report.cases import HeldOut, HeldOutCase, Scores
from mpscl_ray.report.groups import Group
from mpscl_ray.report.volumes import plane_of, unit_of
from mpscl_ray.runs.palette import hex_colour
from mpscl_ray.runs.structures import display_indices

_WORDS = {"missed": "missed", "false_alarm": "false alarm", "absent": ""}
"""Cells of structures without a regular Dice, by case kind."""


@dataclass(frozen=True)
class Row:
    """A case in the table of cases."""

    key: str
    """Of the case in the data of the viewer."""
    shown: bool
    """Whether the page has its volumes."""
    cells: Sequence[tuple[str, bool]]
    """Text, and whether it is bad: a structure that was missed or invented."""


@dataclass(frozen=True)
class CaseTable:
    """The cases of one target, worst first."""

    heading: str
    columns: Sequence[str]
    above: Sequence[tuple[str, int]]
    rows: Sequence[Row]


def case_tables(groups: Sequence[Group]) -> list[CaseTable]:
    """A table for each target that has held-out cases."""
    return [
        _table(group, group.held_out, number)
        for number, group in enumerate(groups)
        if group.held_out is not None and group.held_out.cases
    ]


def _table(group: Group, held_out: HeldOut, number: int) -> CaseTable:
    main = group.contrast[-1]
    structures = display_indices(group.classes)
    titles = [title for title, _, _ in group.columns]
    estimated = ["estimate"] if any(main in entry.estimates for entry in held_out.cases) else []
    columns = ["case", *titles, *estimated, *(group.classes[index] for index in structures), "ASD mm", "HD95 mm"]
    above = [("", 1), ("mean Dice %", len(titles)), (titles[main], 1)][: 2 + len(estimated)]
    above += [(f"{titles[main]}: Dice %", len(structures)), (titles[main], 2)]
    rows = []
    for at, entry in enumerate(held_out.cases):
        cells = [(entry.case.id, False), *((_percent(entry.mean_dice(column)), False) for column in range(len(titles)))]
        cells += [(_percent(entry.estimates.get(main, math.nan)), False) for _ in estimated]
        scores = entry.scores[main]
        cells += [_structure(scores[index - 1]) if scores else ("", False) for index in structures]
        cells += [(_mean(scores, name), False) for name in ("asd_mm", "hd95_mm")]
        rows.append(Row(f"{number}-{at}", entry.volumes is not None, cells))
    return CaseTable(f"Target {group.name}" if group.suffix else "", columns, above, rows)


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.1f}"


def _structure(score: StructureScore) -> tuple[str, bool]:
    if score.case_kind in _WORDS:
        return _WORDS[score.case_kind], score.case_kind != "absent"
    return _percent(score.dice), False


def _mean(scores: Scores | None, measure: str) -> str:
    values = [value for score in scores or () if not math.isnan(value := getattr(score, measure))]
    return f"{np.mean(values):.1f}" if values else ""


# ------------------------------------------------------------------------------------------------------- viewer


def viewer_data(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """What the script of the viewer reads: plain values, a list with an entry for each case whose volumes are shown."""
    return [
        _case(group, group.held_out, entry, f"{number}-{at}")
        for number, group in enumerate(groups)
        if group.held_out is not None
        for at, entry in enumerate(group.held_out.cases)
        if entry.volumes is not None
    ]


def _case(group: Group, held_out: HeldOut, entry: HeldOutCase, key: str) -> dict[str, Any]:
    assert entry.volumes is not None
    main = group.contrast[-1]
    overlays = [
        {"title": title, "file": f"{key}-{column}", "dice": _dice(entry.scores[column])}
        for column, (title, _, _) in enumerate(group.columns)
    ]
    if entry.volumes.label is not None:
        overlays.append({"title": "ground truth", "file": f"{key}-label", "dice": None})
    classes = [
        {"index": index, "name": group.classes[index], "colour": hex_colour(index)}
        for index in display_indices(group.classes)
    ]
    if held_out.manifest.labels.get("not_annotated"):
        classes.append({"index": NOT_ANNOTATED, "name": "not annotated", "colour": hex_colour(NOT_ANNOTATED)})
    return {
        "key": key,
        "id": entry.case.id,
        "split": held_out.split,
        "target": group.name,
        "image": f"{key}-image",
        "unit": unit_of(entry.case, held_out.manifest),
        "plane": plane_of(entry.case, held_out.manifest),
        "main": main,
        "overlays": overlays,
        "classes": classes,
    }


def _dice(scores: Scores | None) -> dict[str, float | None] | None:
    """By structure; None where it has none."""
    if not scores:
        return None
    return {score.structure: None if math.isnan(score.dice) else score.dice for score in scores}


def viewer_files(groups: Sequence[Group]) -> Iterator[tuple[str, bytes]]:
    """Name and content of every ``.nii.gz`` file that :func:`viewer_data` names."""
    for number, group in enumerate(groups):
        for at, entry in enumerate(group.held_out.cases if group.held_out else ()):
            if entry.volumes is None:
                continue
            key = f"{number}-{at}"
            yield f"{key}-image", entry.volumes.image
            if entry.volumes.label is not None:
                yield f"{key}-label", entry.volumes.label
            for column, content in enumerate(entry.volumes.predictions):
                yield f"{key}-{column}", content
