"""The score command: label maps of any program against labels."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mpscl_ray import __version__
from mpscl_ray.data.volumes.nifti import read_label
from mpscl_ray.distributed.parallel_map import map_volumes
from mpscl_ray.distributed.ray_session import connect
from mpscl_ray.errors import ConfigError, DataError, TrainingError
from mpscl_ray.evaluate.doubtful_pairs import other_ids, repeated
from mpscl_ray.evaluate.file_pairs import Pairs, find_pairs
from mpscl_ray.evaluate.label_names import LabelNames, given_names, match_names, names_beside
from mpscl_ray.evaluate.medpy_check import TOLERANCES, Comparison, largest_differences
from mpscl_ray.evaluate.score_files import PairScores, ScoreOptions, present_ids, score_pair
from mpscl_ray.evaluate.table_files import json_text, score_json, write_tables
from mpscl_ray.evaluate.tables import LEGEND, Summary, default_measures, format_table, scores_csv, summarise
from mpscl_ray.prepare.label_table import doubtful_names
from mpscl_ray.runs import json_output
from mpscl_ray.runs.progress import ProgressLine
from mpscl_ray.runs.storage import S3Path, output_directory, parse_location
from mpscl_ray.runs.wording import counted

CROSS_CHECK_FAILED = TrainingError.exit_code
"""Exit code where a measure differs from medpy's by more than rounding."""
_PAIRS_PER_WORKER = 8
"""Number of pairs for which starting a worker pays off."""
_LISTED = 10
"""Number of files or ids that a message names."""


@dataclass(frozen=True)
class FolderScores:
    """Scores of all pairs of two folders."""

    predictions: Path
    labels: Path
    label_names: LabelNames
    prediction_names: LabelNames
    options: ScoreOptions
    pairs: Pairs
    results: Mapping[str, PairScores]
    """Case -> its scores."""
    summary: Summary
    notices: tuple[str, ...]

    @property
    def differences(self) -> dict[str, tuple[str, Comparison, int]]:
        """Measure -> case and comparison with the largest difference from medpy, number of comparisons."""
        return largest_differences(
            (case, comparison) for case, result in self.results.items() for comparison in result.comparisons
        )

    def table(self, measures: Sequence[str] = (), style: Any = "text") -> str:
        """The summary as a table with one row."""
        chosen = (*default_measures([self.summary]), *measures)
        return format_table({self.predictions.name or str(self.predictions): self.summary}, chosen, style)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values; an undefined number is null."""
        files = {pair.case: pair for pair in self.pairs.pairs}
        return {
            "product_version": __version__,
            "predictions": str(self.predictions),
            "labels": str(self.labels),
            "classes": list(self.options.classes),
            "label_ids": _names_json(self.label_names),
            "prediction_ids": _names_json(self.prediction_names),
            "ignore_label": self.options.ignored,
            "resample": "nearest" if self.options.resample else None,
            "geometry": self.options.geometry,
            "assume_spacing_mm": self.options.assume_spacing_mm,
            "explanation": LEGEND,
            "notices": list(self.notices),
            "predictions_without_label": [str(path) for path in self.pairs.predictions_alone],
            "labels_without_prediction": [str(path) for path in self.pairs.labels_alone],
            "cross_check": {
                measure: {**worst.to_json(), "case": case, "compared": count}
                for measure, (case, worst, count) in self.differences.items()
            },
            "summary": self.summary.to_json(),
            "volumes": {
                case: {
                    "prediction": str(files[case].prediction),
                    "label": str(files[case].label),
                    "shape": list(result.shape),
                    "spacing_mm": list(result.spacing_mm),
                    "resampled": result.resampled,
                    "ignored_voxels": result.ignored_voxels,
                    "notices": list(result.notices),
                    "scores": [score_json(score) for score in result.scores],
                }
                for case, result in self.results.items()
            },
        }


def score_label_maps(options: argparse.Namespace) -> int:
    """Score two folders by the options of the command and print the table; returns the exit code."""
    pairs = find_pairs(
        options.predictions,
        options.label_maps,
        options.prediction_pattern,
        options.label_pattern,
        options.allow_missing,
    )
    label_names, prediction_names = _names(options, pairs)
    chosen = _score_options(options, label_names, prediction_names)
    out = None if options.out is None else parse_location(options.out)
    if isinstance(out, S3Path):  # Find out before the work whether it can be written.
        out.require_bucket()
    elif out is not None:
        with output_directory(out):
            pass
    results = _score(chosen, pairs, options.workers)
    _check_ids("label", results, chosen.label_index, chosen.ignored, label_names)
    _check_ids("prediction", results, chosen.prediction_index, None, prediction_names)
    scored = FolderScores(
        predictions=options.predictions,
        labels=options.label_maps,
        label_names=label_names,
        prediction_names=prediction_names,
        options=chosen,
        pairs=pairs,
        results=results,
        summary=summarise({case: result.scores for case, result in results.items()}),
        notices=tuple(_notices(chosen, label_names, prediction_names, pairs, results)),
    )
    print(f"{counted(len(results), 'case')} of {scored.predictions} against {scored.labels}")
    print(f"ids of labels: {label_names}")
    print(f"ids of predictions: {prediction_names}\n")
    print(scored.table())
    for notice in scored.notices:
        print(f"note: {notice}")
    if out is not None:
        with output_directory(out) as folder:
            write_scores(scored, folder)
        print(f"\nwritten to {options.out}")
    json_output.report(folder=options.out, **scored.to_json())
    return _report_differences(scored) if options.cross_check else 0


def write_scores(scored: FolderScores, folder: Path) -> None:
    """Write ``scores.csv``, ``summary.json`` and ``summary.md``."""
    about = [
        "# Scores",
        f"{counted(len(scored.results), 'case')} of `{scored.predictions}` against `{scored.labels}`, every "
        "voxel of the labels.",
        f"Ids of labels: {scored.label_names}. Ids of predictions: {scored.prediction_names}.",
        *(f"Note: {notice}." for notice in scored.notices),
        scored.table(("asd_mm_mean_of_means",), "markdown"),
    ]
    write_tables(
        folder,
        {
            "scores.csv": scores_csv({case: result.scores for case, result in scored.results.items()}),
            "summary.md": "\n\n".join(about) + "\n",
            "summary.json": json_text(scored.to_json()),
        },
    )


def _names(options: argparse.Namespace, pairs: Pairs) -> tuple[LabelNames, LabelNames]:
    labels = given_names("--labels", options.labels) or names_beside(options.label_maps)
    if labels is None:
        first = pairs.pairs[0].label
        volume = read_label(first, assume_spacing_mm=options.assume_spacing, geometry=options.geometry)
        found = sorted(present_ids(volume.array) - {0})
        raise ConfigError(
            f"{options.label_maps} has no dataset.json or labels.json with the names of its ids; give --labels, e.g. "
            f"1=MYO,2=LV ({first} has the ids {_listed(map(str, found)) or 'none but 0'})"
        )
    predictions = given_names("--prediction-labels", options.prediction_labels) or names_beside(options.predictions)
    return labels, predictions or labels


def _score_options(options: argparse.Namespace, labels: LabelNames, predictions: LabelNames) -> ScoreOptions:
    classes, label_index, prediction_index = match_names(labels, predictions)
    ignored = labels.ignored if options.ignore_label is None else options.ignore_label
    if ignored is not None and label_index.get(ignored):
        raise ConfigError(
            f"--ignore-label {ignored} is {labels.names[ignored]} in {labels.origin}; leave it out of one of the two"
        )
    return ScoreOptions(
        classes,
        label_index,
        prediction_index,
        ignored,
        options.resample is not None,
        options.cross_check is not None,
        options.geometry,
        options.assume_spacing,
    )


def _score(options: ScoreOptions, pairs: Pairs, workers: int | None) -> dict[str, PairScores]:
    if workers is None:
        workers = min(os.cpu_count() or 1, len(pairs.pairs) // _PAIRS_PER_WORKER)
        workers = workers if workers > 1 else 0
    line = ProgressLine(len(pairs.pairs), "scoring, case")
    with line, connect(workers) if workers else nullcontext():
        found = map_volumes(
            partial(score_pair, options),
            pairs.pairs,
            workers=workers,
            name=lambda pair: f"case {pair.case}",
            done=line.update,
            here=True,
        )
    errors = [result.error for result in found if result.error]
    if errors:
        raise DataError(
            f"{len(errors)} of {counted(len(found), 'pair')} cannot be scored; nothing was written:\n  - "
            + "\n  - ".join(errors[:_LISTED])
            + (f"\n  - ... and {len(errors) - _LISTED} more" if len(errors) > _LISTED else "")
        )
    return {pair.case: result for pair, result in zip(pairs.pairs, found, strict=True)}


# ------------------------------------------------------------------------------------------------------- warnings


def _ids(side: str, result: PairScores) -> frozenset[int]:
    return result.label_ids if side == "label" else result.prediction_ids


def _check_ids(
    side: str, results: Mapping[str, PairScores], index: Mapping[int, int], ignored: int | None, names: LabelNames
) -> None:
    """Refuse a table that fits no file: none of its structures occurs, but other ids do."""
    found = {value for result in results.values() for value in _ids(side, result)} - {ignored}
    unknown = sorted(found - set(index))
    if unknown and not any(value in found for value in names.names):
        raise DataError(
            f"no {side} has an id of {names}; they have {_listed(map(str, unknown))}; give the ids that they have with "
            + ("--labels" if side == "label" else "--prediction-labels")
        )


def _notices(
    options: ScoreOptions,
    labels: LabelNames,
    predictions: LabelNames,
    pairs: Pairs,
    results: Mapping[str, PairScores],
) -> Iterable[str]:
    extra = [name for name in dict.fromkeys(predictions.names.values()) if name not in options.classes]
    if extra:
        yield f"not scored, as {labels.origin} has no such structure: {_listed(extra)}"
    yield from doubtful_names(options.classes)
    for side, index, names in (
        ("label", options.label_index, labels),
        ("prediction", options.prediction_index, predictions),
    ):
        known = set(index) | ({options.ignored} if side == "label" else set())
        unknown = Counter(value for result in results.values() for value in _ids(side, result) if value not in known)
        if unknown:
            listed = _listed(f"{value} ({counted(count, 'file')})" for value, count in sorted(unknown.items()))
            yield f"ids in {side}s that {names.origin} does not name, counted as background: {listed}"
    if options.ignored is not None:
        counts = [result.ignored_voxels for result in results.values() if result.ignored_voxels]
        yield (
            f"the id {options.ignored} in the label is counted nowhere: {counted(sum(counts), 'voxel')} of "
            f"{counted(len(counts), 'case')}"
        )
    resampled = [case for case, result in results.items() if result.resampled]
    if resampled:
        yield f"resampled to the grid of the label (nearest voxel): {_listed(resampled)}"
    for what, alone in (
        ("predictions without a label", pairs.predictions_alone),
        ("labels without a prediction", pairs.labels_alone),
    ):
        if alone:
            yield f"{what}, left out: {_listed(path.name for path in alone)}"
    yield from other_ids([result.overlap for result in results.values()], options.classes, options.prediction_index)
    yield from repeated({case: (result.prediction_sha256, result.equal) for case, result in results.items()})
    yield from pairs.passed_over
    alike: dict[str, list[tuple[str, str]]] = {}  # warnings that differ in their numbers are one
    for case, result in results.items():
        for text in result.notices:
            alike.setdefault(re.sub(r"[\d.]+", "", text), []).append((case, text))
    for (case, text), *others in alike.values():
        yield f"label of {case}" + (f", and {len(others)} more likewise" if others else "") + f": {text}"


def _report_differences(scored: FolderScores) -> int:
    """Print the largest difference from medpy of each measure; returns the exit code."""
    print("\nlargest difference from medpy:")
    differences = scored.differences
    for measure, tolerance in TOLERANCES.items():
        if measure not in differences:
            print(f"  {measure}: nothing to compare")
            continue
        case, worst, count = differences[measure]
        print(
            f"  {measure}: {worst.difference:.1e} in {count} comparisons ({worst.structure} of {case}: "
            f"{worst.ours:.6g} and {worst.medpy:.6g}); tolerance {tolerance:g}"
        )
    wrong = [name for name, (_, worst, _) in differences.items() if worst.difference > TOLERANCES[name]]
    if wrong:
        error = f"{', '.join(wrong)} differ from medpy by more than the tolerance; report this with the two files"
        print(f"error: {error}", file=sys.stderr)
        json_output.report(error=error)
        return CROSS_CHECK_FAILED
    return 0


def _names_json(names: LabelNames) -> dict[str, Any]:
    return {"from": names.origin, "ids": {str(value): name for value, name in names.names.items()}}


def _listed(items: Iterable[str]) -> str:
    """The first few items."""
    found = list(items)
    return ", ".join(found[:_LISTED]) + (f" and {len(found) - _LISTED} more" if len(found) > _LISTED else "")
