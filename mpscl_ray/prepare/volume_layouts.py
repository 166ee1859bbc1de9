"""Layouts with one volume per file: MM-WHS 2017, nnU-Net, and any folder by name patterns."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from mpscl_ray.data.volumes.file_names import NIFTI_ENDINGS, VOLUME_ENDINGS, composed, stem_before
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.prepare.file_listing import LABEL_ENDINGS, Listing, pair_by_name
from mpscl_ray.prepare.label_table import (
    BACKGROUND,
    MMWHS,
    LabelTable,
    check_names,
    is_not_annotated,
    is_region,
    read_json,
)
from mpscl_ray.prepare.source_cases import Found, LayoutOptions, SourceCase, collect
from mpscl_ray.runs.wording import counted


def mmwhs_cases(listing: Listing, options: LayoutOptions) -> Found:
    """``{ct,mr}_train_10NN_{image,label}.nii.gz`` anywhere below the folder."""
    images: dict[str, list[Path]] = {}
    labels: dict[str, list[Path]] = {}
    used: set[Path] = set()
    hidden: list[Path] = []
    for path in listing.files:
        match = re.fullmatch(r"(ct|mr)_(train|test)_(\d+)_(image|label)(?i:\.nii(\.gz)?)", path.name)
        if not match:
            continue
        used.add(path)
        if match[2] == "test":
            hidden.append(path)
            continue
        collect(images if match[4] == "image" else labels, f"{match[1]}_{match[3]}", path)
    if hidden:
        listing.notices.append(
            f"volumes of the challenge's own test set, which has no labels, are left out, {len(hidden)}; "
            "segment them with "
            f"mpscl_ray.predict: {listing.some(hidden)}"
        )
    cases = []
    for case, image, label in pair_by_name(listing, images, labels):
        modality, _, number = case.partition("_")
        hint = f"{modality}_train_{number}_label.nii.gz"
        cases.append(SourceCase(case, modality, case, "nifti", (image,), label, label_hint=hint))
    return cases, MMWHS, used


def nnunet_cases(listing: Listing, options: LayoutOptions) -> Found:
    """``imagesTr labelsTr imagesTs labelsTs dataset.json``; files without a channel suffix are its MSD form."""
    path = listing.root / "dataset.json"
    try:
        about = read_json(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); layout nnunet needs it for the labels") from error
    if not isinstance(about, dict):
        raise DataError(f"{path}: expected a JSON object with the labels")
    table = _nnunet_labels(path, about, listing.notices)
    ending = str(about.get("file_ending", ""))
    endings = (ending.lower(),) if ending else NIFTI_ENDINGS
    if not set(endings) <= set(VOLUME_ENDINGS):
        raise DataError(f"{path}: file_ending {ending!r}; only .nii.gz, .nii, .nrrd and .mha are read")
    used = {path}
    cases: list[SourceCase] = []
    modality = options.modality or _nnunet_modality(path, about, options.channel)
    for images_name, labels_name, split in (("imagesTr", "labelsTr", None), ("imagesTs", "labelsTs", "test")):
        images: dict[str, list[Path]] = {}
        labels: dict[str, list[Path]] = {}
        other_channels = 0
        for stem, file in _stems(listing, labels_name, endings):
            used.add(file)
            collect(labels, stem, file)
        for stem, file in _stems(listing, images_name, endings):
            used.add(file)
            channel = re.fullmatch(r"(.+)_(\d{4})", stem)
            # In the MSD form a number at the end is part of the case's name, and of its label's.
            if channel is None or stem in labels:
                collect(images, stem, file)
            elif int(channel[2]) == options.channel:
                collect(images, channel[1], file)
            else:
                other_channels += 1
        if other_channels:
            listing.notices.append(
                f"{images_name}: only channel {options.channel:04d} is read, and no other one "
                f"({counted(other_channels, 'file')}); choose with --channel"
            )
        if split == "test" and images and not labels:
            listing.notices.append(
                f"{counted(len(images), 'test image')} without labels ({labels_name} is empty), left out; segment with "
                "mpscl_ray.predict"
            )
            continue
        for case, image, label in pair_by_name(listing, images, labels):
            hint = f"{labels_name}/{case}{endings[0]}"
            cases.append(SourceCase(case, modality, case, "nifti", (image,), label, split, hint))
    count = about.get("numTraining")
    training = sum(case.split is None for case in cases)
    if isinstance(count, int) and count != training:
        listing.notices.append(f"dataset.json says numTraining {count}, imagesTr holds {counted(training, 'case')}")
    return cases, table, used


def _stems(listing: Listing, folder: str, endings: Sequence[str]) -> Iterator[tuple[str, Path]]:
    for file in listing.files:
        stem = stem_before(composed(file.name), endings)
        if stem is not None and file.parent.name == folder:
            yield stem, file


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
        regions = [name for name, value in labels.items() if is_region(value)]
        if regions:
            raise DataError(
                f"{path}: the labels {', '.join(regions)} are regions of several ids, and a voxel has one label here; "
                "name each id instead, e.g. --layout folder --labels 1=MYO,2=LV (ids with one name are one structure)"
            )
        for key, value in labels.items():
            # nnU-Net v2 writes name: id, the older form and MSD id: name.
            raw, name = (int(value), key) if isinstance(value, int) else (int(key), str(value))
            pairs.append((raw, name))
    except (TypeError, ValueError):
        raise DataError(
            f"{path}: labels {json.dumps(labels)[:120]} are not NAME: ID pairs; correct "
            "dataset.json or use --layout folder with --labels"
        ) from None
    pairs.sort()
    ignored = frozenset(raw for raw, name in pairs if is_not_annotated(name))
    for (raw, name), (other, another) in pairwise(pairs):
        if raw == other:
            raise DataError(f"{path}: the label {raw} has two names, {name} and {another}; correct dataset.json")
    check_names(path, pairs)
    notices += [
        f"dataset.json: the label 0, called {name!r}, becomes background"
        for raw, name in pairs
        if raw == 0 and name.strip().lower() != BACKGROUND
    ]
    named = {raw: name for raw, name in pairs if raw != 0 and raw not in ignored}
    classes = list(dict.fromkeys([BACKGROUND, *named.values()]))  # several ids may share a name
    values = {0: 0, **{raw: classes.index(name) for raw, name in named.items()}}
    if len(classes) < 2 or len(classes) > 255:
        raise DataError(f"{path}: {len(classes) - 1} labels besides background; expected 1 to 254")
    return LabelTable(tuple(classes), values, not_annotated=ignored)


def folder_cases(listing: Listing, options: LayoutOptions) -> Found:
    """Any folder, by path patterns with ``{case}``, ``{patient}``, ``*``, and ``**/`` for any folders.

    The path of a DICOM series is that of its folder.
    """
    # Imported here: help and refused arguments need no numpy.
    from mpscl_ray.prepare.dicom_cases import with_series

    if options.image_pattern is None or options.modality is None:
        raise ConfigError(
            "--layout folder needs --modality and --image-pattern, e.g. --modality mr --image-pattern "
            "'{case}_C0.nii.gz' --label-pattern '{case}_C0_manual.nii.gz'"
        )
    image_pattern = case_pattern(options.image_pattern, "--image-pattern")
    if options.masks and "*" not in (options.label_pattern or ""):
        raise ConfigError(
            f"--labels names mask files ({', '.join(options.masks[:3])}), so --label-pattern needs a * for their "
            "names, e.g. '{case}/segmentations/*.nii.gz'"
        )
    label_pattern = None if options.label_pattern is None else case_pattern(options.label_pattern, "--label-pattern")
    images: dict[str, list[Path]] = {}
    labels: dict[str, list[Path]] = {}
    masks: dict[str, dict[str, Path]] = {}
    patients: dict[str, str] = {}
    used: set[Path] = set()
    for path, names in with_series(listing, image_pattern):
        # A label may match both patterns ({case}.nii.gz and {case}_seg.nii.gz), an image never does.
        label = _match(label_pattern, names) if label_pattern else None
        image = _match(image_pattern, names)
        if label and options.masks:
            masks.setdefault(_name(label), {})[label.groupdict().get("mask") or ""] = path
        elif label:
            collect(labels, _name(label), path)
        elif image:
            collect(images, _name(image), path)
            if "patient" in image.groupdict():
                patients[_name(image)] = image["patient"]
        else:
            continue
        used.add(path)
    maps = [case for case in images if case.lower().endswith(LABEL_ENDINGS)]
    if 0 < len(maps) < len(images):
        listing.problems.append(
            f"images by --image-pattern that are named like label maps, {len(maps)}: "
            f"{listing.some([images[case][0] for case in maps])}; give --label-pattern, or a "
            "narrower --image-pattern"
        )
    labels |= {case: [next(iter(found.values()))] for case, found in masks.items()}
    cases = []
    for case, image_path, label_paths in pair_by_name(listing, images, labels):
        if case in masks:
            label_paths = _masks_of(listing, case, masks[case], options.masks)
        hint = (options.label_pattern or "").replace("{case}", case)
        patient = patients.get(case, case)
        cases.append(SourceCase(case, options.modality, patient, "nifti", (image_path,), label_paths, label_hint=hint))
    return cases, None, used


def _match(pattern: re.Pattern[str], names: Sequence[str]) -> re.Match[str] | None:
    return next(filter(None, map(pattern.fullmatch, map(composed, names))), None)


def _name(match: re.Match[str]) -> str:
    """The case id: that of the patient and the case where a pattern has both."""
    found = match.groupdict()
    return f"{found['patient']}_{found['case']}" if found.get("patient") else match["case"]


def _masks_of(listing: Listing, case: str, found: Mapping[str, Path], wanted: Sequence[str]) -> tuple[Path, ...]:
    missing = [name for name in wanted if name not in found]
    if missing:
        listing.problems.append(
            f"case {case} has no mask {', '.join(missing)}; it has {', '.join(sorted(found)[:8])}; name masks that "
            "every case has in --labels"
        )
    return tuple(found[name] for name in wanted if name in found)


def case_pattern(text: str, option: str) -> re.Pattern[str]:
    """The expression that a path below a folder matches in full, with a group for ``{case}`` and one for ``{patient}``.

    Args:
        text: path with ``{case}``, ``{patient}``, ``*``, which stays in a folder, and ``**/`` for any folders. Upper
            and lower case count, but in the ending of an image file.
        option: name of the option that gave it, for messages.

    Raises:
        ConfigError: no ``{case}``, or another word in braces.
    """
    if "{case}" not in text:
        raise ConfigError(f"{option} {text!r}: must contain {{case}}, e.g. '{{case}}_image.nii.gz'")
    if unknown := re.search(r"\{(?!case\}|patient\})[^}]*\}", text):
        raise ConfigError(f"{option} {text!r}: {unknown[0]} is none of {{case}} and {{patient}}")
    text = composed(text)
    before_ending = stem_before(text, VOLUME_ENDINGS) or text
    expression = ""
    for part in re.split(r"(\{case\}|\{patient\}|\*\*/|\*)", before_ending):
        if part in ("{case}", "{patient}"):
            name = part[1:-1]
            expression += f"(?P={name})" if f"(?P<{name}>" in expression else f"(?P<{name}>[^/]+?)"
        elif part == "**/":
            expression += "(?:[^/]+/)*"
        else:
            expression += "[^/]*" if part == "*" else re.escape(part)
    expression += f"(?i:{re.escape(text[len(before_ending) :])})"
    before, star, after = expression.rpartition("[^/]*")
    return re.compile(f"{before}(?P<mask>[^/]*){after}" if star else expression)
