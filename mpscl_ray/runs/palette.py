"""The colour of each class, the same in every figure and viewer."""

from __future__ import annotations

from mpscl_ray.runs.structures import NOT_ANNOTATED

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

_NOT_ANNOTATED_GREY = (128, 128, 128)


def colour(index: int) -> tuple[int, int, int]:
    """RGB of a class index; grey for ``NOT_ANNOTATED``."""
    if index == NOT_ANNOTATED:
        return _NOT_ANNOTATED_GREY
    return COLOURS[index] if index < len(COLOURS) else COLOURS[1 + (index - 1) % (len(COLOURS) - 1)]


def hex_colour(index: int) -> str:
    """Colour of a class index as ``#rrggbb``."""
    return "#{:02x}{:02x}{:02x}".format(*colour(index))
