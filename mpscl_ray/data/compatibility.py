"""Do two sets of prepared cases fit together: classes, size, orientation, scale, patients?

Most of what ruins an adaptation is visible before it starts: a test set stored upside down, a domain resampled by a
wrong header, the same patient in both domains. The checks need only the manifests.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpscl_ray.data.dataset import Case, Manifest
from mpscl_ray.data.label_values import count_voxels, is_structure
from mpscl_ray.errors import DataError
from mpscl_ray.runs.wording import counted

_FLIPS = {
    "as they are": np.array([1.0, 1.0]),
    "with the rows flipped": np.array([-1.0, 1.0]),
    "with the columns flipped": np.array([1.0, -1.0]),
    "with rows and columns flipped": np.array([-1.0, -1.0]),
}
_NOTABLE_DISTANCE = 0.04
"""Distance, as a fraction of the image, from which a displaced structure is reported; less is anatomy."""
_NOTABLE_RATIO = 1.3


def label_statistics(label: NDArray[np.uint8] | None, num_classes: int) -> dict[str, Any]:
    """The fields of a :class:`~mpscl_ray.data.dataset.Case` on where and how large its structures are.

    Args:
        label: (D, H, W), or None.
    """
    if label is None:
        return {"class_voxels": None, "class_centres": None, "structure_width": None}
    _, height, width = label.shape
    voxels = count_voxels(label, num_classes)
    centres: list[tuple[float, float] | None] = []
    for index in range(num_classes):
        if voxels[index] == 0:
            centres.append(None)
            continue
        inside = label == index
        rows = float(inside.sum(axis=(0, 2)) @ (np.arange(height) + 0.5)) / voxels[index]
        columns = float(inside.sum(axis=(0, 1)) @ (np.arange(width) + 0.5)) / voxels[index]
        centres.append((rows / height, columns / width))
    return {
        "class_voxels": voxels,
        "class_centres": tuple(centres),
        "structure_width": structure_width(label),
    }


def structure_width(label: NDArray[np.uint8] | None) -> float | None:
    """Side in pixels of a square as large as all structures of a (D, H, W) label in the slice that shows most."""
    largest = 0 if label is None else int(is_structure(label).sum(axis=(1, 2)).max())
    return float(np.sqrt(largest)) if largest else None


def mean_centres(cases: Iterable[Case]) -> NDArray[np.float64] | None:
    """Mean (row, column) of each structure over the labelled cases, (C-1, 2); NaN for one that no case shows."""
    rows = [
        [(np.nan, np.nan) if centre is None else centre for centre in case.class_centres[1:]]
        for case in cases
        if case.class_centres is not None
    ]
    if not rows:
        return None
    centres = np.asarray(rows, dtype=np.float64)
    count = np.isfinite(centres).sum(axis=0)
    return np.where(count > 0, np.nansum(centres, axis=0) / np.maximum(count, 1), np.nan)


def orientation_notice(first: Iterable[Case], second: Iterable[Case], names: tuple[str, str]) -> str | None:
    """A warning if the structures of two sets agree much better after a flip, else None.

    The positions of the structures relative to each other are compared, so a different crop does not matter.
    """
    one, two = mean_centres(first), mean_centres(second)
    if one is None or two is None:
        return None
    shared = np.isfinite(one).all(axis=1) & np.isfinite(two).all(axis=1)
    if shared.sum() < 2:
        return None
    one = one[shared] - one[shared].mean(axis=0)
    two = two[shared] - two[shared].mean(axis=0)
    distances = {name: float(np.sqrt(((one - two * flip) ** 2).sum(axis=1).mean())) for name, flip in _FLIPS.items()}
    straight = distances["as they are"]
    best = min(distances, key=lambda name: distances[name])
    if straight < _NOTABLE_DISTANCE or distances[best] > 0.5 * straight:
        return None
    return (
        f"the structures of {names[1]} match those of {names[0]} only {best}: mean distance "
        f"{distances[best]:.1%} of the image instead of {straight:.1%}; check the orientation of both"
    )


def _widths(cases: Iterable[Case]) -> tuple[float | None, float | None]:
    """Median structure width in pixels and, if all spacings are known, in mm."""
    pixels, millimetres = [], []
    for case in cases:
        if case.structure_width is None:
            continue
        pixels.append(case.structure_width)
        if case.spacing_mm is not None:
            millimetres.append(case.structure_width * float(np.sqrt(case.spacing_mm[1] * case.spacing_mm[2])))
    if not pixels:
        return None, None
    return float(np.median(pixels)), float(np.median(millimetres)) if len(millimetres) == len(pixels) else None


def _far(one: float, two: float) -> bool:
    return max(one, two) > _NOTABLE_RATIO * min(one, two)


def size_notice(source: Iterable[Case], target: Iterable[Case]) -> str | None:
    """A warning if the structures of two domains differ in size, in pixels or in mm, else None."""
    pixels_source, mm_source = _widths(source)
    pixels_target, mm_target = _widths(target)
    if pixels_source is None or pixels_target is None:
        return None
    by_pixel = f"{pixels_source:.0f} and {pixels_target:.0f} pixels wide"
    if mm_source is None or mm_target is None:
        if _far(pixels_source, pixels_target):
            return f"the structures of source and target are {by_pixel}: check crop and size of both"
        return None
    by_mm = f"{mm_source:.0f} and {mm_target:.0f} mm"
    if _far(mm_source, mm_target) and not _far(pixels_source, pixels_target):
        return (
            f"the structures of source and target are {by_pixel}, but {by_mm} by the spacing of the files: the spacing "
            "of one domain is likely wrong; do not resample by it, and do not trust its distances in mm"
        )
    if _far(pixels_source, pixels_target):
        return (
            f"the structures of source and target are {by_pixel} ({by_mm}): give both the same --spacing-mm, --crop "
            "and --size"
        )
    return None


def check_pair(source: Manifest, target: Manifest) -> list[str]:
    """Refuse a source and a target that cannot be trained together; returns warnings.

    Args:
        source: the labelled domain.
        target: the domain to adapt to; its classes may be unknown (empty) if none of its cases is labelled.

    Raises:
        DataError: the first of :func:`pair_problems`.
    """
    for problem in pair_problems(source, target):
        raise DataError(problem)
    return pair_notices(source, target)


def pair_problems(source: Manifest, target: Manifest) -> list[str]:
    """All that keeps a source and a target from being trained together.

    Size or classes differ, the source has no labelled training case, a domain has no training case, or both hold the
    same image.
    """
    names = f"source {source.modality!r} and target {target.modality!r}"
    problems = []
    if source.size != target.size:
        problems.append(
            f"{names}: slices of {source.size[0]} x {source.size[1]} and {target.size[0]} x {target.size[1]} pixels; "
            "prepare both with the same --size"
        )
    if target.classes and source.classes != target.classes:
        problems.append(
            f"{names}: the classes are {', '.join(source.classes)} and {', '.join(target.classes)}; prepare both with "
            "the same class names in the same order"
        )
    if not any(case.labelled for case in source.split("train")):
        problems.append(f"source {source.modality!r}: no training case is labelled; prepare it with its labels")
    if not target.split("train"):
        problems.append(f"target {target.modality!r}: there is no training case; prepare it with a train split")
    images = {case.content_sha256: case.id for case in source.cases}
    same = sorted({(images[case.content_sha256], case.id) for case in target.cases if case.content_sha256 in images})
    if same:
        pairs = ", ".join(f"{one} = {two}" for one, two in same[:10])
        problems.append(
            f"{names}: the same images are in both, {len(same)}: {pairs}; a domain must have its own images"
        )
    return problems


def plane_notice(source: Manifest, target: Manifest) -> str | None:
    """A warning if the volumes of two domains were cut into slices along other axes, else None."""
    if not all(any(case.geometry for case in domain.cases) for domain in (source, target)):
        return None  # How slices were cut that were slices already is not known.
    ways = [(domain.recipe.get("orientation"), domain.recipe.get("slice_axis")) for domain in (source, target)]
    if ways[0] == ways[1]:
        return None
    cut = [f"along array axis {axis} as stored" if kind == "stored" else f"{axis}" for kind, axis in ways]
    return (
        f"the slices of source and target are cut in two ways, {cut[0]} and {cut[1]}: unless you know that they show "
        "the same view in the same orientation, prepare both with the same --orientation and --slice-axis, e.g. "
        "--slice-axis coronal"
    )


def pair_notices(source: Manifest, target: Manifest) -> list[str]:
    """Warnings on a source and a target: plane of the slices, shared patients, orientation, size of the structures."""
    notices = [notice] if (notice := plane_notice(source, target)) else []
    patients = sorted({case.patient for case in source.cases} & {case.patient for case in target.cases})
    if patients:
        notices.append(
            f"{counted(len(patients), 'patient')} in source and target ({', '.join(patients[:5])}): fine for paired "
            "examinations, but then the result is not one on unseen patients"
        )
    if source.classes == target.classes:  # The structures of others cannot be compared.
        held_out = [case for case in target.cases if case.split != "train"]
        found = (
            orientation_notice(source.cases, held_out, ("the source", "the target")),
            size_notice(source.cases, held_out),
        )
        notices += [notice for notice in found if notice]
    return notices
