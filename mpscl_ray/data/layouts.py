"""Finding images and labels in the folder layouts that users hold; nothing but names is read here.

Every layout gives a :class:`Scan`: the cases, and all that is wrong with the folder at once. Images and labels are
paired by name, never by their position in a list.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mpscl_ray.data.file_listing import Listing, is_dicom, list_files, pair_by_name, stem_before
from mpscl_ray.data.label_table import BACKGROUND, MMWHS, RELEASED, LabelTable
from mpscl_ray.errors import ConfigError, DataError

Kind = Literal["nifti", "tfrecord", "npy", "npz", "released_nifti"]
LAYOUTS = ("mmwhs", "nnunet", "folder", "tfrecord", "npy")
_NIFTI = (".nii.gz", ".nii")
_MAX_ID_BYTES = 200


@dataclass(frozen=True)
class SourceCase:
    """The files of one case. ``labels`` is as long as ``images`` or empty; TFRecord and npz files hold their own.

    ``released_nifti`` is a test volume of the SIFA release, z-scored by its publisher; ``nifti`` is any other volume.
    """

    id: str
    modality: str
    patient: str
    kind: Kind
    images: tuple[Path, ...]
    labels: tuple[Path, ...] = ()
    split: str | None = None
    """Where the layout itself says so."""
    label_hint: str = ""
    """Where the missing label was looked for."""


@dataclass(frozen=True)
class Scan:
    """What a folder holds."""

    cases: tuple[SourceCase, ...]
    table: LabelTable | None
    """Meaning of the raw labels, where the layout tells."""
    problems: tuple[str, ...]
    notices: tuple[str, ...]


@dataclass(frozen=True)
class LayoutOptions:
    """What the user says about a folder."""

    modality: str | None = None
    image_pattern: str | None = None
    label_pattern: str | None = None
    patient_pattern: str | None = None
    """Regular expression searched in the case id; its first group (or the whole match) is the patient."""
    group_slices: int | None = None
    """Slices of one file each that go into one case, by their number."""
    channel: int = 0


def scan(folder: Path, layout: str, options: LayoutOptions) -> Scan:
    """Cases of a folder in one of the :data:`LAYOUTS`.

    Raises:
        ConfigError: where the options do not fit the layout.
        DataError: where the folder is missing, empty, or holds nothing of the layout.
    """
    listing = list_files(folder)
    scanners: dict[str, Callable[[Listing, LayoutOptions], tuple[list[SourceCase], LabelTable | None, set[Path]]]]
    scanners = {"mmwhs": _mmwhs, "nnunet": _nnunet, "folder": _folder, "tfrecord": _tfrecord, "npy": _npy}
    if layout not in scanners:
        raise ConfigError(f"--layout {layout!r}: expected one of {', '.join(LAYOUTS)}")
    cases, table, used = scanners[layout](listing, options)
    if layout in ("mmwhs", "tfrecord", "npy") and options.modality is not None:
        cases = [case for case in cases if case.modality == options.modality]
    strays = [path for path in listing.files if path not in used]
    if not cases and not listing.problems:
        raise DataError(_nothing_found(listing, layout, options, strays))
    if strays:
        listing.notices.append(f"files that are not part of the layout, {len(strays)}: {listing.some(strays)}")
    cases = sorted((_with_patient(case, options, listing.problems) for case in cases), key=_natural)
    _check_ids(listing, cases)
    return Scan(tuple(cases), table, tuple(listing.problems), tuple(listing.notices))


# ------------------------------------------------------------------------------------------------- shared steps


def _natural(case: SourceCase) -> list[tuple[int, int | str]]:
    """Sort key that puts patient2 before patient10."""
    parts = re.split(r"(\d+)", f"{case.modality}/{case.id}")
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts if part]


def _nothing_found(listing: Listing, layout: str, options: LayoutOptions, strays: Sequence[Path]) -> str:
    dicom = [path for path in strays[:200] if is_dicom(path)]
    if dicom:
        return (
            f"{listing.root}: holds DICOM files (e.g. {listing.relative(dicom[0])}), which are not read; convert them "
            f"first: dcm2niix -ba y -z y -o NIFTI_FOLDER {listing.root}"
        )
    expected = {
        "mmwhs": "files called like ct_train_1001_image.nii.gz",
        "nnunet": "imagesTr/CASE_0000.nii.gz",
        "folder": f"files that match --image-pattern {options.image_pattern}",
        "tfrecord": "*.tfrecords files",
        "npy": "*.npy or *.npz files",
    }[layout]
    which = f" of the modality {options.modality!r}" if options.modality else ""
    return f"{listing.root}: no {expected}{which} (layout {layout}); it holds {listing.some(listing.files)}"


def _with_patient(case: SourceCase, options: LayoutOptions, problems: list[str]) -> SourceCase:
    if options.patient_pattern is None:
        return case
    try:
        match = re.search(options.patient_pattern, case.id)
    except re.error as error:
        raise ConfigError(f"--patient-pattern {options.patient_pattern!r}: not a regular expression: {error}") from None
    if match is None:
        problems.append(f"case {case.id}: --patient-pattern {options.patient_pattern!r} does not match it")
        return case
    return replace(case, patient=(match[1] if match.re.groups and match[1] is not None else match[0]))


def _check_ids(listing: Listing, cases: Iterable[SourceCase]) -> None:
    by_id: dict[tuple[str, str], list[SourceCase]] = {}
    for case in cases:
        by_id.setdefault((case.modality, case.id), []).append(case)
    for (_, name), same in by_id.items():
        if len(same) > 1:
            files = ", ".join(listing.relative(case.images[0]) for case in same)
            listing.problems.append(f"case {name} is there {len(same)} times: {files}; keep one")
        if len(name.encode(errors="surrogateescape")) > _MAX_ID_BYTES or not name.isprintable() or "/" in name:
            listing.problems.append(
                f"{listing.relative(same[0].images[0])!r}: {name!r} cannot name a file of the dataset (at most "
                f"{_MAX_ID_BYTES} bytes of printable text); rename it"
            )


def _collect(found: dict[str, list[Path]], case: str, path: Path) -> None:
    found.setdefault(case, []).append(path)


# -------------------------------------------------------------------------------------------------------- MM-WHS


def _mmwhs(listing: Listing, options: LayoutOptions) -> tuple[list[SourceCase], LabelTable | None, set[Path]]:
    """``{ct,mr}_train_10NN_{image,label}.nii.gz`` anywhere below the folder."""
    images: dict[str, list[Path]] = {}
    labels: dict[str, list[Path]] = {}
    used: set[Path] = set()
    hidden: list[Path] = []
    for path in listing.files:
        match = re.fullmatch(r"(ct|mr)_(train|test)_(\d+)_(image|label)\.nii(\.gz)?", path.name)
        if not match:
            continue
        used.add(path)
        if match[2] == "test":
            hidden.append(path)
            continue
        _collect(images if match[4] == "image" else labels, f"{match[1]}_{match[3]}", path)
    if hidden:
        listing.notices.append(
            f"{len(hidden)} volumes of the challenge's own test set, which has no labels, are left out; segment them "
            f"with mpscl_ray.predict: {listing.some(hidden)}"
        )
    cases = []
    for case, image, label in pair_by_name(listing, images, labels):
        modality, _, number = case.partition("_")
        hint = f"{modality}_train_{number}_label.nii.gz"
        cases.append(SourceCase(case, modality, case, "nifti", (image,), label, label_hint=hint))
    return cases, MMWHS, used


# -------------------------------------------------------------------------------------------------------- nnU-Net


def _nnunet(listing: Listing, options: LayoutOptions) -> tuple[list[SourceCase], LabelTable | None, set[Path]]:
    """``imagesTr labelsTr imagesTs labelsTs dataset.json``; files without a channel suffix are the MSD form of it."""
    path = listing.root / "dataset.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(about, dict):
            raise ValueError("expected an object")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); layout nnunet needs it for the labels") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    table = _nnunet_labels(path, about, listing.notices)
    ending = str(about.get("file_ending", ""))
    endings = (ending,) if ending else _NIFTI
    if not set(endings) <= set(_NIFTI):
        raise DataError(f"{path}: file_ending {ending!r}; only .nii.gz and .nii are read")
    used = {path}
    cases: list[SourceCase] = []
    modality = options.modality or _nnunet_modality(path, about, options.channel)
    for images_name, labels_name, split in (("imagesTr", "labelsTr", None), ("imagesTs", "labelsTs", "test")):
        images: dict[str, list[Path]] = {}
        labels: dict[str, list[Path]] = {}
        other_channels = 0
        for file in listing.files:
            stem = stem_before(file.name, endings)
            if stem is None or file.parent.name not in (images_name, labels_name):
                continue
            used.add(file)
            channel = re.fullmatch(r"(.+)_(\d{4})", stem)
            if file.parent.name == labels_name:
                _collect(labels, stem, file)
            elif channel is None:
                _collect(images, stem, file)
            elif int(channel[2]) == options.channel:
                _collect(images, channel[1], file)
            else:
                other_channels += 1
        if other_channels:
            listing.notices.append(
                f"{images_name}: only channel {options.channel:04d} is read, {other_channels} files of other channels "
                "are not; choose with --channel"
            )
        if split == "test" and images and not labels:
            listing.notices.append(
                f"{len(images)} test images without labels ({labels_name} is empty) are left out; segment them with "
                "mpscl_ray.predict"
            )
            continue
        for case, image, label in pair_by_name(listing, images, labels):
            hint = f"{labels_name}/{case}{endings[0]}"
            cases.append(SourceCase(case, modality, case, "nifti", (image,), label, split, hint))
    count = about.get("numTraining")
    training = sum(case.split is None for case in cases)
    if isinstance(count, int) and count != training:
        listing.notices.append(f"dataset.json says numTraining {count}, imagesTr holds {training} cases")
    return cases, table, used


def _nnunet_modality(path: Path, about: Mapping[str, Any], channel: int) -> str:
    channels = about.get("channel_names", about.get("modality"))
    name = channels.get(str(channel)) if isinstance(channels, dict) else None
    if not isinstance(name, str) or not re.search(r"\w", name):
        raise DataError(f"{path}: channel_names has no name for channel {channel}; give --modality")
    lowered = re.sub(r"\W+", "_", name.lower()).strip("_")
    return {"mri": "mr"}.get(lowered, lowered)


def _nnunet_labels(path: Path, about: Mapping[str, Any], notices: list[str]) -> LabelTable:
    labels = about.get("labels")
    pairs: list[tuple[int, str]] = []
    try:
        if not isinstance(labels, dict) or not labels:
            raise ValueError("expected an object")
        for key, value in labels.items():
            # nnU-Net v2 writes name: id, the older form and MSD id: name.
            raw, name = (int(value), key) if isinstance(value, int) else (int(key), str(value))
            pairs.append((raw, name))
    except (TypeError, ValueError):
        raise DataError(
            f"{path}: labels {json.dumps(labels)[:120]} are not NAME: ID pairs (regions are not supported); correct "
            "dataset.json or use --layout folder with --labels"
        ) from None
    pairs.sort()
    ignored = frozenset(raw for raw, name in pairs if name == "ignore")
    if ignored:
        notices.append("dataset.json: the label 'ignore' becomes background")
    classes = [BACKGROUND, *(name for raw, name in pairs if raw != 0 and raw not in ignored)]
    values = {0: 0, **{raw: classes.index(name) for raw, name in pairs if raw != 0 and raw not in ignored}}
    if len(classes) < 2 or len(classes) > 255:
        raise DataError(f"{path}: {len(classes) - 1} labels besides background; expected 1 to 254")
    return LabelTable(tuple(classes), values, ignored)


# ---------------------------------------------------------------------------------------------- patterns of names


def _folder(listing: Listing, options: LayoutOptions) -> tuple[list[SourceCase], LabelTable | None, set[Path]]:
    """Any folder, by patterns of paths with ``{case}``."""
    if options.image_pattern is None or options.modality is None:
        raise ConfigError(
            "--layout folder needs --modality and --image-pattern, e.g. --modality mr --image-pattern "
            "'{case}_C0.nii.gz' --label-pattern '{case}_C0_manual.nii.gz'"
        )
    image_pattern = _pattern(options.image_pattern, "--image-pattern")
    label_pattern = None if options.label_pattern is None else _pattern(options.label_pattern, "--label-pattern")
    images: dict[str, list[Path]] = {}
    labels: dict[str, list[Path]] = {}
    used: set[Path] = set()
    for path in listing.files:
        relative = listing.relative(path)
        # A label may match both patterns ({case}.nii.gz and {case}_seg.nii.gz), an image never does.
        label = label_pattern.fullmatch(relative) if label_pattern else None
        image = image_pattern.fullmatch(relative)
        if label:
            _collect(labels, label["case"], path)
        elif image:
            _collect(images, image["case"], path)
        else:
            continue
        used.add(path)
    cases = []
    for case, image_path, label_paths in pair_by_name(listing, images, labels):
        hint = (options.label_pattern or "").replace("{case}", case)
        cases.append(SourceCase(case, options.modality, case, "nifti", (image_path,), label_paths, label_hint=hint))
    return cases, None, used


def _pattern(text: str, option: str) -> re.Pattern[str]:
    if "{case}" not in text:
        raise ConfigError(f"{option} {text!r}: must contain {{case}}, e.g. '{{case}}_image.nii.gz'")
    expression = ""
    for part in re.split(r"(\{case\}|\*)", text):
        if part == "{case}":
            expression += "(?P=case)" if "(?P<case>" in expression else "(?P<case>[^/]+?)"
        else:
            expression += "[^/]*" if part == "*" else re.escape(part)
    return re.compile(expression)


# ------------------------------------------------------------------------------------------------- released slices

_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


def _words(listing: Listing, path: Path) -> list[str]:
    """Words of the file name, then those of the folders above it: the nearest word tells modality and split."""
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
    """Cases of ``size`` consecutive slice numbers each, where asked; a case for each file otherwise."""
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


def _tfrecord(listing: Listing, options: LayoutOptions) -> tuple[list[SourceCase], LabelTable | None, set[Path]]:
    """``*.tfrecords`` of SIFA / PnP-AdaNet, a case for each file; modality and split from the words of the name.

    The test volumes of the release are NIfTI files, ``image_ct_1003.nii.gz`` with ``gth_ct_1003.nii.gz``.
    """
    cases = []
    used = set()
    images: dict[str, list[Path]] = {}
    labels: dict[str, list[Path]] = {}
    for path in listing.files:
        volume = re.fullmatch(r"(image|gth)_((?:ct|mr)_\d+)\.nii\.gz", path.name)
        stem = stem_before(path.name, (".tfrecords", ".tfrecord"))
        if volume:
            used.add(path)
            _collect(images if volume[1] == "image" else labels, volume[2], path)
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


def _npy(listing: Listing, options: LayoutOptions) -> tuple[list[SourceCase], LabelTable | None, set[Path]]:
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
                _collect(labels, path.stem.removesuffix("_gt"), path)
            else:
                _collect(images, path.stem, path)
    slices = []
    for stem, image, label in pair_by_name(listing, images, labels):
        case = _slice_case(listing, options, image, stem, "npy")
        if case is not None:
            slices.append(replace(case, labels=label, label_hint=f"{stem}_gt.npy"))
    return cases + _grouped(listing, slices, options.group_slices), RELEASED, used
