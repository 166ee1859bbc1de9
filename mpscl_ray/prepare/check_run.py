"""The check command: what is wrong with images before they are prepared, and with prepared datasets.

Images are read and checked by the code that prepares them, which stages nothing here. No finding ends a check.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from mpscl_ray.data import SPLITS
from mpscl_ray.data.compatibility import pair_notices, pair_problems
from mpscl_ray.data.dataset import MANIFEST, Case, Manifest, Scaling, load_manifest, stored_file
from mpscl_ray.data.label_map_files import read_label_map
from mpscl_ray.data.label_values import count_voxels
from mpscl_ray.data.parquet_reader import read_case
from mpscl_ray.distributed.ray_session import connect
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.prepare import plan
from mpscl_ray.prepare.checks import (
    check_cases,
    check_staged,
    shared_images,
    shared_label_files,
    size_outliers,
    summarise_notices,
    summarise_problems,
)
from mpscl_ray.prepare.frames import expand_frames
from mpscl_ray.prepare.label_table import LabelTable
from mpscl_ray.prepare.layouts import scan
from mpscl_ray.prepare.options import PrepareOptions
from mpscl_ray.prepare.personal_data import personal_notices
from mpscl_ray.prepare.pictures.album import Album, PicturedCase, prepared_case, staged_cases
from mpscl_ray.prepare.pictures.case import CasePicture, picture_of_prepared
from mpscl_ray.prepare.pictures.page import page
from mpscl_ray.prepare.source_cases import SourceCase
from mpscl_ray.prepare.splits import UNDECIDED, overlaps
from mpscl_ray.prepare.staged_case import Request, StagedCase
from mpscl_ray.prepare.staging import stage_case
from mpscl_ray.prepare.workers import map_cases, worker_count
from mpscl_ray.runs import json_output
from mpscl_ray.runs.atomic_files import write_atomically
from mpscl_ray.runs.wording import counted

_LISTED = 6
_AGAIN = "prepare the dataset again"

Pictured = tuple[str, tuple[str, ...], list[PicturedCase]]
"""Modality, classes and cases with pictures."""


@dataclass(frozen=True)
class Finding:
    """Something to know about the data."""

    level: Literal["problem", "note"]
    """A problem is refused by prepare or train; a note is what they only say."""
    message: str
    """File, what was found, what was expected, what to do."""
    modality: str | None = None
    case: str | None = None
    file: str | None = None


@dataclass
class Checked:
    """A folder, and what was found in it."""

    folder: str
    about: str
    """How many cases of what."""
    findings: list[Finding] = field(default_factory=list)
    pictured: list[Pictured] = field(default_factory=list)

    def add(self, level: Literal["problem", "note"], messages: Sequence[str], modality: str | None = None) -> None:
        """Add findings that are not of one case."""
        self.findings += [Finding(level, message, modality) for message in messages]

    @property
    def problems(self) -> list[Finding]:
        """What prepare or train would refuse."""
        return [one for one in self.findings if one.level == "problem"]

    @property
    def notes(self) -> list[Finding]:
        """What prepare or train would only say."""
        return [one for one in self.findings if one.level == "note"]

    def messages(self, level: Literal["problem", "note"]) -> list[str]:
        """Sentences to print. Notes on cases are summarised: those that differ only in numbers are one."""
        found = self.problems if level == "problem" else self.notes
        cases = [one for one in found if one.case is not None]
        general = [f"{one.modality}: {one.message}" if one.modality else one.message for one in found if not one.case]
        if level == "problem":
            return [*general, *dict.fromkeys(one.message for one in cases)]
        return [*general, *summarise_notices((one.case or "", [one.message]) for one in cases)]


def report(checked: Sequence[Checked]) -> int:
    """Print all findings; returns the exit code."""
    problems = sum(len(one.messages("problem")) for one in checked)
    data = [{"folder": one.folder, "about": one.about, "findings": one.findings} for one in checked]
    json_output.report(problems=problems, data=data)
    for one in checked:
        wrong = one.messages("problem")
        print(f"{one.folder}: {one.about}: {counted(len(wrong), 'problem') if wrong else 'nothing is wrong'}")
        for line in summarise_problems(wrong):
            print(f"  - {line}")
        for line in one.messages("note"):
            print(f"  note: {line}")
    if not problems:
        return 0
    verdict = f"{counted(problems, 'problem')} to solve; nothing was written"
    print(verdict)
    json_output.report(error=verdict)
    return DataError.exit_code


def write_pictures(checked: Sequence[Checked], file: Path) -> None:
    """Write the page of pictures of all cases that were drawn. Raises StorageError."""
    albums = []
    for one in checked:
        found = [(level, sentence) for level in ("problem", "note") for sentence in one.messages(level)]
        albums += [
            Album(f"{modality}: {one.folder}", classes, cases, [] if number else found)
            for number, (modality, classes, cases) in enumerate(one.pictured)
        ]
        if found and not one.pictured:
            albums.append(Album(one.folder, (), [], found))
    write_atomically(file, page(albums, f"Pictures of {', '.join(one.folder for one in checked)}").encode())


# ------------------------------------------------------------------------------------------------------- images


def check_images(options: PrepareOptions, *, progress: bool = True) -> Checked:
    """Make the checks of prepare on all cases of a folder, with a progress line if wanted.

    Raises:
        ConfigError: options are wrong or contradict each other.
    """
    checked = Checked(str(options.input), f"layout {options.layout}")
    try:
        found = scan(options.input, options.layout, plan.layout_options(options))
    except DataError as error:
        checked.add("problem", [str(error)])
        return checked
    table = plan.label_table(options, found.table)
    problems = list(found.problems)
    cases = expand_frames(found.cases, options.frames, problems)
    checked.about += f", {counted(len(cases), 'case')}"
    if found.ambiguous_patients:
        problems.append(found.ambiguous_patients)
    checked.add("problem", problems)
    checked.add("note", found.notices)
    requests = _requests(options, cases, table, checked)
    results = _read(options, requests, table, progress)
    staged: dict[str, list[StagedCase]] = {request.source.modality: [] for request in requests}
    for request, result in zip(requests, results, strict=True):
        source = request.source
        if isinstance(result, StagedCase):
            staged[source.modality].append(result)
            checked.findings += [_of_case("note", notice, source) for notice in result.notices]
        else:
            checked.findings += [_of_case("problem", problem, source) for problem in result]
    for modality, good in staged.items():
        wrong, notices = check_staged(
            good,
            table.classes if table else (),
            transductive=options.transductive,
            allow_missing_classes=options.allow_missing_classes,
        )
        checked.add("problem", wrong, modality)
        notices += size_outliers((case.request.source.id, case.structure_width, case.spacing_mm) for case in good)
        notices += shared_label_files((case.request.source.id, case.sources, case.class_voxels) for case in good)
        checked.add("note", [*notices, *personal_notices(good, options.input)], modality)
    for modality, notice in shared_images(staged):
        checked.add("note", [notice], modality)
    if options.pictures:
        classes = table.classes if table else ()
        checked.pictured = [(modality, classes, staged_cases(good)) for modality, good in staged.items()]
    return checked


def _requests(
    options: PrepareOptions, cases: Sequence[SourceCase], table: LabelTable | None, checked: Checked
) -> list[Request]:
    """What is to be read of each case; labels that are needed and missing become problems.

    Labels are read where they are there and some split has them. None is needed by a case that may become one of a
    split without labels.
    """
    without = options.splits_without_labels
    requests: list[Request] = []
    for case in cases:
        decided = case.split is not None
        keep = case.split not in without if decided else len(without) < len(SPLITS)
        if keep and case.lacks_labels and (decided or not without):
            looked_for = f" ({case.label_hint})" if case.label_hint else ""
            message = f"case {case.id} has no label{looked_for}; add it, or give --unlabelled if it needs none"
            checked.findings.append(_of_case("problem", message, case))
        requests.append(Request(case, case.split or UNDECIDED, keep, None, len(requests)))
    plan.check_meaning(table, requests)
    return requests


def _read(
    options: PrepareOptions, requests: Sequence[Request], table: LabelTable | None, progress: bool
) -> list[StagedCase | list[str]]:
    workers = worker_count(options.workers, requests)
    with ExitStack() as stack:
        if workers:
            stack.enter_context(connect(workers))
        return map_cases(
            partial(stage_case, settings=plan.settings(options, table)),
            requests,
            workers,
            lambda request: str(request.source.images[0]),
            f"reading {options.input}",
            here=False,
            progress=progress,
        )


def _of_case(level: Literal["problem", "note"], message: str, case: SourceCase) -> Finding:
    paths = [*case.labels, *case.images]
    file = next((path for path in paths if path.name in message), case.images[0])
    return Finding(level, message, case.modality, case.id, str(file))


# ----------------------------------------------------------------------------------------------------- datasets


def check_datasets(
    folders: Sequence[Path], workers: int | None, *, pictures: bool = False, progress: bool = True
) -> list[Checked]:
    """Check prepared datasets: manifest, files, voxels, patients; and whether two of them can be trained together.

    Args:
        folders: datasets, or folders that hold some.
        workers: files at a time, with Ray; None or 0: in this process.
        pictures: whether to draw the cases.
        progress: whether to show progress lines.

    Raises:
        ConfigError: a folder has no dataset.
    """
    found = list(dict.fromkeys(dataset for folder in folders for dataset in _datasets(folder)))
    checked, manifests = [], []
    with ExitStack() as stack:
        if workers:
            stack.enter_context(connect(workers))
        for folder in found:
            one = Checked(str(folder), "dataset")
            checked.append(one)
            try:
                manifest = load_manifest(folder)
            except DataError as error:
                one.add("problem", [str(error)])
                continue
            manifests.append(manifest)
            one.about = f"dataset of {manifest.modality}, {counted(len(manifest.cases), 'case')}"
            _check_dataset(folder, manifest, workers or 0, one, pictures, progress)
    if len(found) == len(manifests) == 2:
        if len(folders) == 1:  # No order was given: the source is the labelled one.
            manifests.sort(key=lambda manifest: not any(case.labelled for case in manifest.split("train")))
        pair = Checked(" and ".join(map(str, found)), f"source {manifests[0].modality}, target {manifests[1].modality}")
        pair.add("problem", pair_problems(*manifests))
        pair.add("note", pair_notices(*manifests))
        checked.append(pair)
    return checked


def _datasets(folder: Path) -> list[Path]:
    if (folder / MANIFEST).exists() or not folder.is_dir():
        return [folder]
    found = [*folder.glob(f"*/{MANIFEST}"), *folder.glob(f"*/fold*/{MANIFEST}")]
    inside = sorted(path.parent for path in found if not path.relative_to(folder).parts[0].startswith("."))
    if not inside:
        raise ConfigError(
            f"{folder}: no prepared dataset, nor a folder of some (there is no {MANIFEST}); for images give --layout, "
            "e.g. --layout folder"
        )
    return inside


def _check_dataset(
    folder: Path, manifest: Manifest, workers: int, checked: Checked, pictures: bool, progress: bool
) -> None:
    results = map_cases(
        partial(
            _check_case,
            folder=folder,
            size=manifest.size,
            classes=len(manifest.classes),
            drawn=manifest.scaling if pictures else None,
        ),
        manifest.cases,
        workers,
        lambda case: case.file,
        f"reading {folder}",
        here=False,
        progress=progress,
    )
    shown: list[PicturedCase] = []
    for case, (wrong, picture) in zip(manifest.cases, results, strict=True):
        if picture is not None:
            shown.append(prepared_case(case, manifest.size, picture))
        files = [stored_file(folder, case.file)]
        files += [stored_file(folder, case.label_map.file)] if case.label_map else []
        for line in wrong:
            file = next((file for file in files if line.startswith(str(file))), files[0])
            checked.findings.append(Finding("problem", line, manifest.modality, case.id, str(file)))
    transductive = bool(manifest.splitting.get("transductive"))
    entries = [(case.split, case.id, case.patient, case.content_sha256) for case in manifest.cases]
    wrong, notices = overlaps(entries, transductive=transductive)
    checked.add("problem", [f"{line}; {_AGAIN}, with other splits" for line in wrong])
    checked.add("note", [*notices, *check_cases(manifest.cases)])
    checked.pictured.append((manifest.modality, manifest.classes, shown))
    listed = {case.file for case in manifest.cases}
    other = sorted({path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet")} - listed)
    if other:
        checked.add("note", [f"files that the manifest does not list, {len(other)}: {', '.join(other[:_LISTED])}"])


def _check_case(
    case: Case, folder: Path, size: tuple[int, int], classes: int, drawn: Scaling | None
) -> tuple[list[str], CasePicture | None]:
    """What is wrong with the files of a case: checksums, sizes, counts, values; and its picture, where it is wanted."""
    path = stored_file(folder, case.file)
    wrong = []
    try:
        if case.label_map is not None:
            read_label_map(folder, case)
    except DataError as error:
        wrong.append(str(error))
    try:
        arrays = read_case(folder, case)
    except DataError as error:
        return [str(error), *wrong], None
    image, label = arrays["image"], arrays.get("label")
    if image.shape[1:] != size:
        found, expected = (f"{height} x {width}" for height, width in (image.shape[1:], size))
        wrong.append(f"{path}: slices of {found}, the manifest says {expected}; {_AGAIN}")
    if broken := int(image.size - np.count_nonzero(np.isfinite(image))):
        wrong.append(f"{path}: NaN or infinite in {counted(broken, 'voxel')}, expected finite intensities; {_AGAIN}")
    if label is not None:
        counts = count_voxels(label, classes)
        if counts != case.class_voxels:
            wrong.append(
                f"{path}: voxels of each class {counts}, the manifest says {case.class_voxels or 'nothing'}; {_AGAIN}"
            )
    return wrong, None if drawn is None or wrong else picture_of_prepared(case, image, label, drawn)
