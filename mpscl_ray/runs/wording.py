"""Numbers in sentences."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number and its noun: ``1 case``, ``2 cases``.

    Args:
        number: How many.
        noun: For one.
        plural: For several; by default with an ``s``.
    """
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
