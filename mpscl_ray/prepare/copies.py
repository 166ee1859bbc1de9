"""Finding one scan under several names.

It is also found if it was stored in another orientation, cropped, or retouched, or with other intensities of which each
is a linear function of the old one: another slope, offset or unit, a z-score, black for white.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

_CHOSEN = 20_000
"""Voxels of a volume whose surroundings are hashed, at least about so many."""
_KEPT = 256
_LEAST = 128
"""Distinct hashes that a volume needs to be recognised by."""
_LEVELS, _SHIFT = 10_000.0, 0.382
"""Steps from the lowest to the highest intensity; shifted, so that whole numbers are rarely at the border of two."""
_SAME_SHARE = 0.25
"""Shared part of two sketches, of one kind, from which they are of one scan; others share nearly nothing."""
_COMMON = 0.01
"""Part of the voxels from which a value counts as background."""
_SAMPLE = 100_000
_VALUES = 16
"""Least number of values whose voxels are chosen, for images of few values."""
_SLAB = 16
_NEIGHBOURS = ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))

Sketch = tuple[int, ...]


def sketch(image: NDArray[np.float32]) -> Sketch:
    """Hashes of local patterns that do not depend on the order, direction and extent of the array's axes.

    A voxel is chosen by the hash of its own value, so the same ones are chosen wherever they are stored. Its hash is
    that of its value and its six neighbours, in any order. The smallest hashes are kept: two volumes share as large a
    part of them as they share of their voxels. This is done for the intensities as they are, which a crop leaves alone,
    and for their levels between lowest and highest, which a linear function leaves alone.

    Returns:
        Distinct hashes; none for a volume with too few distinct patterns, which tell nothing.
    """
    if min(image.shape) < 3:
        return ()
    image = image.transpose(np.argsort(image.strides)[::-1])  # contiguous: the order of the axes does not matter
    low, high = float(image.min()), float(image.max())
    if low == high:
        return ()
    if float(image.mean(dtype=np.float64)) > 0.5 * (low + high):
        low, high = high, low  # black for white

    def levels(part: NDArray[np.float32]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = (part - np.float32(low)) * np.float32(_LEVELS / (high - low)) + np.float32(_SHIFT)
        np.floor(found, out=found)
        return found

    return tuple(dict.fromkeys([*_hashes(image, lambda part: part), *_hashes(image, levels)]))


def _hashes(image: NDArray[np.float32], values_of: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> Sketch:
    """Sorted hashes of the patterns of some function of the intensities."""
    sample = values_of(image.ravel()[:: image.size // _SAMPLE + 1])
    values, counts = np.unique(sample + np.float32(0), return_counts=True)
    values = values[counts <= max(1, _COMMON * sample.size)]  # background tells nothing
    if not values.size:
        return ()
    choice = np.sort(_choice(values))
    limit = max(int(choice[min(_VALUES, choice.size) - 1]), int(2**32 * min(1.0, _CHOSEN / image.size)) - 1)
    parts = []
    for start in range(1, image.shape[0] - 1, _SLAB):
        slab = values_of(image[start - 1 : min(start + _SLAB, image.shape[0] - 1) + 1])
        x, y, z = np.nonzero(_choice(slab[1:-1, 1:-1, 1:-1]) <= np.uint32(limit))
        x, y, z = x + 1, y + 1, z + 1
        own = slab[x, y, z]
        around = np.zeros(x.size, dtype=np.uint64)
        for dx, dy, dz in _NEIGHBOURS:
            around += _mix(slab[x + dx, y + dy, z + dz])
        constant = around == _mix(own) * np.uint64(len(_NEIGHBOURS))
        parts.append(np.unique(_scramble(_mix(own) * np.uint64(3) + around)[~constant])[:_KEPT])
    found = np.unique(np.concatenate(parts))
    return tuple(int(value) for value in found[:_KEPT]) if found.size >= _LEAST else ()


def _choice(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """A cheap hash of each intensity that decides whether the voxel is chosen; -0.0 counts as 0.0."""
    return (values + np.float32(0)).view(np.uint32) * np.uint32(0x9E3779B1)


def _mix(values: NDArray[np.float32]) -> NDArray[np.uint64]:
    """A hash of each intensity; -0.0 counts as 0.0."""
    bits = np.ascontiguousarray(values + np.float32(0)).view(np.uint32)
    return _scramble(bits.astype(np.uint64))


def _scramble(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # The finaliser of SplitMix64.
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def same_scans(sketches: Sequence[Sketch]) -> list[int]:
    """For each sketch the number of the first one of the same scan, its own if there is none before."""
    first = list(range(len(sketches)))
    holders: dict[int, list[int]] = {}
    for number, hashes in enumerate(sketches):
        shared: dict[int, int] = {}
        for value in hashes:
            for other in holders.get(value, ()):
                shared[other] = shared.get(other, 0) + 1
            holders.setdefault(value, []).append(number)
        original = _best(shared, sketches, number)
        if original is not None:
            first[number] = first[original]
    return first


def _best(shared: Mapping[int, int], sketches: Sequence[Sketch], number: int) -> int | None:
    """The other sketch that shares the largest part, if that is enough: intensities or levels, half of it each."""
    parts = {other: 2 * count / min(len(sketches[other]), len(sketches[number])) for other, count in shared.items()}
    best = max(parts, key=lambda other: parts[other], default=None)
    return best if best is not None and parts[best] >= _SAME_SHARE else None
