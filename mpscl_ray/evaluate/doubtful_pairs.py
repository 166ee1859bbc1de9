"""Scores that are right by the table of ids, but perhaps not meant: other ids, copies of labels, one file twice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

_MOST_IDS = 64
_GOOD, _BETTER = 0.5, 0.3
"""Dice of another id from which it counts as that of the structure, and by how much it exceeds that of the table."""


@dataclass(frozen=True)
class Overlap:
    """Numbers of voxels by structure and by id of the prediction; they add up over cases."""

    both: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """(structure, id) -> voxels that are both."""
    true: Mapping[int, int] = field(default_factory=dict)
    predicted: Mapping[int, int] = field(default_factory=dict)


def overlap(prediction: NDArray[np.int32], true: NDArray[np.uint8], ignored: NDArray[np.bool_]) -> Overlap:
    """Overlap of each id but 0 in a prediction with each structure in the label, on one grid.

    Args:
        prediction: Ids as in the file.
        true: Class indices, background where ignored.
        ignored: Voxels that count nowhere.
    """
    marked = (prediction != 0) & ~ignored
    ids, place = np.unique(prediction[marked], return_inverse=True)
    if ids.size > _MOST_IDS:
        return Overlap()
    structures = int(true.max(initial=0)) + 1
    counts = np.bincount(place * structures + true[marked], minlength=ids.size * structures)
    counts = counts.reshape(ids.size, structures)
    sizes = np.bincount(true.ravel(), minlength=structures)
    return Overlap(
        {
            (structure, int(value)): int(counts[row, structure])
            for row, value in enumerate(ids)
            for structure in range(1, structures)
        },
        {structure: int(sizes[structure]) for structure in range(1, structures)},
        {int(value): int(counts[row].sum()) for row, value in enumerate(ids)},
    )


def other_ids(overlaps: Sequence[Overlap], classes: Sequence[str], index: Mapping[int, int]) -> list[str]:
    """A warning if other ids of the predictions than those of the table overlap structures far better.

    Args:
        overlaps: Of all cases.
        classes: Structures, background first.
        index: Id in predictions -> index of its structure.
    """
    ids = sorted({value for found in overlaps for value in found.predicted})

    def dice(structure: int, values: Iterable[int]) -> float:
        values = list(values)
        both = sum(found.both.get((structure, value), 0) for found in overlaps for value in values)
        sizes = sum(found.true.get(structure, 0) for found in overlaps)
        sizes += sum(found.predicted.get(value, 0) for found in overlaps for value in values)
        return 2 * both / sizes if sizes else 0.0

    better = {}
    for structure in range(1, len(classes)):
        own = dice(structure, [value for value in ids if index.get(value) == structure])
        best = max(ids, key=lambda value: dice(structure, [value]), default=0)
        if dice(structure, [best]) >= max(_GOOD, own + _BETTER) and index.get(best) != structure:
            better[structure] = (best, dice(structure, [best]), own)
    if not better:
        return []
    listed = ", ".join(
        f"{value} fits {classes[structure]} (Dice {100 * best:.0f} %, by the table {100 * own:.0f} %)"
        for structure, (value, best, own) in better.items()
    )
    table = {value: name for value, number in index.items() if (name := classes[number]) and number}
    kept = {value: name for value, name in table.items() if name not in {classes[structure] for structure in better}}
    table = kept | {value: classes[structure] for structure, (value, _, _) in better.items()}
    wanted = ",".join(f"{value}={name}" for value, name in sorted(table.items()))
    return [f"predictions seem to have other ids: {listed}; if so, give --prediction-labels {wanted}"]


def repeated(cases: Mapping[str, tuple[str, bool]]) -> list[str]:
    """Warnings on predictions that are their labels, and on one prediction under several names.

    Args:
        cases: Case -> hash of the prediction's file, and whether it equals its label in every voxel.
    """
    same = [case for case, (_, equal) in cases.items() if equal]
    found = []
    if same:
        found.append(
            f"predictions that equal their label in every voxel, as copies of it do, {len(same)}: {_some(same)}"
        )
    by_file: dict[str, list[str]] = {}
    for case, (digest, _) in cases.items():
        by_file.setdefault(digest, []).append(case)
    found += [f"the same file is the prediction of {_some(names)}" for names in by_file.values() if len(names) > 1]
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
