"""Which cases are unlike the others of their modality, and in what: no label map is compared with any prediction.

Each case is compared with the median of all cases, and the distance is told in units of their usual spread (1.4826
times the median distance from the median, or a floor where all cases are alike). Distances from 3.5 on are reasons. The
score of a case is the sum of its reasons, each at most 20, plus 1 for each kind of notice that few other cases have.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpscl_ray.prepare.checks import notice_kind
from mpscl_ray.prepare.pictures.album import PicturedCase, product, short

FEWEST = 4
"""Cases from which there is something to compare with."""

_NOTABLE = 3.5
_MOST = 20.0
_COMPARED = (5, 25, 50, 75, 95)
_LEVEL_FLOOR, _SHAPE_FLOOR, _LOOK_FLOOR = 0.1, 0.15, 0.1
_VOXEL_FLOOR, _EXTENT_FLOOR, _VOLUME_FLOOR = np.log([1.1, 1.25, 1.35])
_FIXED = 10.0
"""Distance of a case that has none of a structure, or fits better turned."""
_TURN_GAIN = 0.15
"""How much more like the others a turned case has to be; it has to close half the gap to them as well."""
_RARE, _MAJORITY = 0.2, 0.6

Floats = NDArray[np.float64]
Found = tuple[int, float, str]
"""Number of a case, its distance, and the reason in words."""


@dataclass(frozen=True)
class Oddness:
    """How much a case is unlike the others."""

    score: float
    reasons: tuple[str, ...]
    """Whole phrases, the strongest first."""


def oddness(cases: Sequence[PicturedCase], classes: Sequence[str]) -> list[Oddness]:
    """The oddness of each case among those of one modality; 0 for all if they are too few to compare."""
    found: dict[int, list[tuple[float, str]]] = {number: [] for number in range(len(cases))}
    if len(cases) >= FEWEST:
        for part in (_levels, _shapes, _voxels, _extents, _looks, _letters):
            for number, distance, reason in part(cases):
                found[number].append((min(distance, _MOST), reason))
        for number, distance, reason in _structures(cases, classes):
            found[number].append((min(distance, _MOST), reason))
    kinds = [{notice_kind(notice) for notice in case.notices} for case in cases]
    common = Counter(itertools.chain.from_iterable(kinds))
    for number, own in enumerate(kinds):
        if rare := [kind for kind in own if common[kind] <= max(1, _RARE * len(cases))]:
            said = "a notice" if len(rare) == 1 else f"{len(rare)} notices"
            found[number].append((float(len(rare)), f"{said} that few other cases have (below)"))
    ordered = [sorted(found[number], key=lambda one: -one[0]) for number in range(len(cases))]
    return [Oddness(sum(points for points, _ in one), tuple(reason for _, reason in one)) for one in ordered]


def usual_quantiles(cases: Sequence[PicturedCase]) -> Floats:
    """(101,) intensities of the typical case: the median of each percentile."""
    return np.median([case.picture.quantiles for case in cases], axis=0).astype(np.float64)


def _distances(values: Floats, floor: float) -> Floats:
    """Distance of each row from the median row, column by column, in units of the usual spread; NaN where unknown."""
    away = np.abs(values - np.nanmedian(values, axis=0))
    return away / np.maximum(1.4826 * np.nanmedian(away, axis=0), floor)


def _notable(distances: Floats, say: Callable[[int], str]) -> Iterator[Found]:
    for number in np.flatnonzero(distances >= _NOTABLE):
        yield int(number), float(distances[number]), say(int(number))


def _compared(cases: Sequence[PicturedCase]) -> Floats:
    return np.array([case.picture.quantiles[list(_COMPARED)] for case in cases], dtype=np.float64)


def _levels(cases: Sequence[PicturedCase]) -> Iterator[Found]:
    values = _compared(cases)
    usual = np.median(values, axis=0)
    distances = _distances(values, _LEVEL_FLOOR * float(np.median(values[:, -1] - values[:, 0]))).mean(axis=1)

    def say(number: int) -> str:
        low, high = values[number, [0, -1]]
        return f"intensities from {short(low)} to {short(high)}, usually {short(usual[0])} to {short(usual[-1])}"

    return _notable(distances, say)


def _shapes(cases: Sequence[PicturedCase]) -> Iterator[Found]:
    values = np.array([case.picture.quantiles for case in cases], dtype=np.float64)
    values -= values.mean(axis=1, keepdims=True)
    values /= np.maximum(values.std(axis=1, keepdims=True), 1e-12)
    distances = _distances(values[:, list(_COMPARED)], _SHAPE_FLOOR).mean(axis=1)
    return _notable(distances, lambda number: "a histogram of another shape than that of the others")


def _voxels(cases: Sequence[PicturedCase]) -> Iterator[Found]:
    known = [number for number, case in enumerate(cases) if case.picture.voxel_mm]
    if len(known) < FEWEST:
        return iter(())
    values = np.array([cases[number].picture.voxel_mm for number in known], dtype=np.float64)
    usual = np.median(values, axis=0)
    found = _notable(
        _distances(np.log(values), _VOXEL_FLOOR).max(axis=1),
        lambda row: f"voxels of {product(values[row])} mm (slice, row, column), usually {product(usual)} mm",
    )
    return ((known[row], distance, reason) for row, distance, reason in found)


def _extents(cases: Sequence[PicturedCase]) -> Iterator[Found]:
    values = np.array([case.picture.extent for case in cases], dtype=np.float64)
    unit = " mm" if all(case.picture.voxel_mm for case in cases) else ""
    usual = np.median(values, axis=0)
    return _notable(
        _distances(np.log(values), _EXTENT_FLOOR).max(axis=1),
        lambda number: f"an image of {product(values[number])}{unit}, usually {product(usual)}{unit}",
    )


def _structures(cases: Sequence[PicturedCase], classes: Sequence[str]) -> Iterator[Found]:
    """Structures that are much larger or smaller than usual, or absent."""
    labelled = [number for number, case in enumerate(cases) if case.class_voxels is not None]
    if len(labelled) < FEWEST:
        return
    volumes = np.array([cases[number].volumes for number in labelled], dtype=np.float64)
    unit = "ml" if all(cases[number].spacing_mm for number in labelled) else "voxels"
    for index, name in enumerate(classes[1:], start=1):
        own = volumes[:, index]
        usual = float(np.median(own))
        if usual == 0:
            continue
        for row in np.flatnonzero(own == 0):
            yield labelled[row], _FIXED, f"no {name}"
        with np.errstate(divide="ignore"):
            distances = _distances(np.where(own > 0, np.log(own), np.nan)[:, None], _VOLUME_FLOOR)[:, 0]
        for row in np.flatnonzero(distances >= _NOTABLE):
            yield labelled[row], float(distances[row]), f"{name} of {short(own[row])} {unit}, usually {short(usual)}"


def _letters(cases: Sequence[PicturedCase]) -> Iterator[Found]:
    """Cases stored in another orientation, where most are stored in one."""
    counts = Counter(case.picture.letters for case in cases)
    usual, number_usual = counts.most_common(1)[0]
    if number_usual < _MAJORITY * len(cases):
        return
    for number, case in enumerate(cases):
        if counts[case.picture.letters] <= max(1, _RARE * len(cases)) and usual and case.picture.letters:
            yield number, _NOTABLE, f"stored as {case.picture.letters}, most others as {usual}"


def _looks(cases: Sequence[PicturedCase]) -> Iterator[Found]:
    """Cases that look unlike the typical one, place by place, or look more like it when they are turned."""
    cubes = np.array([_standardised(case.picture.coarse) for case in cases])
    typical = _standardised(np.median(cubes, axis=0))
    alike = np.array([float((cube * typical).mean()) for cube in cubes])
    usual = float(np.median(alike))
    distances = _distances(alike[:, None], _LOOK_FLOOR)[:, 0] * (alike < usual)
    for number, cube in enumerate(cubes):
        turned = max(float((other * typical).mean()) for other in _turned(cube))
        words = f"looks unlike the others (correlation with the typical case {alike[number]:.2f}, usually {usual:.2f})"
        if turned > alike[number] + _TURN_GAIN and 2 * turned > alike[number] + usual:
            words += f"; turned or mirrored it would fit better ({turned:.2f}): check the orientation in its header"
            yield number, max(_FIXED, float(distances[number])), words
        elif distances[number] >= _NOTABLE:
            yield number, float(distances[number]), words


def _standardised(cube: NDArray[np.floating]) -> Floats:
    centred: Floats = cube.astype(np.float64) - cube.mean()
    return centred / max(float(centred.std()), 1e-12)


def _turned(cube: Floats) -> Iterator[Floats]:
    """The cube in all other orientations."""
    for order in itertools.permutations(range(3)):
        for senses in itertools.product((1, -1), repeat=3):
            if order != (0, 1, 2) or senses != (1, 1, 1):
                yield cube.transpose(order)[tuple(slice(None, None, sense) for sense in senses)]
