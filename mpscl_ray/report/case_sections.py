"""The sections of a report that are more than figures: the cases one by one with their viewer, and the curves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mpscl_ray.evaluate.evaluation import PROTOCOLS
from mpscl_ray.report.cases import HeldOut, leave_out_volumes
from mpscl_ray.report.figures.spread import dice_by_case
from mpscl_ray.report.figures.style import house_style, save
from mpscl_ray.report.groups import Group
from mpscl_ray.report.html import Section, Table
from mpscl_ray.report.viewer import case_tables
from mpscl_ray.runs.curves import curves
from mpscl_ray.runs.structures import display_indices
from mpscl_ray.runs.wording import counted


def case_by_case(groups: Sequence[Group], limit_mb: float, folder: Path, dpi: float, pdf: bool) -> Iterator[Section]:
    """Scores of every held-out case, and the viewer; drops volumes for which a page of that size has no room.

    The figures are written into ``folder`` as PNG and, if wanted, PDF.
    """
    section = Section("Case by case", "Every test case, the worst first by mean Dice.")
    for group in groups:
        if group.held_out is None:
            continue
        left_out = leave_out_volumes(group.held_out.cases, int(limit_mb * 1e6 / len(groups)))
        if left_out:
            section.notes.append(
                f"Volumes of {left_out} of {counted(len(group.held_out.cases), 'case')} are left out: the page "
                f"would be larger than {limit_mb:g} MB (--max-size); the worst cases are kept."
            )
        section.notes += _about_cases(group, group.held_out)
        columns = {title: dice for title, dice in _dice_of_cases(group, group.held_out) if any(dice.values())}
        if columns:
            section.tables.append(_spread_table(group, group.held_out))
            with house_style():
                figure = dice_by_case(columns)
            caption = "A point is the Dice of one case, a bar the mean."
            section.add_figure(f"cases{group.suffix}", figure, caption, "Dice of each case, by structure")
    section.figures = [replace(picture, image=save(picture, folder, dpi, pdf)) for picture in section.figures]
    section.cases = case_tables(groups)
    if not section.cases:
        return
    if any(row.shown for table in section.cases for row in table.rows):
        section.lead += " Click a row to open the case in the viewer."
    yield section


def _about_cases(group: Group, held_out: HeldOut) -> list[str]:
    notes = []
    if held_out.split == "val":
        notes.append("No test case is labelled, or there is none: these are validation cases.")
    if not held_out.scored:
        notes.append(
            "There are no scores: no case is labelled."
            if not any(entry.case.labelled for entry in held_out.cases)
            else "There are no scores yet: python -m mpscl_ray.evaluate RUN makes them, and a report with volumes."
        )
    if any(entry.estimates for entry in held_out.cases):
        notes.append(
            "The estimate of the mean Dice uses no label of the target. It was calibrated on labelled validation "
            "volumes that the network was trained like: it ranks cases, and its level may be off."
        )
    if any(entry.volumes for entry in held_out.cases):
        notes.append(
            "The viewer shows patients: give this page only to those who may see the images. It has the prepared "
            "slices, in 256 grey values; intensities above the clipping percentile of prepare are cut."
        )
    return [f"Target {group.name}. {note}" for note in notes] if group.suffix else notes


def _dice_of_cases(group: Group, held_out: HeldOut) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Title of each column, and structure -> Dice of the cases that have one."""
    for column, (title, _, _) in enumerate(group.columns):
        found: dict[str, list[float]] = {group.classes[index]: [] for index in display_indices(group.classes)}
        for entry in held_out.cases:
            for score in entry.scores[column] or ():
                if not math.isnan(score.dice):
                    found[score.structure].append(score.dice)
        yield title, found


def _spread_table(group: Group, held_out: HeldOut) -> Table:
    rows = []
    for column, (title, by_structure) in enumerate(_dice_of_cases(group, held_out)):
        means = [entry.mean_dice(column) for entry in held_out.cases]
        cells = [*by_structure.values(), [mean for mean in means if not math.isnan(mean)]]
        rows.append([title, *(_spread(values) for values in cells)])
    header = ["Dice %", *(group.classes[index] for index in display_indices(group.classes)), "mean of a case"]
    caption = (
        f"Mean ± standard deviation over the cases of the split {held_out.split}, and the lowest to the highest: "
        f"{PROTOCOLS[held_out.protocol]}."
    )
    return Table(header, rows, [], caption)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    low, high = 100 * min(values), 100 * max(values)
    return f"{100 * np.mean(values):.1f} ± {100 * np.std(values):.1f} ({low:.1f} to {high:.1f})"


def curves_section(groups: Sequence[Group]) -> Iterator[Section]:
    """The interactive curves of every run."""
    section = Section(
        "Curves",
        "Drag along a curve to zoom, double-click to see all again; click a name to hide its curve.",
    )
    runs = [(run, group.classes) for group in groups for run in group.runs]
    found = [(f"{run.title} ({run.folder.name})", curves(run.records, classes)) for run, classes in runs]
    section.curves = [(title, panels) for title, panels in found if panels["panels"]]
    if section.curves:
        yield section
