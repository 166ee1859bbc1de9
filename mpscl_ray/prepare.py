"""Images to a dataset for training: ``python -m mpscl_ray.prepare INPUT --layout mmwhs --out DIR``.

A run reads and checks every file first and reports all it finds at once; only when nothing is wrong, each modality
appears as a finished folder. Until then its files are in a hidden folder beside, which no command takes for a dataset.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import mpscl_ray
from mpscl_ray import cli
from mpscl_ray.cluster_session import connect
from mpscl_ray.data.dataset_checks import check_cases, check_staged, summarise_notices
from mpscl_ray.data.label_table import MMWHS, RELEASED, LabelTable, parse_ids, parse_label_table, with_corrections
from mpscl_ray.data.layouts import Scan, SourceCase, scan
from mpscl_ray.data.released_slices import RELEASED_RANGES
from mpscl_ray.data.schema import FORMAT_VERSION, MANIFEST, SPLITS, Case, Manifest, Scaling, load_manifest, save_manifest
from mpscl_ray.data.source_volumes import Request, Settings, Staged, finish_case, stage_case
from mpscl_ray.data.splits import (
    Member,
    Splitting,
    read_split_file,
    split_fractions,
    split_listed,
    split_published,
)
from mpscl_ray.durable_files import fsync_directory, storage_errors
from mpscl_ray.errors import ConfigError, DataError, StorageError
from mpscl_ray.parallel import map_volumes
from mpscl_ray.prepare_options import PrepareOptions, parse
from mpscl_ray.progress import ProgressLine

_WORTH_RAY = 500 * 2**20
"""Bytes of input below which starting Ray takes longer than the work."""
_DEFAULT_FRACTIONS = (0.7, 0.1, 0.2)
_LISTED_PROBLEMS = 50


@dataclass
class _Modality:
    """One dataset in the making."""

    name: str
    splitting: Splitting
    folder: Path
    """Where its files are until it is finished."""
    requests: list[Request]
    staged: list[Staged]
    notices: list[str]


def prepare(options: PrepareOptions, *, progress: bool = True) -> dict[str, Path]:
    """Make a dataset of each modality in the input folder.

    Args:
        options: what to do.
        progress: whether to show a progress line.

    Returns:
        Modality -> folder of its dataset.

    Raises:
        ConfigError: where options are wrong or contradict each other.
        DataError: listing everything that is wrong with the input; nothing is written then.
        StorageError: where the output cannot be written.
    """
    found = scan(options.input, options.layout, _layout_options(options))
    table = _label_table(options, found.table)
    settings = Settings(
        recipe=_recipe(options),
        table=table,
        assume_spacing_mm=_three(options.assume_spacing),
        copy_geometry_from_image=options.fix_geometry is not None,
        flip=options.flip,
    )
    _range(options, "ct")  # a mistyped range should not wait for the volumes
    names = sorted({case.modality for case in found.cases})
    for name in names:
        _check_target(options.out / name, options.overwrite)
    problems = list(found.problems)
    with contextlib.ExitStack() as stack:
        modalities = []
        for name in names:
            folder = stack.enter_context(_partial_folder(options.out, name))
            cases = [case for case in found.cases if case.modality == name]
            modalities.append(_plan(name, cases, options, folder, table, problems))
        requests = [request for modality in modalities for request in modality.requests]
        workers = _workers(options, requests)
        if workers:
            stack.enter_context(connect(workers))
        _stage(modalities, settings, workers, problems, progress)
        for modality in modalities:
            wrong, notices = check_staged(
                modality.staged,
                table.classes if table else (),
                transductive=options.transductive,
                allow_missing_classes=options.allow_missing_classes,
            )
            problems += [f"{modality.name}: {problem}" for problem in wrong]
            modality.notices += notices
        if problems:
            raise DataError(_problem_list(options, problems))
        scalings = {modality.name: _scaling(options, modality) for modality in modalities}
        for modality in modalities:
            cases_done = _finish(modality, scalings[modality.name], table, workers, progress)
            manifest = _manifest(options, settings, found, modality, scalings[modality.name], table, cases_done)
            save_manifest(modality.folder, manifest)
        return {modality.name: _publish(modality, options) for modality in modalities}


# ------------------------------------------------------------------------------------------------------ options


def _layout_options(options: PrepareOptions) -> LayoutOptions:
    return LayoutOptions(
        modality=options.modality,
        image_pattern=options.image_pattern,
        label_pattern=options.label_pattern,
        patient_pattern=options.patient_pattern,
        group_slices=options.group_slices,
        channel=options.channel,
    )


def _three(values: Sequence[float] | None) -> tuple[float, float, float] | None:
    return None if values is None else (values[0], values[1], values[2])


def _label_table(options: PrepareOptions, implied: LabelTable | None) -> LabelTable | None:
    """The user's table, else that of the layout; None where there is none."""
    table = parse_label_table(options.labels) if options.labels else implied
    if table is None:
        if options.ignore_labels or options.fix_label or options.unknown_labels:
            raise ConfigError("--ignore-labels, --fix-label and --unknown-labels need a label table: give --labels")
        return None
    if options.ignore_labels:
        table = replace(table, ignored=table.ignored | parse_ids(options.ignore_labels, "--ignore-labels"))
    if options.fix_label:
        table = with_corrections(table, options.fix_label)
    if options.unknown_labels:
        table = replace(table, unknown=options.unknown_labels)
    return table


def _recipe(options: PrepareOptions) -> Recipe:
    """The recipe; where some splits have no labels, all crops are placed without, so that they are alike."""
    if options.recipe.centre == "auto" and options.splits_without_labels:
        return replace(options.recipe, centre="image")
    return options.recipe
