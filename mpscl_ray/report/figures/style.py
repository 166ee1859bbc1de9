"""What all figures share: fonts, colours of structures and of runs, legends, and PNG and PDF files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from mpscl_ray.runs.atomic_files import write_atomically
from mpscl_ray.runs.palette import colour
from mpscl_ray.runs.plots import legend_handles

T = TypeVar("T")

DPI = 160
"""Default resolution of a figure, pixels per inch."""
GREY = "#666666"
ERROR = "#d40000"
"""Outlines errors on images; no structure has this red."""

_RUN_COLOURS = ("#1b1b1b", "#8c510a", "#5e3c99", "#1f78b4", "#e7298a", "#7f7f7f", "#33a02c", "#e6ab02")
_RUN_LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 3)))

_RC = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Picture:
    """A figure with its caption."""

    name: str
    """Of its files, without ending."""
    figure: Figure
    caption: str
    """What the figure shows, in whole sentences."""
    alt_text: str
    """Short description for readers who cannot see the figure."""
    image: bytes = b""
    """PNG; empty before :func:`save`."""


def house_style() -> AbstractContextManager[None]:
    """Fonts and lines of all figures that are made or saved inside the block."""
    return matplotlib.rc_context(_RC)  # type: ignore[arg-type]


def evenly_drawn(entries: Sequence[T]) -> list[T]:
    """At most five evenly spaced entries, among them the first and the last."""
    return [entries[index] for index in sorted(set(np.linspace(0, len(entries) - 1, 5).round().astype(int)))]


def run_style(number: int) -> dict[str, Any]:
    """Colour and dashes of the lines of the run with this number, from 0: either tells the runs apart."""
    return {"color": _RUN_COLOURS[number % len(_RUN_COLOURS)], "linestyle": _RUN_LINES[number % len(_RUN_LINES)]}


def class_colours(number: int) -> NDArray[np.uint8]:
    """(C, 3) RGB of the first classes."""
    return np.array([colour(index) for index in range(number)], dtype=np.uint8)


def class_legend(figure: Figure, classes: Sequence[str], truth: NDArray[np.uint8] | None = None) -> None:
    """Names and colours of the structures below a figure, and of what is not annotated in the truth."""
    handles = legend_handles(classes, [] if truth is None else [truth])
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8), handlelength=1.2)


def bare(axes: Axes) -> None:
    """Remove ticks and frame, for images."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def image_grid(
    rows: int, columns: int, tile: tuple[float, float], ratios: Sequence[float] | None = None
) -> tuple[Figure, NDArray[Any]]:
    """A figure of bare tiles, close together.

    ``tile`` is width and height in inches; ``ratios`` are the widths of the columns where they are not all 1.
    """
    figure = Figure(figsize=(tile[0] * sum(ratios or [1] * columns) + 0.4, tile[1] * rows + 0.7))
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.015, h_pad=0.015, wspace=0.015, hspace=0.015))
    axes: NDArray[Any] = figure.subplots(rows, columns, squeeze=False, width_ratios=ratios)
    for tile_axes in axes.flat:
        bare(tile_axes)
    return figure, axes


def wrapped(title: str) -> str:
    """A long title in two lines."""
    if len(title) <= 16 or " " not in title:
        return title
    middle = min((at for at, letter in enumerate(title) if letter == " "), key=lambda at: abs(at - len(title) / 2))
    return f"{title[:middle]}\n{title[middle + 1 :]}"


def png(figure: Figure, dpi: float = DPI) -> bytes:
    """A figure as PNG."""
    return _rendered(figure, format="png", dpi=dpi, metadata={"Software": None})


def save(picture: Picture, folder: Path, dpi: float, pdf: bool) -> bytes:
    """Write ``NAME.png`` and, if wanted, ``NAME.pdf``; returns the PNG. Raises StorageError."""
    image = png(picture.figure, dpi)
    write_atomically(folder / f"{picture.name}.png", image)
    if pdf:
        metadata = {"CreationDate": None, "Title": picture.name}
        content = _rendered(picture.figure, format="pdf", dpi=dpi, metadata=metadata)
        write_atomically(folder / f"{picture.name}.pdf", content)
    return image


def _rendered(figure: Figure, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with house_style():
        figure.savefig(buffer, **options)
    return buffer.getvalue()
