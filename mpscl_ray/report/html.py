"""The report as one HTML page: with its images, volumes and scripts inside, without any other file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mpscl_ray import __version__
from mpscl_ray.report.figures.style import Picture
from mpscl_ray.report.viewer import CaseTable
from mpscl_ray.runs.html import render


@dataclass(frozen=True)
class Table:
    """A table of text cells."""

    header: Sequence[str]
    """Titles of the columns."""
    rows: Sequence[Sequence[str]]
    groups: Sequence[tuple[str, int]]
    """Title and number of columns of each cell of the line above the header."""
    caption: str
    """What the numbers are."""
    text_columns: frozenset[int] = frozenset({0})
    """Columns of words, which are aligned to the left."""


@dataclass
class Section:
    """A heading and its content, in this order."""

    title: str
    lead: str
    """Its subject, in a sentence or two."""
    tables: list[Table] = field(default_factory=list)
    figures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is missing and why, a sentence each."""
    cases: Sequence[CaseTable] = ()
    """Tables whose rows open a case in the viewer, which follows them."""
    curves: Sequence[tuple[str, Mapping[str, Any]]] = ()
    """Title and curves of each run, see :func:`mpscl_ray.runs.curves.curves`."""

    def add_figure(self, name: str, figure: Figure, caption: str, alt_text: str) -> None:
        """Add a :class:`Picture`."""
        self.figures.append(Picture(name, figure, caption, alt_text))


def page(
    title: str,
    summary: str,
    sections: Sequence[Section],
    structures: Sequence[tuple[str, str]],
    settings: Sequence[tuple[str, str]],
    viewer: Sequence[Mapping[str, Any]] = (),
    files: Iterable[tuple[str, bytes]] = (),
) -> str:
    """The whole page, from the template ``page.html``.

    Args:
        title: of the report.
        summary: a sentence or two below it.
        sections: in order.
        structures: name and colour of each structure, in display order.
        settings: name of each run and its settings as YAML.
        viewer: see :func:`mpscl_ray.report.viewer.viewer_data`.
        files: name and content of the volumes that it names.
    """
    return render(
        Path(__file__).parent / "page.html",
        title=title,
        summary=summary,
        sections=sections,
        structures=structures,
        settings=settings,
        viewer_cases=viewer,
        viewer_files=files,
        version=__version__,
    )
