"""The page of pictures: one HTML file with its images inside, without scripts and external files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpscl_ray import __version__
from mpscl_ray.data import SPLITS
from mpscl_ray.prepare.pictures.album import Album, PicturedCase, product, short
from mpscl_ray.prepare.pictures.outliers import FEWEST, Oddness, oddness, usual_quantiles
from mpscl_ray.prepare.pictures.tiles import BOX, HATCH
from mpscl_ray.runs.html import render
from mpscl_ray.runs.palette import hex_colour
from mpscl_ray.runs.structures import display_indices

PICTURES = "pictures.html"
"""Name of the page in the folder of a dataset."""

_MOST_CASES = 200
_BINS = 48
_CHART = (240, 100)
"""Width and height of a histogram, in its own units."""


@dataclass(frozen=True)
class _Chart:
    """A histogram as the points of polygons."""

    own: str
    usual: str
    low: str
    high: str


def page(albums: Sequence[Album], title: str) -> str:
    """The whole page.

    Args:
        albums: cases by modality.
        title: of the page.
    """
    return render(
        Path(__file__).parent / "page.html",
        title=title,
        albums=[_shown(album) for album in albums],
        fewest=FEWEST,
        box="#{:02x}{:02x}{:02x}".format(*BOX),
        hatch="#{:02x}{:02x}{:02x}".format(*HATCH),
        chart=_CHART,
        version=__version__,
    )


def _shown(album: Album) -> dict[str, object]:
    """Everything the template says of an album."""
    found = oddness(album.cases, album.classes)
    ranked = sorted(range(len(album.cases)), key=lambda number: (-found[number].score, *_place(album.cases[number])))
    chosen = _chosen(ranked, found)
    usual = usual_quantiles(album.cases) if album.cases else np.zeros(101)
    return {
        "title": album.title,
        "structures": [(album.classes[index], hex_colour(index)) for index in display_indices(album.classes or ("",))],
        "counts": [_count(split, album.cases) for split in dict.fromkeys(case.split for case in album.cases)],
        "findings": album.findings,
        "odd": [(_about(album, number), found[number]) for number in chosen if found[number].score > 0],
        "cases": [(_about(album, number), found[number], _chart(album.cases[number], usual)) for number in chosen],
        "total": len(album.cases),
    }


def _place(case: PicturedCase) -> tuple[int, str]:
    return SPLITS.index(case.split) if case.split in SPLITS else len(SPLITS), case.id


def _chosen(ranked: Sequence[int], found: Sequence[Oddness]) -> list[int]:
    """All cases; of many the most unusual ones, and an even sample of the rest."""
    if len(ranked) <= _MOST_CASES:
        return list(ranked)
    odd = [number for number in ranked if found[number].score > 0][: _MOST_CASES // 2]
    rest = ranked[len(odd) :]
    sample = np.linspace(0, len(rest) - 1, _MOST_CASES - len(odd)).round().astype(int)
    return odd + [rest[at] for at in sample]


def _count(split: str, cases: Sequence[PicturedCase]) -> list[str]:
    own = [case for case in cases if case.split == split]
    numbers = (
        len({case.patient for case in own}),
        len(own),
        sum(case.class_voxels is not None for case in own),
        sum(case.shape[0] for case in own),
    )
    return [split, *map(str, numbers)]


def _about(album: Album, number: int) -> dict[str, object]:
    """A case as the template shows it, its facts in words."""
    case = album.cases[number]
    picture = case.picture
    facts = [("prepared", f"{product(case.shape)} voxels{_of_mm(case.spacing_mm)} (slice, row, column)")]
    if picture.voxel_mm is not None:
        counts = [round(length / mm) for length, mm in zip(picture.extent, picture.voxel_mm, strict=True)]
        facts.append(("image", f"{product(counts)} voxels{_of_mm(picture.voxel_mm)}, stored as {picture.letters}"))
    if case.class_voxels is None:
        facts.append(("structures", "no labels"))
    elif album.classes:
        unit = "ml" if case.spacing_mm else "voxels"
        sizes = [f"{album.classes[at]} {short(case.volumes[at])}" for at in display_indices(album.classes)]
        facts.append((f"structures, {unit}", ", ".join(sizes)))
    return {"case": case, "facts": facts, "notices": case.notices, "tiles": picture.tiles, "anchor": f"case{number}"}


def _of_mm(spacing_mm: tuple[float, float, float] | None) -> str:
    return "" if spacing_mm is None else f" of {product(spacing_mm)} mm"


# --------------------------------------------------------------------------------------------------- histograms


def _chart(case: PicturedCase, usual: NDArray[np.float64]) -> _Chart:
    """Histogram of a case over that of the typical case, on one axis and scale."""
    own = case.picture.quantiles.astype(np.float64)
    low, high = min(own[1], usual[1]), max(own[99], usual[99])
    edges = np.linspace(low, max(high, low + 1e-6), _BINS + 1)
    shares = [_shares(quantiles, edges) for quantiles in (own, usual)]
    # The height of a lone peak, such as air, would flatten everything else.
    top = max(float(np.sort(share)[-3]) for share in shares) * 1.15 or 1.0
    lines = [_points(share / top) for share in shares]
    return _Chart(lines[0], lines[1], short(low), short(high))


def _shares(quantiles: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Part of the voxels between neighbouring edges, from the percentiles of all."""
    step = (edges[-1] - edges[0]) * 1e-6
    rising = quantiles + step * np.arange(len(quantiles)) / len(quantiles)
    return np.diff(np.interp(edges, rising, np.linspace(0, 1, len(quantiles))))


def _points(heights: NDArray[np.float64]) -> str:
    """A stepped outline that begins and ends on the ground."""
    width, height = _CHART
    tops = np.repeat(height * (1 - np.minimum(heights, 1.0)), 2)
    sides = np.repeat(np.linspace(0, width, len(heights) + 1), 2)[1:-1]
    outline = [f"{x:g},{y:.0f}" for x, y in zip(sides, tops, strict=True)]
    return " ".join([f"0,{height}", *outline, f"{width},{height}"])
