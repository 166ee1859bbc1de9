"""Checks that need all cases of a modality together."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence

from mpscl_ray.data.compatibility import orientation_notice
from mpscl_ray.data.dataset import Case
from mpscl_ray.prepare.copies import same_scans
from mpscl_ray.prepare.label_table import doubtful_names
from mpscl_ray.prepare.splits import UNDECIDED, overlaps
from mpscl_ray.prepare.staged_case import StagedCase

_LISTED = 6
_REPEATED = 3
_VARYING = re.compile(r"\bcase \S+|\S*[\d/]\S*")
"""Parts of a problem that differ where it is the same in several files."""
_FEWEST_WIDTHS, _NOTABLE_WIDTH = 4, 1.9
_FEW_LACK = 0.25
"""Part of the cases that may lack a class to be named."""


def check_staged(
    staged: Sequence[StagedCase], classes: Sequence[str], *, transductive: bool, allow_missing_classes: bool
) -> tuple[list[str], list[str]]:
    """Problems and warnings of one modality: leaks, sizes, empty labels, absent classes.

    Args:
        staged: the cases of all splits; undecided ones count as training cases.
        classes: names of the label values.
        transductive: whether training cases may also be validation or test cases.
        allow_missing_classes: whether a class that no training case shows is a warning, not a problem.
    """
    originals = same_scans([case.sketch for case in staged])
    entries = [
        (case.request.split, case.request.source.id, case.request.source.patient, staged[original].content_sha256)
        for case, original in zip(staged, originals, strict=True)
    ]
    problems, notices = overlaps(entries, transductive=transductive)
    notices += doubtful_names(classes)
    by_size: dict[tuple[int, ...], list[str]] = {}
    for case in staged:
        by_size.setdefault(case.shape[1:], []).append(case.request.source.id)
    if len(by_size) > 1:
        found = "; ".join(f"{size[0]} x {size[1]} ({_some(names)})" for size, names in sorted(by_size.items()))
        problems.append(f"slices of different sizes: {found}; give --crop or --size")
    training = [case for case in staged if case.request.split in ("train", UNDECIDED) and case.class_voxels is not None]
    volumes = [case for case in training if case.request.source.kind in ("nifti", "npz", "released_nifti")]
    empty = [
        case.request.source.id for case in staged if case.class_voxels is not None and not sum(case.class_voxels[1:])
    ]
    empty_volumes = [case for case in volumes if case.class_voxels is not None and not sum(case.class_voxels[1:])]
    if 2 * len(empty_volumes) > len(volumes):
        problems.append(
            f"the labels of {len(empty_volumes)} of {len(volumes)} training cases are all background "
            f"({_some([case.request.source.id for case in empty_volumes])}); check the label table, or give "
            "--unlabelled train"
        )
    elif empty:
        notices.append(f"labelled cases that show no structure, {len(empty)}: {_some(empty)}")
    if training and 2 * len(empty_volumes) <= len(volumes):
        for index, name in enumerate(classes[1:], start=1):
            if any(case.class_voxels is not None and case.class_voxels[index] for case in training):
                notices += [*_absent_from_held_out(staged, index, name), *_absent_from_few(staged, index, name)]
                continue
            sentence = f"no training case shows the class {name}"
            if allow_missing_classes:
                notices.append(sentence)
            else:
                problems.append(f"{sentence}; check the label table, or give --allow-missing-classes")
    return problems, notices


def shared_images(modalities: Mapping[str, Sequence[StagedCase]]) -> list[tuple[str, str]]:
    """(modality, warning) for each case that is the same image as one of another modality."""
    entries = [(modality, case) for modality, staged in modalities.items() for case in staged]
    originals = same_scans([case.sketch for _, case in entries])
    owners: dict[str, tuple[str, str]] = {}
    found = []
    for (modality, case), original in zip(entries, originals, strict=True):
        name = case.request.source.id
        other, first = owners.setdefault(entries[original][1].content_sha256, (modality, name))
        if other != modality:
            found.append((modality, f"{name} is the same image as {first} of {other}"))
    return found


def _absent_from_held_out(staged: Sequence[StagedCase], index: int, name: str) -> list[str]:
    """A warning for each labelled split but training that never shows a class: it has no score there."""
    notices = []
    for split in ("val", "test"):
        voxels = [case.class_voxels[index] for case in staged if case.request.split == split and case.class_voxels]
        if voxels and not any(voxels):
            notices.append(f"no {split} case shows the class {name}, so it has no score there")
    return notices


def _absent_from_few(staged: Sequence[StagedCase], index: int, name: str) -> list[str]:
    """A warning on few cases that show other classes, but not one that nearly all show: a mask that is empty."""
    shown = [case for case in staged if case.class_voxels is not None and any(case.class_voxels[1:])]
    lacking = list(dict.fromkeys(case.request.source.id for case in shown if not (case.class_voxels or ())[index]))
    volumes = all(case.request.source.kind == "nifti" for case in shown)
    if not volumes or not lacking or len(lacking) > _FEW_LACK * len(shown):
        return []
    return [f"{_some(lacking)}: the class {name}, which all others show, is absent; check the label map"]


def check_cases(cases: Sequence[Case]) -> list[str]:
    """Warnings on the finished cases of one modality."""
    notices = []
    held_out = [case for case in cases if case.split != "train"]
    notices += size_outliers((case.id, case.structure_width, case.spacing_mm) for case in cases)
    notice = orientation_notice(
        [case for case in cases if case.split == "train"], held_out, ("the training cases", "the held-out cases")
    )
    if notice:
        notices.append(notice)
    return [*notices, *shared_label_files((case.id, case.sources, case.class_voxels) for case in cases)]


def shared_label_files(cases: Iterable[tuple[str, Mapping[str, str], tuple[int, ...] | None]]) -> list[str]:
    """A warning for each label file that is that of several images.

    Args:
        cases: id, sources and voxels of each class of each case.
    """
    images: dict[str, dict[str, str]] = {}
    for case, sources, voxels in cases:
        if "label_sha256" in sources and voxels is not None and any(voxels[1:]):
            images.setdefault(sources["label_sha256"], {}).setdefault(sources["image_sha256"], case)
    return [
        f"{_some(sorted(names.values()))} have the same label map, though their images differ; give each its own"
        for names in images.values()
        if len(names) > 1
    ]


def size_outliers(cases: Iterable[tuple[str, float | None, tuple[float, float, float] | None]]) -> list[str]:
    """A warning on cases whose structures are much wider or narrower, in mm, than those of the others.

    Args:
        cases: id, width of the structures in pixels and voxel size of each; None where unknown.
    """
    widths = {
        case: pixels * math.sqrt(spacing[1] * spacing[2])
        for case, pixels, spacing in cases
        if pixels is not None and spacing is not None
    }
    if len(widths) < _FEWEST_WIDTHS:
        return []
    usual = statistics.median(widths.values())
    return [
        f"the structures of {case} are {width:.3g} mm wide, those of the other cases about {usual:.3g} mm; check the "
        "voxel sizes in its header"
        for case, width in widths.items()
        if not 1 / _NOTABLE_WIDTH < width / usual < _NOTABLE_WIDTH
    ]


def notice_kind(notice: str) -> str:
    """A warning without its numbers: warnings that differ only in numbers are of one kind."""
    # Unknown label ids are kinds of their own, numbers of voxels are not.
    kind = re.sub(r"\(\d+ voxels?\)", "", notice)
    return kind if "label id" in kind else re.sub(r"-?\d[\d.]*(e[+-]?\d+)?( voxels?\b)?", "", kind)


def summarise_notices(cases: Iterable[tuple[str, Iterable[str]]]) -> list[str]:
    """Warnings of many cases, each kind once: those that differ only in numbers are of one kind.

    Args:
        cases: case id and its warnings.
    """
    kinds: dict[str, list[tuple[str, str]]] = {}
    for case, notices in cases:
        for notice in notices:
            kinds.setdefault(notice_kind(notice), []).append((case, notice))
    summary = []
    for same in kinds.values():
        names = list(dict.fromkeys(case for case, _ in same))
        numbers = "" if len({notice for _, notice in same}) == 1 else f" (numbers of {names[0]})"
        summary.append(f"{_some(names)}: {same[0][1]}{numbers}")
    return summary


def summarise_problems(problems: Sequence[str]) -> list[str]:
    """Problems to print: of more than three that differ only in paths and numbers the first, and whose they are."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(_VARYING.sub("#", problem), []).append(problem)
    shown = []
    for same in kinds.values():
        others = [found[0].removeprefix("case ").rstrip(":,;") for one in same[1:] if (found := _VARYING.search(one))]
        if len(same) <= _REPEATED or len(others) < len(same) - 1:
            shown += same
        else:
            names = [other.rpartition("/")[2] for other in others]
            shown.append(f"{same[0]}; the same of {len(names)} more: {_some(names)}")
    return shown


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"
