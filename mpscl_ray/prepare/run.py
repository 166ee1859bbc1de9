"""The prepare command: images to a dataset for training.

It first reads and checks every file and reports all problems at once. Only if there are none, each modality appears as
a finished folder. Until then its files are in a hidden folder next to it, which no command takes for a dataset. That of
a command which was stopped or killed is taken over by the next, which does not read the same volumes again.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mpscl_ray.data import SPLITS
from mpscl_ray.data.dataset import Manifest, Scaling, load_manifest, save_manifest
from mpscl_ray.data.label_map_files import write_class_names
from mpscl_ray.distributed.ray_session import connect
from mpscl_ray.errors import DataError
from mpscl_ray.prepare import plan as prepare_plan
from mpscl_ray.prepare.checks import check_cases, check_staged, shared_images, summarise_notices, summarise_problems
from mpscl_ray.prepare.frames import expand_frames
from mpscl_ray.prepare.hashed_ids import HashedIds
from mpscl_ray.prepare.label_table import LabelTable
from mpscl_ray.prepare.layouts import Scan, scan
from mpscl_ray.prepare.options import PrepareOptions
from mpscl_ray.prepare.output_folder import STAGED, check_target, publish, temporary_output_dir
from mpscl_ray.prepare.patients import apart
from mpscl_ray.prepare.personal_data import personal_notices
from mpscl_ray.prepare.pictures.album import Album, staged_cases
from mpscl_ray.prepare.pictures.page import PICTURES, page
from mpscl_ray.prepare.source_cases import SourceCase
from mpscl_ray.prepare.splits import Splitting
from mpscl_ray.prepare.staged_case import Request, Settings, StagedCase
from mpscl_ray.prepare.staging import finish_case, stage_case
from mpscl_ray.prepare.workers import map_cases, worker_count
from mpscl_ray.runs.atomic_files import fsync_directory, storage_errors, write_atomically
from mpscl_ray.runs.next_steps import command_line
from mpscl_ray.runs.storage import S3Path
from mpscl_ray.runs.structures import display_indices
from mpscl_ray.runs.wording import counted

_LISTED_PROBLEMS = 50
_SMALL = 128


@dataclass
class _Dataset:
    """The dataset of one modality while it is made."""

    modality: str
    folder: Path
    """Temporary output folder."""
    splitting: Splitting
    requests: list[Request]
    notices: list[str]
    staged: list[StagedCase]


def prepare(options: PrepareOptions, *, progress: bool = True) -> dict[str, Path | S3Path]:
    """Make a dataset of each modality in the input folder.

    Args:
        options: what to do.
        progress: whether to show a progress line.

    Returns:
        Modality -> folder of its dataset, local or in a bucket.

    Raises:
        ConfigError: options are wrong or contradict each other, or the dataset exists already.
        DataError: listing all problems of the input; nothing is written then.
        StorageError: the output cannot be written.
    """
    out = options.out
    assert out is not None
    found = scan(options.input, options.layout, prepare_plan.layout_options(options))
    hashed = None if options.hash_ids is None else HashedIds(options.hash_ids)
    table = prepare_plan.label_table(options, found.table)
    settings = prepare_plan.settings(options, table)
    problems = list(found.problems)
    found = replace(found, cases=tuple(expand_frames(found.cases, options.frames, problems)))
    modalities = sorted({case.modality for case in found.cases})
    for modality in modalities:
        check_target(out / modality, options.overwrite)
    with ExitStack() as stack:
        datasets = []
        for modality in modalities:
            folder = stack.enter_context(temporary_output_dir(out, modality))
            cases = [case for case in found.cases if case.modality == modality]
            dataset = _plan(modality, cases, options, folder, table, problems, found)
            datasets.append(dataset if hashed is None else _without_names(dataset, hashed))
        workers = worker_count(options.workers, [request for dataset in datasets for request in dataset.requests])
        if workers:
            stack.enter_context(connect(workers))
        _stage(datasets, options, settings, workers, problems, progress)
        for dataset in datasets:
            wrong, notices = check_staged(
                dataset.staged,
                table.classes if table else (),
                transductive=options.transductive,
                allow_missing_classes=options.allow_missing_classes,
            )
            problems += [f"{dataset.modality}: {problem}" for problem in wrong]
            dataset.notices += notices
            if hashed is None:
                dataset.notices += personal_notices(dataset.staged, options.input)
            else:
                dataset.staged = list(map(hashed.staged, dataset.staged))
        if problems:
            raise DataError(_listed(options.input, problems, found.notices))
        if hashed is not None:
            hashed.save()
        by_modality = {dataset.modality: dataset for dataset in datasets}
        for modality, notice in shared_images({name: dataset.staged for name, dataset in by_modality.items()}):
            by_modality[modality].notices.append(notice)
        scalings = [prepare_plan.scaling(options, dataset.modality, dataset.staged) for dataset in datasets]
        for dataset, scaling in zip(datasets, scalings, strict=True):
            manifest = _finish(dataset, scaling, options, settings, workers, progress)
            if options.pictures:
                _write_pictures(dataset, manifest)
            save_manifest(dataset.folder, manifest)
        return {
            dataset.modality: publish(dataset.folder, out / dataset.modality, options.overwrite) for dataset in datasets
        }


def _plan(
    modality: str,
    cases: list[SourceCase],
    options: PrepareOptions,
    folder: Path,
    table: LabelTable | None,
    problems: list[str],
    found: Scan,
) -> _Dataset:
    notices = list(found.notices)
    try:
        splitting = prepare_plan.split_cases(options, modality, cases)
        if found.ambiguous_patients and splitting.drawn:
            problems.append(f"{modality}: {found.ambiguous_patients}")
        elif found.ambiguous_patients:
            notices.append(found.ambiguous_patients)
        notices += apart(found.uncertain_patients, splitting.cases)
    except DataError as error:
        # Told before volumes are read, which takes much longer.
        raise DataError(_listed(options.input, [*problems, str(error)], notices)) from None
    staging = folder / STAGED
    with storage_errors(staging):
        staging.mkdir(exist_ok=True)
    requests = prepare_plan.requests(options, modality, cases, splitting, staging, table, problems)
    if not requests:
        problems.append(f"{modality}: every case is left out by --split {options.split}")
    return _Dataset(modality, folder, splitting, requests, notices, [])


def _without_names(dataset: _Dataset, hashed: HashedIds) -> _Dataset:
    """With hashes for names; what was found in files by name is printed, and not kept."""
    for notice in (*dataset.notices, *dataset.splitting.notices):
        print(f"note: {notice}", file=sys.stderr)
    splitting, requests = hashed.splitting(dataset.splitting), hashed.requests(dataset.requests)
    return replace(dataset, splitting=splitting, requests=requests, notices=[])


def _stage(
    datasets: Sequence[_Dataset],
    options: PrepareOptions,
    settings: Settings,
    workers: int,
    problems: list[str],
    progress: bool,
) -> None:
    requests = [request for dataset in datasets for request in dataset.requests]
    results = map_cases(
        partial(stage_case, settings=settings),
        requests,
        workers,
        lambda request: str(request.source.images[0]),
        "reading and normalising",
        here=isinstance(options.out, S3Path),
        progress=progress,
    )
    wrong: set[str] = set()
    owner = {request.folder: dataset for dataset in datasets for request in dataset.requests}
    for request, result in zip(requests, results, strict=True):
        if isinstance(result, StagedCase):
            owner[request.folder].staged.append(result)
        else:
            wrong.update(result)
    # Sorted by file; a file in two splits is reported once.
    problems += sorted(wrong)


def _finish(
    dataset: _Dataset, scaling: Scaling, options: PrepareOptions, settings: Settings, workers: int, progress: bool
) -> Manifest:
    classes = settings.table.classes if settings.table else ()
    cases = map_cases(
        partial(finish_case, scaling=scaling, classes=classes, folder=dataset.folder),
        dataset.staged,
        workers,
        lambda staged: staged.request.source.id,
        f"writing {dataset.modality}",
        here=isinstance(options.out, S3Path),
        progress=progress,
    )
    shutil.rmtree(dataset.folder / STAGED)
    for split in SPLITS:
        write_class_names(dataset.folder, split, classes, partly=bool(settings.table and settings.table.not_annotated))
        if (dataset.folder / split).is_dir():
            fsync_directory(dataset.folder / split)
    notices = [
        *dataset.notices,
        *check_cases(cases),
        *summarise_notices((case.id, case.notices) for case in cases),
    ]
    return prepare_plan.manifest(
        options, settings, dataset.modality, dataset.splitting, scaling, dataset.staged, cases, notices
    )


def _write_pictures(dataset: _Dataset, manifest: Manifest) -> None:
    found = [("note", notice) for notice in manifest.notices]
    album = Album(dataset.modality, manifest.classes, staged_cases(dataset.staged), found)
    text = page([album], f"Pictures of the dataset {dataset.modality}")
    write_atomically(dataset.folder / PICTURES, text.encode())


def _listed(folder: Path, problems: Sequence[str], notices: Sequence[str]) -> str:
    shown = summarise_problems(problems)
    lines = [
        f"{folder}: {counted(len(problems), 'problem')}, nothing was written:",
        *(f"  - {problem}" for problem in shown[:_LISTED_PROBLEMS]),
    ]
    if len(shown) > _LISTED_PROBLEMS:
        lines.append(f"  - and {len(shown) - _LISTED_PROBLEMS} more")
    lines += [f"  note: {notice}" for notice in notices]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------ summary


def summary(folder: Path | S3Path) -> str:
    """Text on a finished dataset: splits, classes, range and warnings."""
    manifest = load_manifest(folder)
    lines = [
        f"{manifest.modality}: {folder}",
        f"  slices of {manifest.size[0]} x {manifest.size[1]}; z-scored intensities {manifest.scaling.low:g} to "
        f"{manifest.scaling.high:g} are [-1, 1] ({manifest.scaling.origin})",
    ]
    order = [0, *display_indices(manifest.classes)] if manifest.classes else []
    rows = [["split", "patients", "cases", "labelled", "slices", *(manifest.classes[index] for index in order)]]
    for split in SPLITS:
        cases = manifest.split(split)
        voxels = [sum(case.class_voxels[index] for case in cases if case.class_voxels) for index in order]
        total = sum(voxels)
        rows.append(
            [
                split,
                str(len({case.patient for case in cases})),
                str(len(cases)),
                str(sum(case.labelled for case in cases)),
                str(sum(case.slices for case in cases)),
                *(f"{100 * count / total:.2f} %" if total else "-" for count in voxels),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines += ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines += [f"  note: {notice}" for notice in manifest.notices]
    return "\n".join(lines)


def summary_json(folder: Path | S3Path) -> dict[str, Any]:
    """The same as plain values."""
    manifest = load_manifest(folder)
    splits = {
        split: {
            "patients": len({case.patient for case in cases}),
            "cases": [case.id for case in cases],
            "labelled": sum(case.labelled for case in cases),
            "slices": sum(case.slices for case in cases),
        }
        for split in SPLITS
        for cases in [manifest.split(split)]
    }
    about = {"modality": manifest.modality, "folder": folder, "classes": manifest.classes, "size": manifest.size}
    return {**about, "splits": splits, "notices": manifest.notices}


def next_command(folders: dict[str, Path | S3Path]) -> str:
    """The command to give next, with the small preset for slices that a CPU can train on."""
    first = next(iter(folders.values()))
    source, target = (str(folders["mr"]), str(folders["ct"])) if {"ct", "mr"} <= set(folders) else (str(first), "OTHER")
    preset = "small/mpscl" if max(load_manifest(first).size) <= _SMALL else "mr2ct/mpscl"
    return command_line("train", preset, f"data.source={source}", f"data.target={target}")
