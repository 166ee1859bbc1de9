"""The colour of each class and the order of structures, the same in every table, figure and viewer."""

from __future__ import annotations

from collections.abc import Sequence

PAPER_ORDER = ("AA", "LAC", "LVC", "MYO")
"""Columns of Table III in Liu et al. 2022."""

COLOURS: tuple[tuple[int, int, int], ...] = (
    (0, 0, 0),
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (204, 121, 167),
    (0, 114, 178),
    (213, 94, 0),
    (240, 228, 66),
)
"""RGB of each class index, background first: the palette of Okabe and Ito, distinct with any colour vision.

Further classes repeat the colours after the background."""


def colour(index: int) -> tuple[int, int, int]:
    """RGB of a class index."""
    return COLOURS[index] if index < len(COLOURS) else COLOURS[1 + (index - 1) % (len(COLOURS) - 1)]


def hex_colour(index: int) -> str:
    """Colour of a class index as ``#rrggbb``."""
    return "#{:02x}{:02x}{:02x}".format(*colour(index))


def display_order(structures: Sequence[str]) -> tuple[str, ...]:
    """Structures (names without the background) in the order of tables, legends and panels.

    This is the paper's order if all four structures of the paper are there, others after them; else the given order.
    """
    if not set(PAPER_ORDER) <= set(structures):
        return tuple(structures)
    return (*PAPER_ORDER, *(name for name in structures if name not in PAPER_ORDER))


def display_indices(classes: Sequence[str]) -> list[int]:
    """Class indices of the structures in :func:`display_order`; ``classes`` are names, background first."""
    return [classes.index(name) for name in display_order(classes[1:])]
