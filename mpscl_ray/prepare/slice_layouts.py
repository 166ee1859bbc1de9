"""Layouts of the public releases: TFRecords of SIFA / PnP-AdaNet, npy and npz files of the MPSCL authors."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from mpscl_ray.data.volumes.file_names import stem_before
from mpscl_ray.errors import ConfigError
from mpscl_ray.prepare.file_listing import Listing, pair_by_name
from mpscl_ray.prepare.label_table import RELEASED
from mpscl_ray.prepare.source_cases import Found, Kind, LayoutOptions, SourceCase, collect

_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


def _words(listing: Listing, path: Path) -> list[str]:
    """Words of the file name, then those of the folders above it: the nearest word gives modality and split."""
    parts = [path.name, *reversed(path.relative_to(listing.root).parts[:-1]), listing.root.name]
    return [word for part in parts for word in re.split(r"[^a-z0-9]+", part.lower())]


def _slice_case(listing: Listing, options: LayoutOptions, path: Path, stem: str, kind: Kind) -> SourceCase | None:
    words = _words(listing, path)
    modality = next((word for word in words if word in ("ct", "mr")), options.modality)
    if modality is None:
        listing.problems.append(f"{listing.relative(path)}: neither ct nor mr in its name or folder; give --modality")
        return None
    split = next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)
    return SourceCase(stem, modality, stem, kind, (path,), split=split)


def _grouped(listing: Listing, cases: list[SourceCase], size: int | None) -> list[SourceCase]:
    """Cases of ``size`` consecutive slice numbers each; a case for each file without a size."""
    if size is None:
        return cases
    if size < 1:
        raise ConfigError(f"--group-slices {size}: expected a number of slices above 0, e.g. 600")
    groups: dict[str, list[tuple[int, SourceCase]]] = {}
    single = []
    for case in cases:
        number = re.search(r"slice_?(\d+)$", case.id)
        if number is None or case.kind == "npz":
            single.append(case)
            continue
        name = f"{case.id[: number.start()]}slices{int(number[1]) // size:04d}"
        groups.setdefault(f"{case.modality}/{name}", []).append((int(number[1]), replace(case, patient=name)))
    merged = []
    for name, members in groups.items():
        members.sort(key=lambda member: member[0])
        first = members[0][1]
        labels = tuple(path for _, case in members for path in case.labels)
        unlabelled = next((case for _, case in members if first.kind == "npy" and not case.labels), None)
        if unlabelled is not None and labels:
            listing.problems.append(f"{unlabelled.label_hint}: missing, though other slices of its group are labelled")
        images = tuple(path for _, case in members for path in case.images)
        merged.append(replace(first, id=name.partition("/")[2], images=images, labels=labels))
    if merged:
        listing.notices.append(
            f"slices are grouped by {size} consecutive numbers; the release does not say which slices are of one "
            "patient"
        )
    return single + merged


def tfrecord_cases(listing: Listing, options: LayoutOptions) -> Found:
    """``*.tfrecords`` of SIFA / PnP-AdaNet, a case for each file; modality and split from the words of the name.

    The test volumes of the release are NIfTI files, ``image_ct_1003.nii.gz`` with ``gth_ct_1003.nii.gz``.
    """
    cases = []
    used = set()
    images: dict[str, list[Path]] = {}
    labels: dict[str, list[Path]] = {}
    for path in listing.files:
        volume = re.fullmatch(r"(image|gth)_((?:ct|mr)_\d+)(?i:\.nii\.gz)", path.name)
        stem = stem_before(path.name, (".tfrecords", ".tfrecord"))
        if volume:
            used.add(path)
            collect(images if volume[1] == "image" else labels, volume[2], path)
        elif stem is not None:
            used.add(path)
            case = _slice_case(listing, options, path, stem, "tfrecord")
            if case is not None:
                cases.append(case)
    volumes = [
        SourceCase(name, name[:2], name, "released_nifti", (image,), label, "test", f"gth_{name}.nii.gz")
        for name, image, label in pair_by_name(listing, images, labels)
    ]
    return _grouped(listing, cases, options.group_slices) + volumes, RELEASED, used


def npy_cases(listing: Listing, options: LayoutOptions) -> Found:
    """``.npy`` slices with their ``_gt.npy`` (paired by name) and ``.npz`` test volumes of the MPSCL release."""
    images: dict[str, list[Path]] = {}
    labels: dict[str, list[Path]] = {}
    cases = []
    used = set()
    for path in listing.files:
        if path.suffix == ".npz":
            used.add(path)
            stem = stem_before(path.name, (".nii.gz.npz", ".npz")) or path.stem
            case = _slice_case(listing, options, path, stem.removeprefix("image_"), "npz")
            if case is not None:
                cases.append(replace(case, split=case.split or "test"))
        elif path.suffix == ".npy":
            used.add(path)
            if path.stem.endswith("_gt"):
                collect(labels, path.stem.removesuffix("_gt"), path)
            else:
                collect(images, path.stem, path)
    slices = []
    for stem, image, label in pair_by_name(listing, images, labels):
        case = _slice_case(listing, options, image, stem, "npy")
        if case is not None:
            slices.append(replace(case, labels=label, label_hint=f"{stem}_gt.npy"))
    return cases + _grouped(listing, slices, options.group_slices), RELEASED, used
