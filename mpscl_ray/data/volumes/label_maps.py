"""Label ids of a file to class indices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.runs.wording import counted

KNOWN_TYPOS = {421: 420}
"""Ids that occur in published label maps by mistake, and the ids that were meant (MM-WHS 2017: left atrium)."""

_WHOLE_NUMBER_TOLERANCE = 1e-3
_PIECE = 1 << 22
_TABLE_LIMIT = 1 << 16
_LISTED = 10


def whole_ids(values: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """The whole number nearest to each label value, and whether it fits 32 bits and is within 0.001."""
    with np.errstate(invalid="ignore"):
        whole = np.rint(values, dtype=np.float64)
        return whole, (np.abs(values - whole) <= _WHOLE_NUMBER_TOLERANCE) & (np.abs(whole) < 2**31)


def map_labels(
    array: npt.NDArray[np.integer[Any]],
    table: Mapping[int, int],
    ignored: AbstractSet[int],
    path: Path,
    unknown: Literal["background", "error"] = "background",
) -> tuple[npt.NDArray[np.uint8], tuple[str, ...]]:
    """Class index of each voxel from its id in the file.

    Args:
        array: Ids, any shape.
        table: Id to class index, 0..254, or 255 for what nobody annotated. The id 0 is background unless the table says
            otherwise.
        ignored: Ids of known structures that become background without a warning.
        path: File, for messages.
        unknown: What becomes of any other id: ``background`` with a warning, or an ``error``.

    Returns:
        Class indices in the shape of the array, and warnings on unknown ids or a map without labels.

    Raises:
        ConfigError: The table names a class index beyond 0..255.
        DataError: An unknown id, if these are errors.
    """
    wrong = [index for index in table.values() if not 0 <= index <= 255]
    if wrong:
        raise ConfigError(f"the label table maps to class index {wrong[0]}; expected 0 to 255")
    known = {0: 0, **dict.fromkeys(ignored, 0), **table}
    flat = array.reshape(-1, order="A")
    low, high = (int(flat.min()), int(flat.max())) if flat.size else (0, 0)
    if high - low < _TABLE_LIMIT:
        ids = np.arange(low, high + 1)
        counts = np.zeros(ids.size, dtype=np.int64)
        for piece in _pieces(flat):
            counts += np.bincount(piece.astype(np.int64) - low, minlength=ids.size)
    else:
        ids, counts = np.unique(flat, return_counts=True)
    present = counts > 0
    unknown_ids = {int(i): int(n) for i, n in zip(ids[present], counts[present], strict=True) if int(i) not in known}
    notices = []
    if unknown_ids:
        message = _describe_unknown(unknown_ids, table, ignored)
        if unknown == "error":
            raise DataError(
                f"{path} holds {message}; correct the file, or name the id in --labels, in --ignore-labels if it is "
                "background, or in --not-annotated-labels if nobody annotated it"
            )
        notices.append(f"{path.name}: {message}; set to background")
    classes = np.array([known.get(int(i), 0) for i in ids], dtype=np.uint8)
    mapped = np.empty(flat.size, dtype=np.uint8)
    for piece, target in zip(_pieces(flat), _pieces(mapped), strict=True):
        target[:] = classes[piece.astype(np.int64) - low if high - low < _TABLE_LIMIT else np.searchsorted(ids, piece)]
    if not mapped.any():
        notices.append(f"{path.name}: no voxel belongs to any class")
    fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    return mapped.reshape(array.shape, order="F" if fortran else "C"), tuple(notices)


def check_segment_names(
    path: Path, segments: Mapping[int, str], classes: Sequence[str], table: Mapping[int, int]
) -> None:
    """Refuse a segmentation of 3D Slicer that calls another id by the name of a class: Slicer numbers them in order.

    Args:
        path: File, for messages.
        segments: Id -> name in the file.
        classes: Names by class index.
        table: Id -> class index that is meant.

    Raises:
        DataError: There is such an id.
    """
    index = {name.casefold(): number for number, name in enumerate(classes) if number}
    for value, name in sorted(segments.items()):
        wanted = index.get(name.casefold())
        if wanted is not None and table.get(value, 0) != wanted:
            ids = ", ".join(str(other) for other, number in sorted(table.items()) if number == wanted)
            raise DataError(
                f"{path} calls its label {value} {name!r}, but by the label table {name!r} is {ids}; give the segments "
                "of this file the label values of the table, or correct the table"
            )


def class_voxels(label: npt.NDArray[np.uint8], num_classes: int) -> npt.NDArray[np.int64]:
    """Number of voxels of each class index; longer than ``num_classes`` where the map has larger indices."""
    counts = [np.bincount(piece, minlength=num_classes) for piece in _pieces(label.ravel(order="K"))]
    total = np.zeros(max([num_classes, *map(len, counts)]), dtype=np.int64)
    for count in counts:
        total[: len(count)] += count
    return total


def _pieces(flat: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """Views of a few million elements: no temporary array is as large as a volume."""
    return (flat[start : start + _PIECE] for start in range(0, flat.size, _PIECE))


def _describe_unknown(unknown_ids: Mapping[int, int], table: Mapping[int, int], ignored: AbstractSet[int]) -> str:
    listed = ", ".join(f"{i} ({counted(n, 'voxel')})" for i, n in sorted(unknown_ids.items())[:_LISTED])
    more = f" and {len(unknown_ids) - _LISTED} more" if len(unknown_ids) > _LISTED else ""
    sentence = f"label ids that the label table does not know: {listed}{more}"
    for typo, meant in KNOWN_TYPOS.items():
        if typo in unknown_ids and (meant in table or meant in ignored):
            sentence += (
                f" ({typo} is known to be written by mistake for {meant}: to map it likewise, add {typo} to the table)"
            )
    return sentence
