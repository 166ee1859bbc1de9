"""Summaries of the scores of many volumes, and tables of summaries: text, Markdown or CSV.

Every mean is followed by the numbers of volumes that have no regular value: ``m`` missed, ``f`` false alarm, ``a``
absent.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mpscl_ray.evaluate.metrics import MEASURES, CaseKind, StructureScore
from mpscl_ray.runs.structures import display_order

KINDS: tuple[CaseKind, ...] = ("ok", "missed", "false_alarm", "absent")
TITLES = {
    "dice": "Dice %",
    "asd_mm": "ASD mm",
    "asd_voxel": "ASD voxels",
    "asd_mm_mean_of_means": "ASD mm, mean of two means (medpy 0.4)",
    "asd_voxel_mean_of_means": "ASD voxels, mean of two means (medpy 0.4)",
    "hd95_mm": "HD95 mm",
    "asd_mm_worst_case": "ASD mm, worst case",
    "asd_voxel_worst_case": "ASD voxels, worst case",
}
LEGEND = (
    "Mean ± sd over volumes (sd with ddof 0); the mean column is the mean of the structures' means. Beside a mean: "
    "volumes in which the structure is m = missed (in the truth, not predicted), f = false alarm (predicted, not in "
    "the truth), a = absent (in neither). Dice counts m and f as 0 and leaves a out; ASD is undefined for m, f and a "
    "and leaves them out; in the worst case m and f count as the diagonal of the volume."
)
Style = Literal["text", "markdown"]


@dataclass(frozen=True)
class Statistic:
    """Mean and standard deviation (ddof 0) of the ``n`` volumes that have a value; NaN if ``n`` is 0."""

    mean: float
    sd: float
    n: int


@dataclass(frozen=True)
class StructureSummary:
    """One structure over all volumes: how often each case kind occurs, and the statistic of each measure."""

    structure: str
    counts: Mapping[CaseKind, int]
    measures: Mapping[str, Statistic]


@dataclass(frozen=True)
class Summary:
    """All structures over all volumes, in table order, and their mean."""

    volumes: int
    structures: tuple[StructureSummary, ...]
    mean: StructureSummary

    def structure(self, name: str) -> StructureSummary:
        """The summary of one structure, or of ``mean``."""
        return {entry.structure: entry for entry in (*self.structures, self.mean)}[name]

    def to_json(self) -> dict[str, Any]:
        """Plain values; an undefined number is null."""
        return {
            "volumes": self.volumes,
            "structures": {
                entry.structure: {
                    "counts": dict(entry.counts),
                    **{name: _statistic_json(statistic) for name, statistic in entry.measures.items()},
                }
                for entry in (*self.structures, self.mean)
            },
        }


def summarise(scores: Mapping[str, Sequence[StructureScore]]) -> Summary:
    """Average the scores of volumes.

    Args:
        scores: per case the scores of its structures, the same structures in every case.

    Returns:
        The summary. The mean over structures is the mean of their means; its sd is that of the means of the volumes. It
        is NaN if a structure has no value although it is in the truth or the prediction of a volume: leaving out what
        was missed never improves it.

    Raises:
        ValueError: no volume at all, or volumes with different structures.
    """
    if not scores:
        raise ValueError("no volume to summarise")
    names = [score.structure for score in next(iter(scores.values()))]
    for case, rows in scores.items():
        if [row.structure for row in rows] != names:
            raise ValueError(f"case {case} has structures {[row.structure for row in rows]}, the first has {names}")
    by_name = {name: [rows[position] for rows in scores.values()] for position, name in enumerate(names)}
    structures = tuple(
        StructureSummary(
            structure=name,
            counts=_counts(by_name[name]),
            measures={measure: _statistic(getattr(row, measure) for row in by_name[name]) for measure in MEASURES},
        )
        for name in display_order(names)
    )
    present = [entry for entry in structures if entry.counts["absent"] < len(scores)]
    measures = {}
    for measure in MEASURES:
        per_volume = _statistic(_statistic(getattr(row, measure) for row in rows).mean for rows in scores.values())
        means = [entry.measures[measure].mean for entry in present]
        measures[measure] = Statistic(float(np.mean(means)) if means else math.nan, per_volume.sd, per_volume.n)
    everything = [row for rows in scores.values() for row in rows]
    return Summary(len(scores), structures, StructureSummary("mean", _counts(everything), measures))


def default_measures(summaries: Iterable[Summary]) -> tuple[str, ...]:
    """Dice, ASD and HD95 in mm (ASD in voxels if no spacing is known), and the worst case of ASD if a structure was
    missed or invented."""
    entries = [summary.mean for summary in summaries]
    wrong = any(entry.counts["missed"] or entry.counts["false_alarm"] for entry in entries)
    known = any(entry.measures["asd_mm_worst_case"].n for entry in entries)
    unit = "mm" if known else "voxel"
    return ("dice", f"asd_{unit}", *["hd95_mm"] * known, *[f"asd_{unit}_worst_case"] * wrong)


def format_table(
    rows: Mapping[str, Summary], measures: Sequence[str] | None = None, style: Style = "text", legend: bool = True
) -> str:
    """A block per measure with a row per summary and a column per structure, ending with the mean.

    Args:
        rows: label of each row (a phase, a method) and its summary, all with the same structures.
        measures: names from :data:`mpscl_ray.evaluate.metrics.MEASURES`; None for :func:`default_measures`.
        style: ``text`` for a terminal, ``markdown`` for a document.
        legend: whether a paragraph under the table explains what the numbers are.

    Returns:
        The table, without a newline at the end.
    """
    chosen = default_measures(rows.values()) if measures is None else tuple(measures)
    first = next(iter(rows.values()))
    columns = [entry.structure for entry in (*first.structures, first.mean)]
    blocks = []
    for measure in chosen:
        cells = [[TITLES[measure], *columns]]
        for label, summary in rows.items():
            cells.append([label, *(_cell(summary.structure(name), measure) for name in columns)])
        blocks.append(cells)
    widths = [max(len(row[column]) for cells in blocks for row in cells) for column in range(len(columns) + 1)]
    text = "\n\n".join(markdown_table(cells) if style == "markdown" else text_table(cells, widths) for cells in blocks)
    return f"{text}\n\n{LEGEND}" if legend else text


def summary_csv(rows: Mapping[str, Summary]) -> str:
    """One line per row and structure with the counts and mean, sd and n of every measure; undefined is empty."""
    header = ["row", "structure", "volumes", *KINDS]
    header += [f"{measure}_{part}" for measure in MEASURES for part in ("mean", "sd", "n")]
    lines: list[list[str]] = [header]
    for label, summary in rows.items():
        for entry in (*summary.structures, summary.mean):
            line = [label, entry.structure, str(summary.volumes), *(str(entry.counts[kind]) for kind in KINDS)]
            for measure in MEASURES:
                statistic = entry.measures[measure]
                line += [_number(statistic.mean), _number(statistic.sd), str(statistic.n)]
            lines.append(line)
    return csv_text(lines)


def scores_csv(scores: Mapping[str, Sequence[StructureScore]]) -> str:
    """One line per case and structure with every measure and both voxel counts; undefined is empty."""
    lines = [["case", "structure", "case_kind", *MEASURES, "predicted_voxels", "truth_voxels"]]
    for case, rows in scores.items():
        for row in rows:
            values = [_number(getattr(row, measure)) for measure in MEASURES]
            lines.append(
                [case, row.structure, row.case_kind, *values, str(row.predicted_voxels), str(row.truth_voxels)]
            )
    return csv_text(lines)


def _counts(rows: Sequence[StructureScore]) -> dict[CaseKind, int]:
    return {kind: sum(row.case_kind == kind for row in rows) for kind in KINDS}


def _statistic(values: Iterable[float]) -> Statistic:
    defined = [value for value in values if not math.isnan(value)]
    if not defined:
        return Statistic(math.nan, math.nan, 0)
    return Statistic(float(np.mean(defined)), float(np.std(defined)), len(defined))


def _statistic_json(statistic: Statistic) -> dict[str, float | int | None]:
    mean, sd = (None if math.isnan(value) else value for value in (statistic.mean, statistic.sd))
    return {"mean": mean, "sd": sd, "n": statistic.n}


def _cell(entry: StructureSummary, measure: str) -> str:
    statistic = entry.measures[measure]
    scale, digits = (100.0, 1) if measure == "dice" else (1.0, 2)
    text = "n/a"
    if not math.isnan(statistic.mean):
        text = f"{scale * statistic.mean:.{digits}f} ± {scale * statistic.sd:.{digits}f}"
    odd = [f"{entry.counts[kind]}{kind[0]}" for kind in KINDS[1:] if entry.counts[kind]]
    return f"{text} ({' '.join(odd)})" if odd else text


def text_table(cells: Sequence[Sequence[str]], widths: Sequence[int]) -> str:
    """Rows of cells with the widths of their columns, aligned right but for the first."""
    lines = []
    for row in cells:
        padded = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def markdown_table(cells: Sequence[Sequence[str]]) -> str:
    """A header and rows of cells as a Markdown table."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
    lines.insert(1, "|---|" + "---:|" * (len(cells[0]) - 1))
    return "\n".join(lines)


def csv_text(lines: Iterable[Sequence[Any]]) -> str:
    """Lines of cells as CSV."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    return buffer.getvalue()


def _number(value: float) -> str:
    return "" if math.isnan(value) else repr(float(value))
