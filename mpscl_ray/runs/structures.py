"""What all parts agree on about label values: the order of structures, and the value of what nobody annotated."""

from __future__ import annotations

from collections.abc import Sequence

NOT_ANNOTATED = 255
"""Prepared label value of a voxel that nobody annotated: it is of no class, and counts in no loss and no score."""

PAPER_ORDER = ("AA", "LAC", "LVC", "MYO")
"""Columns of Table III in Liu et al. 2022."""


def display_order(structures: Sequence[str]) -> tuple[str, ...]:
    """Structures in the order of tables, legends and panels; class indices are not changed by it.

    Args:
        structures: names without the background, in the order of their class indices.

    Returns:
        The paper's order if all four structures of the paper are there, others after them; else as they come.
    """
    if not set(PAPER_ORDER) <= set(structures):
        return tuple(structures)
    return (*PAPER_ORDER, *(name for name in structures if name not in PAPER_ORDER))


def display_indices(classes: Sequence[str]) -> list[int]:
    """Class indices of the structures in :func:`display_order`; ``classes`` are names, background first."""
    return [classes.index(name) for name in display_order(classes[1:])]
