"""The table of a comparison in the form of Table III of the paper: text, Markdown, CSV and LaTeX."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from mpscl_ray.compare.published import NOTE, TITLE, Published
from mpscl_ray.evaluate.tables import csv_text, markdown_table, text_table
from mpscl_ray.runs.structures import display_order
from mpscl_ray.runs.wording import counted

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
    fold: int | None = None

    @classmethod
    def from_summary(
        cls,
        seed: int,
        summary: Mapping[str, Any],
        iterations: int,
        seconds: float,
        unit: str,
        fold: int | None = None,
    ) -> CellResult:
        """From the summary of an evaluation as in its JSON file; ``unit`` is mm or voxel."""
        measures: dict[str, dict[str, float]] = {}
        for key, measure in (("dice", "dice"), ("asd", f"asd_{unit}")):
            means = {name: entry[measure]["mean"] for name, entry in summary["structures"].items()}
            measures[key] = {name: math.nan if mean is None else float(mean) for name, mean in means.items()}
        missed = int(summary["structures"]["mean"]["counts"]["missed"])
        return cls(seed, measures["dice"], measures["asd"], missed, iterations, seconds, fold)


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
    runs: int
    """Planned ones of each system: its seeds, in each fold."""
    unit: str
    """Of ASD: mm or voxel."""
    published: Mapping[str, Published]
    """System -> numbers on MM-WHS; empty for other data."""
    folds: Sequence[int] = ()
    """Those that the results are of; empty without folds."""

    @property
    def seeds(self) -> int:
        """Planned seeds of each system, in each fold."""
        return self.runs // max(1, len(self.folds))

    def of_fold(self, fold: int) -> Direction:
        """The results of one fold."""
        results = {
            system: [replace(one, fold=None) for one in found if one.fold == fold]
            for system, found in self.results.items()
        }
        return replace(self, results=results, runs=self.seeds, folds=(), published={})

    @property
    def columns(self) -> list[str]:
        """Structures in display order, then their mean."""
        return [*display_order(self.structures), "mean"]


@dataclass(frozen=True)
class Value:
    """Mean and standard deviation over seeds or folds; NaN mean where one has no value, NaN sd for a single one."""

    mean: float
    sd: float


def over_seeds(values: Sequence[float]) -> Value:
    """Mean and sd (ddof 1) of one number per seed.

    A seed without a value makes the mean undefined: a missed structure must not improve a method's mean.
    """
    if not values or any(math.isnan(value) for value in values):
        return Value(math.nan, math.nan)
    return Value(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan)


def over_runs(values: Mapping[tuple[int | None, int], float]) -> Value:
    """Mean and sd of one number per (fold, seed): over seeds; with folds over these, of the mean over seeds of each."""
    by_fold: dict[int | None, list[float]] = {}
    for (fold, _), value in values.items():
        by_fold.setdefault(fold, []).append(value)
    if by_fold.keys() <= {None}:
        return over_seeds(list(values.values()))
    return over_seeds([over_seeds(found).mean for found in by_fold.values()])


def gap_closed(system: float, lower: float, upper: float) -> float:
    """Share of the way from the lower to the upper bound, in [0, 1] between them; NaN where there is no gap."""
    return (system - lower) / (upper - lower) if upper > lower else math.nan


@dataclass(frozen=True)
class Row:
    """One system in one direction, over its seeds and folds."""

    system: str
    """Key of SYSTEMS."""
    title: str
    runs: int
    """Finished ones."""
    folds: int
    """Those with a finished run."""
    dice: Mapping[str, Value]
    """Column -> value, percent."""
    asd: Mapping[str, Value]
    """Column -> value."""
    missed: int
    """See :class:`CellResult`; over all runs."""
    gap: float
    """Percent of the gap closed, over the seeds and folds that both bounds have too; NaN where there is none."""
    iterations: int | None
    """Of a run; None where there is none."""
    minutes: float
    """Mean wall time of a run; NaN where there is none."""


def rows_of(direction: Direction) -> list[Row]:
    """The rows of a direction, in order."""

    def values(results: Sequence[CellResult], measure: str) -> dict[str, Value]:
        scale = 100.0 if measure == "dice" else 1.0
        return {
            column: over_runs(
                {(result.fold, result.seed): scale * getattr(result, measure)[column] for result in results}
            )
            for column in direction.columns
        }

    def gap(system: str) -> float:
        """Over the runs that the system and both bounds have: means over different seeds are not comparable."""
        dice = [
            {(result.fold, result.seed): result.dice["mean"] for result in direction.results.get(name, ())}
            for name in (system, LOWER, UPPER)
        ]
        common = [run for run in dice[0] if all(run in found for found in dice)]
        return gap_closed(*(over_runs({run: found[run] for run in common}).mean for found in dice))

    def row(system: str, title: str) -> Row:
        results = direction.results.get(system, ())
        return Row(
            system=system,
            title=title,
            runs=len(results),
            folds=len({result.fold for result in results} - {None}),
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
    folds = max((len(direction.folds) for direction in directions), default=0)
    over, each = counted(seeds, "seed"), "seed"
    if folds:
        over, each = f"{counted(folds, 'fold')} (n = {folds}) of the mean over {over}", "run"
    text = (
        f"Mean ± sd (ddof 1) over {over} of the mean over volumes; every slice counts, a missed structure has Dice 0 "
        f"and no ASD, and where that leaves a {each} without ASD the cell is n/a. The mean "
        "column is the mean of the structures. In bold the best system, Supervised excluded. Gap closed: share of the "
        f"gap in mean Dice between W/o adaptation and Supervised, over the {each}s that both have too. Minutes: wall "
        "time of a run from its first phase to its scores; shared phases count for each run that uses them, and "
        "concurrent runs share the machine."
    )
    if folds:
        text += (
            " Each volume is for test in one fold. The training volumes of two folds are partly the same: the sd over "
            "folds is smaller than one over independent data would be."
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
    """An entry per direction, system and column, and the same of each fold; published numbers have keys of their own.

    ``mean`` and ``sd`` of an entry with a ``fold`` are over its seeds, of another one over ``folds`` folds if there are
    any.
    """
    unit = directions[0].unit if directions else "mm"
    found: list[dict[str, str | float | None]] = []
    names = (
        "direction system title structure seeds seeds_planned dice_percent_mean dice_percent_sd "
        f"asd_{unit}_mean asd_{unit}_sd missed gap_closed_percent iterations minutes "
        "published_mmwhs_dice_percent published_mmwhs_asd_voxel fold folds"
    ).split()
    parts = [
        (fold, whole if fold is None else whole.of_fold(fold)) for whole in directions for fold in (None, *whole.folds)
    ]
    for fold, direction in parts:
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
                    row.runs,
                    direction.runs,
                ]
                of_folds = [fold, row.folds if direction.folds else None]
                found.append(dict(zip(names, [*about, *numbers, *of_folds], strict=True)))
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
        unit = "runs" if direction.folds else "seeds"
        line = [row.title if row.runs == direction.runs else f"{row.title} ({row.runs} of {direction.runs} {unit})"]
        for measure, column in itertools.product(_DIGITS, direction.columns):
            value = getattr(row, measure)[column]
            text = _number(value.mean, _DIGITS[measure])
            if not math.isnan(value.sd):
                text += sd + _number(value.sd, _DIGITS[measure])
            line.append(text.join(bold) if row.system in best(rows, measure, column) else text)
        line += [_number(row.gap, 0), str(row.iterations), _number(row.minutes, 1)]
        if not row.runs:
            line[1:] = [""] * (len(line) - 1)
        if direction.published:
            published = direction.published.get(row.system, Published(None, None))
            line += ["" if n is None else _number(n, 2) for n in (published.dice, published.asd)]
        found.append(line)
    return header, found


def _by_fold(direction: Direction) -> list[list[str]]:
    """Header and rows with the mean Dice of each fold; [] without folds."""
    if not direction.folds:
        return []
    columns = [[_mean_dice(row) for row in rows_of(direction.of_fold(fold))] for fold in direction.folds]
    header = ["mean Dice %", *(f"fold {fold}" for fold in direction.folds)]
    return [header, *([title, *cells] for title, *cells in zip(direction.rows.values(), *columns, strict=True))]


def _mean_dice(row: Row) -> str:
    return _number(row.dice["mean"].mean, _DIGITS["dice"]) if row.runs else ""


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
        lines += [_aligned(cells), ""]
    if direction.folds:
        lines.append(_aligned(_by_fold(direction)))
    return "\n".join(lines).rstrip()


def _aligned(cells: Sequence[Sequence[str]]) -> str:
    return text_table(cells, [max(map(len, column)) for column in zip(*cells, strict=True)])


def _markdown(direction: Direction) -> str:
    header, rows = _cells(direction, ("**", "**"), " ± ")
    tables = [markdown_table(cells) for cells in ([header, *rows], _by_fold(direction)) if cells]
    return "\n\n".join([f"## {direction.title}", direction.data, *tables])


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
