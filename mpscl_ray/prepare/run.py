"""The prepare command: images to a dataset for training.

It first reads and checks every file and reports all problems at once. Only if there are none, each modality appears as
a finished folder. Until then its files are in a hidden folder next to it, which no command takes for a dataset. That of
a command which was stopped or killed is taken over by the next, which does not read the same volumes again.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from mpscl_ray.data import SPLITS
from mpscl_ray.data.dataset import CASES, Manifest, Scaling, fold_folder, in_fold, save_manifest
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
from mpscl_ray.prepare.splits import UNDECIDED, Splitting
from mpscl_ray.prepare.staged_case import Request, Settings, StagedCase, with_split
from mpscl_ray.prepare.staging import finish_case, stage_case
from mpscl_ray.prepare.summary import datasets_of, next_command, summary, summary_json
from mpscl_ray.prepare.workers import map_cases, worker_count
from mpscl_ray.runs import json_output
from mpscl_ray.runs.atomic_files import fsync_directory, storage_errors, write_atomically
from mpscl_ray.runs.storage import S3Path
from mpscl_ray.runs.wording import counted

_LISTED_PROBLEMS = 50


@dataclass
class _Dataset:
    """The dataset of one modality while it is made."""

    modality: str
    folder: Path
    """Temporary output folder."""
    splittings: list[Splitting]
    """One for each fold; a single one without folds."""
    requests: list[Request]
    notices: list[str]
    """Of all folds."""
    staged: list[StagedCase]
    split_notices: list[list[str]] = field(default_factory=list)
    """Of each fold."""

    def views(self) -> list[list[StagedCase]]:
        """The staged cases of each fold, with their split there."""
        if len(self.splittings) == 1:
            return [self.staged]
        found = []
        for splitting in self.splittings:
            split_of = {name: split for split, names in splitting.cases.items() for name in names}
            found.append([with_split(case, split_of[case.request.source.id]) for case in self.staged])
        return found


def prepare(options: PrepareOptions, *, progress: bool = True) -> dict[str, Path | S3Path]:
    """Make a dataset of each modality in the input folder.

    Args:
        options: what to do.
        progress: whether to show a progress line.

    Returns:
        Modality -> folder of its dataset, local or in a bucket; with ``options.folds`` of those of its folds.

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
            problems += [f"{dataset.modality}: {problem}" for problem in _check(dataset, options, settings)]
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
        scalings = [
            [prepare_plan.scaling(options, dataset.modality, view) for view in dataset.views()] for dataset in datasets
        ]
        for dataset, by_fold in zip(datasets, scalings, strict=True):
            manifests = _finish(dataset, by_fold, options, settings, workers, progress)
            if options.pictures:
                _write_pictures(dataset, manifests)
            _save(dataset.folder, manifests)
        return {
            dataset.modality: publish(dataset.folder, out / dataset.modality, options.overwrite) for dataset in datasets
        }


def report(folders: Mapping[str, Path | S3Path], *, pictures: bool) -> None:
    """Say what prepare has made, and what to do next."""
    for folder in folders.values():
        print(summary(folder))
        if pictures:
            print(f"  pictures: {folder / PICTURES}")
    following = next_command(folders)
    print(f"next: {following}")
    datasets = [dataset for folder in folders.values() for dataset in datasets_of(folder)]
    json_output.report(datasets=list(map(summary_json, datasets)), next=[following])


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
        if options.folds is None:
            splittings = [prepare_plan.split_cases(options, modality, cases)]
        else:
            splittings = prepare_plan.fold_cases(options, modality, cases)
        if found.ambiguous_patients and splittings[0].drawn:
            problems.append(f"{modality}: {found.ambiguous_patients}")
        elif found.ambiguous_patients:
            notices.append(found.ambiguous_patients)
        splits = splittings[0].cases
        if options.folds is not None:
            splits = {UNDECIDED: tuple(sorted(name for names in splits.values() for name in names))}
        notices += apart(found.uncertain_patients, splits)
    except DataError as error:
        # Told before volumes are read, which takes much longer.
        raise DataError(_listed(options.input, [*problems, str(error)], notices)) from None
    staging = folder / STAGED
    with storage_errors(staging):
        staging.mkdir(exist_ok=True)
    requests = prepare_plan.requests(options, modality, cases, splits, staging, table, problems)
    if not requests:
        problems.append(f"{modality}: every case is left out by --split {options.split}")
    return _Dataset(modality, folder, splittings, requests, notices, [])


def _without_names(dataset: _Dataset, hashed: HashedIds) -> _Dataset:
    """With hashes for names; what was found in files by name is printed, and not kept."""
    for notice in (*dataset.notices, *dataset.splittings[0].notices):
        print(f"note: {notice}", file=sys.stderr)
    splittings, requests = list(map(hashed.splitting, dataset.splittings)), hashed.requests(dataset.requests)
    return replace(dataset, splittings=splittings, requests=requests, notices=[])


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


def _check(dataset: _Dataset, options: PrepareOptions, settings: Settings) -> list[str]:
    """Problems of all cases together, in each fold; what is only to be said is noted."""
    check = partial(
        check_staged,
        classes=settings.table.classes if settings.table else (),
        transductive=options.transductive,
        allow_missing_classes=options.allow_missing_classes,
    )
    found = [check(view) for view in dataset.views()]
    dataset.split_notices = [notices for _, notices in found]
    if len(found) == 1:
        return found[0][0]
    # What is wrong whatever the splits are, such as two names of one scan, is said once.
    problems, _ = check(dataset.staged)
    return problems or [f"fold {fold}: {problem}" for fold, (wrong, _) in enumerate(found) for problem in wrong]


def _finish(
    dataset: _Dataset,
    scalings: Sequence[Scaling],
    options: PrepareOptions,
    settings: Settings,
    workers: int,
    progress: bool,
) -> list[Manifest]:
    """Write the files of all cases; returns the manifest of each fold."""
    classes = settings.table.classes if settings.table else ()
    folds = len(scalings) > 1
    cases = map_cases(
        partial(finish_case, scaling=None if folds else scalings[0], classes=classes, folder=dataset.folder),
        dataset.staged,
        workers,
        lambda staged: staged.request.source.id,
        f"writing {dataset.modality}",
        here=isinstance(options.out, S3Path),
        progress=progress,
    )
    shutil.rmtree(dataset.folder / STAGED)
    for split in (*SPLITS, CASES):
        write_class_names(dataset.folder, split, classes, partly=bool(settings.table and settings.table.not_annotated))
        if (dataset.folder / split).is_dir():
            fsync_directory(dataset.folder / split)
    of_cases = summarise_notices((case.id, case.notices) for case in cases)
    manifests = []
    for splitting, scaling, staged, found in zip(
        dataset.splittings, scalings, dataset.views(), dataset.split_notices, strict=True
    ):
        own = cases
        if folds:
            own = [in_fold(case, view.request.split, scaling) for case, view in zip(cases, staged, strict=True)]
        notices = [*dataset.notices, *found, *check_cases(own), *of_cases]
        manifests.append(
            prepare_plan.manifest(options, settings, dataset.modality, splitting, scaling, staged, own, notices)
        )
    return manifests


def _save(folder: Path, manifests: Sequence[Manifest]) -> None:
    """Write the manifests, which make the folder a dataset, or one of folds."""
    if len(manifests) == 1:
        save_manifest(folder, manifests[0])
        return
    for number, manifest in enumerate(manifests):
        fold = folder / fold_folder(number)
        with storage_errors(fold):
            fold.mkdir()
        save_manifest(fold, manifest)


def _write_pictures(dataset: _Dataset, manifests: Sequence[Manifest]) -> None:
    """The page of pictures; with folds each case is shown with the one that tests on it."""
    sentences = dict.fromkeys(notice for manifest in manifests for notice in manifest.notices)
    shown = dataset.staged
    if len(manifests) > 1:
        views = enumerate(dataset.views())
        shown = [
            with_split(case, fold_folder(fold)) for fold, view in views for case in view if case.request.split == "test"
        ]
    album = Album(dataset.modality, manifests[0].classes, staged_cases(shown), [("note", line) for line in sentences])
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
