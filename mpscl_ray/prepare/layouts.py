"""Finding images and labels in the supported folder layouts. Only names are read here.

Every layout gives a :class:`Scan`: the cases, and all problems of the folder at once. Images and labels are paired by
name, never by their position in a list.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpscl_ray.data.volumes.dicom_paths import is_dicom, is_series
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.prepare.file_listing import Listing, list_files
from mpscl_ray.prepare.label_table import LabelTable
from mpscl_ray.prepare.patients import group_patients
from mpscl_ray.prepare.slice_layouts import npy_cases, tfrecord_cases
from mpscl_ray.prepare.source_cases import Found, LayoutOptions, SourceCase
from mpscl_ray.prepare.volume_layouts import case_pattern, folder_cases, mmwhs_cases, nnunet_cases

LAYOUTS: dict[str, Callable[[Listing, LayoutOptions], Found]] = {
    "mmwhs": mmwhs_cases,
    "nnunet": nnunet_cases,
    "folder": folder_cases,
    "tfrecord": tfrecord_cases,
    "npy": npy_cases,
}
_MAX_ID_BYTES = 200


@dataclass(frozen=True)
class Scan:
    """What a folder holds."""

    cases: tuple[SourceCase, ...]
    table: LabelTable | None
    """Meaning of the raw labels, if the layout defines it."""
    problems: tuple[str, ...]
    notices: tuple[str, ...]
    ambiguous_patients: str = ""
    """Why it is not certain which cases are of one patient."""
    uncertain_patients: tuple[tuple[str, ...], ...] = ()
    """Cases that may be of one patient."""


def scan(folder: Path, layout: str, options: LayoutOptions) -> Scan:
    """Cases of a folder in one of the :data:`LAYOUTS`.

    Raises:
        ConfigError: the options do not fit the layout.
        DataError: the folder is missing, empty, or holds nothing of the layout.
    """
    listing = list_files(folder)
    if layout not in LAYOUTS:
        raise ConfigError(f"--layout {layout!r}: expected one of {', '.join(LAYOUTS)}")
    cases, table, used = LAYOUTS[layout](listing, options)
    if layout in ("mmwhs", "tfrecord", "npy") and options.modality is not None:
        cases = [case for case in cases if case.modality == options.modality]
    unmatched_files = [path for path in listing.files if path not in used]
    if not cases and not listing.problems:
        raise DataError(_nothing_found(listing, layout, options, unmatched_files))
    if unmatched_files:
        listing.notices.append(
            f"files that are not part of the layout, {len(unmatched_files)}: {listing.some(unmatched_files)}"
            f"{_other_case(listing, options, unmatched_files)}"
        )
    _check_ids(listing, cases)
    found = group_patients(sorted(cases, key=_natural), options.patient_pattern, listing.problems)
    notices = (*listing.notices, *found.notices)
    return Scan(found.cases, table, tuple(listing.problems), notices, found.ambiguous, found.uncertain)


def _natural(case: SourceCase) -> list[tuple[int, int | str]]:
    """Sort key that puts patient2 before patient10."""
    parts = re.split(r"(\d+)", f"{case.modality}/{case.id}")
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts if part]


def _nothing_found(listing: Listing, layout: str, options: LayoutOptions, unmatched_files: Sequence[Path]) -> str:
    dicom = [path for path in unmatched_files[:200] if is_series(path) or is_dicom(path)]
    if dicom:
        return (
            f"{listing.root}: holds DICOM files ({listing.some(dicom)}); the path of a series is that of its folder: "
            "--layout folder --image-pattern '{case}', or '{case}/*' for a folder of each patient"
        )
    expected = {
        "mmwhs": "files called like ct_train_1001_image.nii.gz",
        "nnunet": "imagesTr/CASE_0000.nii.gz",
        "folder": f"files that match --image-pattern {options.image_pattern}",
        "tfrecord": "*.tfrecords files",
        "npy": "*.npy or *.npz files",
    }[layout]
    which = f" of the modality {options.modality!r}" if options.modality else ""
    hint = _other_case(listing, options, unmatched_files)
    return f"{listing.root}: no {expected}{which} (layout {layout}); it holds {listing.some(listing.files)}{hint}"


def _other_case(listing: Listing, options: LayoutOptions, files: Sequence[Path]) -> str:
    """That files would fit if upper and lower case were the same, if any would."""
    given = ((options.image_pattern, "--image-pattern"), (options.label_pattern, "--label-pattern"))
    patterns = [re.compile(case_pattern(text, option).pattern, re.IGNORECASE) for text, option in given if text]
    found = [path for path in files if any(pattern.fullmatch(listing.relative(path)) for pattern in patterns)]
    return f"; upper and lower case count: {listing.some(found, 2)}" if found else ""


def _check_ids(listing: Listing, cases: Iterable[SourceCase]) -> None:
    by_id: dict[tuple[str, str], list[SourceCase]] = {}
    for case in cases:
        by_id.setdefault((case.modality, case.id), []).append(case)
    for (_, name), same in by_id.items():
        if len(same) > 1:
            files = ", ".join(listing.relative(case.images[0]) for case in same)
            listing.problems.append(f"case {name} occurs {len(same)} times: {files}; keep one")
        if len(name.encode(errors="surrogateescape")) > _MAX_ID_BYTES or not name.isprintable() or "/" in name:
            listing.problems.append(
                f"{listing.relative(same[0].images[0])!r}: {name!r} cannot name a file of the dataset (at most "
                f"{_MAX_ID_BYTES} bytes of printable text); rename it"
            )
