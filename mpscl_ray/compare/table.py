"""The table of a comparison in the form of Table III of the paper: text, Markdown, CSV and LaTeX."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mpscl_ray.compare.published import NOTE, TITLE, Published
from mpscl_ray.evaluate.tables import csv_text, markdown_table, text_table
from mpscl_ray.runs.structures import display_order

LOWER, UPPER = "source_only", "supervised"

Style = Literal["text", "markdown", "latex"]

_DIGITS = {"dice": 1, "asd": 2}


@dataclass(frozen=True)
class CellResult:
    """The scores of one finished run."""

    seed: int
    dice: Mapping[str, float]
    """Structure -> mean over volumes in [0, 1], ``mean`` included; NaN where undefined."""
    asd: Mapping[str, float]
    """Structure -> mean over volumes; NaN where undefined."""
    missed: int
    """Structures, over all volumes, of which no voxel was predicted."""
    iterations: int
    """Of all phases."""
    seconds: float
    """Wall time of training and evaluation, shared phases included."""

    @classmethod
    def from_summary(
        cls, seed: int, summary: Mapping[str, Any], iterations: int, seconds: float, unit: str
    ) -> CellResult:
        """From the summary of an evaluation as in its JSON file; ``unit`` is mm or voxel."""
        measures: dict[str, dict[str, float]] = {}
        for key, measure in (("dice", "dice"), ("asd", f"asd_{unit}")):
            means = {name: entry[measure]["mean"] for name, entry in summary["structures"].items()}
            measures[key] = {name: math.nan if mean is None else float(mean) for name, mean in means.items()}
        missed = int(summary["structures"]["mean"]["counts"]["missed"])
        return cls(seed, measures["dice"], measures["asd"], missed, iterations, seconds)


@dataclass(frozen=True)
class Direction:
    """One direction of the comparison."""

    title: str
    """Such as ``CT to MR``."""
    data: str
    """Presets and the volumes that were scored, in a sentence."""
    structures: Sequence[str]
    """In the order of the classes."""
    rows: Mapping[str, str]
    """System -> title; the order of the rows."""
    results: Mapping[str, Sequence[CellResult]]
    """System -> its finished runs; a system without any has an empty row."""
    seeds: int
    """Planned runs of each system."""
    unit: str
    """Of ASD: mm or voxel."""
    published: Mapping[str, Published]
    """System -> numbers on MM-WHS; empty for other data."""

    @property
    def columns(self) -> list[str]:
        """Structures in display order, then their mean."""
        return [*display_order(self.structures), "mean"]


@dataclass(frozen=True)
class Value:
    """Mean and standard deviation over seeds; NaN mean where a seed has no value, NaN sd for one seed."""

    mean: float
    sd: float


def over_seeds(values: Sequence[float]) -> Value:
    """Mean and sd (ddof 1) of one number per seed.

    A seed without a value makes the mean undefined: a missed structure must not improve a method's mean.
    """
    if not values or any(math.isnan(value) for value in values):
        return Value(math.nan, math.nan)
    return Value(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan)


def gap_closed(system: float, lower: float, upper: float) -> float:
    """Share of the way from the lower to the upper bound, in [0, 1] between them; NaN where there is no gap."""
    return (system - lower) / (upper - lower) if upper > lower else math.nan


@dataclass(frozen=True)
class Row:
    """One system in one direction, over its seeds."""

    system: str
    """Key of SYSTEMS."""
    title: str
    seeds: int
    """Finished ones."""
    dice: Mapping[str, Value]
    """Column -> value, percent."""
    asd: Mapping[str, Value]
    """Column -> value."""
    missed: int
    """See :class:`CellResult`; over all seeds."""
    gap: float
    """Percent of the gap closed, over the seeds that both bounds have too; NaN where there is none."""
    iterations: int | None
    """Of a run; None where there is none."""
    minutes: float
    """Mean wall time of a run; NaN where there is none."""


def rows_of(direction: Direction) -> list[Row]:
    """The rows of a direction, in order."""

    def values(results: Sequence[CellResult], measure: str) -> dict[str, Value]:
        scale = 100.0 if measure == "dice" else 1.0
        return {
            column: over_seeds([scale * getattr(result, measure)[column] for result in results])
            for column in direction.columns
        }

    def gap(system: str) -> float:
        """Over the seeds that the system and both bounds have: means over different seeds are not comparable."""
        dice = [
            {result.seed: result.dice["mean"] for result in direction.results.get(name, ())}
            for name in (system, LOWER, UPPER)
        ]
        common = set.intersection(*map(set, dice))
        return gap_closed(*(over_seeds([of_seed[seed] for seed in common]).mean for of_seed in dice))

    def row(system: str, title: str) -> Row:
        results = direction.results.get(system, ())
        return Row(
            system=system,
            title=title,
            seeds=len(results),
            dice=values(results, "dice"),
            asd=values(results, "asd"),
            missed=sum(result.missed for result in results),
            gap=100 * gap(system),
            iterations=results[0].iterations if results else None,
            minutes=float(np.mean([result.seconds for result in results])) / 60 if results else math.nan,
        )

    return [row(system, title) for system, title in direction.rows.items()]


def best(rows: Sequence[Row], measure: str, column: str) -> frozenset[str]:
    """The systems with the best mean as printed, the supervised bound excluded; several where they tie."""
    sign = 1 if measure == "dice" else -1
    means = {
        row.system: sign * round(getattr(row, measure)[column].mean, _DIGITS[measure])
        for row in rows
        if row.system != UPPER and not math.isnan(getattr(row, measure)[column].mean)
    }
    top = max(means.values(), default=math.nan)
    return frozenset(system for system, mean in means.items() if mean == top)


def legend(directions: Sequence[Direction]) -> str:
    """What the numbers are, in a paragraph."""
    seeds = max((direction.seeds for direction in directions), default=1)
    text = (
        f"Mean ± sd (ddof 1) over {seeds} seed{'s' * (seeds > 1)} of the mean over volumes; every slice counts, a "
        "missed structure has Dice 0 and no ASD, and where that leaves a seed without ASD the cell is n/a. The mean "
        "column is the mean of the structures. In bold the best system, Supervised excluded. Gap closed: share of the "
        "gap in mean Dice between W/o adaptation and Supervised, over the seeds that both have too. Minutes: wall "
        "time of a run from its first phase to its scores; shared phases count for each run that uses them, and "
        "concurrent runs share the machine."
    )
    return f"{text} {NOTE}" if any(direction.published for direction in directions) else text


def format_comparison(directions: Sequence[Direction], style: Style) -> str:
    """All directions, one block after the other, and the legend."""
    write = {"text": _text, "markdown": _markdown, "latex": _latex}[style]
    blocks = [write(direction) for direction in directions]
    if style == "latex":
        return "\n\n".join(["% " + legend(directions), *blocks]) + "\n"
    return "\n\n".join([*blocks, legend(directions)]) + "\n"


def comparison_csv(directions: Sequence[Direction]) -> str:
    """A line for each of :func:`comparison_rows`; undefined is empty."""
    rows = comparison_rows(directions)

    def cell(value: str | float | None) -> str:
        undefined = value is None or (isinstance(value, float) and math.isnan(value))
        return "" if undefined else value if isinstance(value, str) else repr(value)

    return csv_text([list(rows[0]), *([cell(value) for value in row.values()] for row in rows)])


def comparison_rows(directions: Sequence[Direction]) -> list[dict[str, str | float | None]]:
    """An entry per direction, system and column; published numbers have keys of their own."""
    unit = directions[0].unit if directions else "mm"
    found: list[dict[str, str | float | None]] = []
    names = (
        "direction system title structure seeds seeds_planned dice_percent_mean dice_percent_sd "
        f"asd_{unit}_mean asd_{unit}_sd missed gap_closed_percent iterations minutes "
        "published_mmwhs_dice_percent published_mmwhs_asd_voxel"
    ).split()
    for direction in directions:
        for row in rows_of(direction):
            for column in direction.columns:
                whole = column == "mean"
                published = direction.published.get(row.system, Published(None, None))
                dice, asd = row.dice[column], row.asd[column]
                numbers: list[float | int | None] = [dice.mean, dice.sd, asd.mean, asd.sd]
                numbers += [row.missed, row.gap, row.iterations, row.minutes] if whole else [None] * 4
                numbers += [published.dice, published.asd] if whole else [None, None]
                about: list[str | float | None] = [
                    direction.title,
                    row.system,
                    row.title,
                    column,
                    row.seeds,
                    direction.seeds,
                ]
                found.append(dict(zip(names, [*about, *numbers], strict=True)))
    return found


# ------------------------------------------------------------------------------------------------------- styles


def _cells(direction: Direction, bold: tuple[str, str], sd: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows as strings; ``bold`` encloses the best, ``sd`` separates mean and sd."""
    rows = rows_of(direction)
    header = ["system"]
    header += [f"Dice % {column}" for column in direction.columns]
    header += [f"ASD {direction.unit} {column}" for column in direction.columns]
    header += ["gap closed %", "iterations", "minutes"]
    if direction.published:
        header += [f"Dice % ({TITLE})", f"ASD voxels ({TITLE})"]
    found = []
    for row in rows:
        line = [row.title if row.seeds == direction.seeds else f"{row.title} ({row.seeds} of {direction.seeds} seeds)"]
        for measure, column in itertools.product(_DIGITS, direction.columns):
            value = getattr(row, measure)[column]
            text = _number(value.mean, _DIGITS[measure])
            if not math.isnan(value.sd):
                text += sd + _number(value.sd, _DIGITS[measure])
            line.append(text.join(bold) if row.system in best(rows, measure, column) else text)
        line += [_number(row.gap, 0), str(row.iterations), _number(row.minutes, 1)]
        if not row.seeds:
            line[1:] = [""] * (len(line) - 1)
        if direction.published:
            published = direction.published.get(row.system, Published(None, None))
            line += ["" if n is None else _number(n, 2) for n in (published.dice, published.asd)]
        found.append(line)
    return header, found


def _number(value: float, digits: int) -> str:
    return "n/a" if math.isnan(value) else f"{value:.{digits}f}"


def _text(direction: Direction) -> str:
    """Two blocks, because a terminal is narrow: Dice with the further columns, then ASD."""
    header, rows = _cells(direction, ("*", "*"), " ± ")
    number = len(direction.columns)
    dice, asd, further = range(1, 1 + number), range(1 + number, 1 + 2 * number), range(1 + 2 * number, len(header))
    lines = [direction.title, direction.data, ""]
    for measure, own, others in (("Dice %", dice, further), (f"ASD {direction.unit}", asd, range(0))):
        cells = [[measure, *direction.columns, *(header[column] for column in others)]]
        cells += [[line[column] for column in (0, *own, *others)] for line in rows]
        widths = [max(len(line[at]) for line in cells) for at in range(len(cells[0]))]
        lines += [text_table(cells, widths), ""]
    return "\n".join(lines).rstrip()


def _markdown(direction: Direction) -> str:
    header, rows = _cells(direction, ("**", "**"), " ± ")
    return f"## {direction.title}\n\n{direction.data}\n\n{markdown_table([header, *rows])}"


def _latex(direction: Direction) -> str:
    """A booktabs table."""
    header, rows = _cells(direction, (r"\textbf{", "}"), r" $\pm$ ")
    number = len(direction.columns)
    extra = len(header) - 1 - 2 * number
    groups = rf" & \multicolumn{{{number}}}{{c}}{{Dice \%}} & \multicolumn{{{number}}}{{c}}{{ASD {direction.unit}}}"
    rules = rf"\cmidrule(lr){{2-{1 + number}}} \cmidrule(lr){{{2 + number}-{1 + 2 * number}}}"
    names = ["", *direction.columns, *direction.columns, *header[1 + 2 * number :]]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_escaped(direction.title)}. {_escaped(direction.data)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            groups + " &" * extra + r" \\",
            rules,
            " & ".join(map(_escaped, names)) + r" \\",
            r"\midrule",
            *(" & ".join([_escaped(line[0]), *line[1:]]) + r" \\" for line in rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _escaped(text: str) -> str:
    for letter in "%&_#":
        text = text.replace(letter, f"\\{letter}")
    return text
