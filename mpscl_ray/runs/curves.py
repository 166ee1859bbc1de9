"""The curves of a training as plain values, which ``curves.js`` draws in a page with uPlot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mpscl_ray.runs.palette import COLOURS, hex_colour
from mpscl_ray.runs.structures import display_order

MOST_POINTS = 1000
"""Of a curve; of longer trainings evenly spaced records are kept, and all that have a validation."""

_PANELS = (
    (
        "validation Dice of the target (labels for these curves only) and of the source",
        "val/dice/",
        "val/source/dice/mean",
    ),
    ("validation criteria without labels of the target", "val/unsupervised/", "val/entropy", "val/source/entropy"),
    ("training losses", "train/loss_"),
    (
        "shares of pixels: pseudo-labels, right guesses of discriminators",
        "train/pseudo_label_fraction",
        "train/contrast_fraction",
        "train/discriminator_accuracy_",
    ),
    ("learning rates", "train/learning_rate_"),
)
"""Title of each panel and the beginnings of its tags."""

_HEADS = ("val/unsupervised/", "val/", "train/loss_", "train/", "dice/")
_DASHES: tuple[list[int], ...] = ([], [8, 4], [2, 3], [10, 3, 2, 3])

Record = Mapping[str, Any]


def curves(records: Sequence[Record], classes: Sequence[str] = ()) -> dict[str, Any]:
    """Panels with curves over the iterations of a run; a panel that would be empty is left out.

    Args:
        records: of metrics.jsonl, in order.
        classes: names, background first; the curves of structures have their colours.

    Returns:
        ``steps``, ``phases`` (where each starts, and its name) and ``panels``: each with a title and its curves, whose
        values are null where a record has none.
    """
    kept = _thinned(records)
    phases: list[dict[str, Any]] = []
    before = 0
    for record in records:
        if not phases or phases[-1]["name"] != record.get("phase"):
            phases.append({"start": before, "name": record.get("phase")})
        before = record["global_step"]
    tags = list(dict.fromkeys(tag for record in kept for tag in record if "/" in tag))
    panels = []
    for title, *beginnings in _PANELS:
        # In the order of their first record: a curve that comes later changes no colour.
        chosen = [tag for beginning in beginnings for tag in tags if tag.startswith(beginning)]
        own = [_curve(tag, number, kept, classes) for number, tag in enumerate(_in_order(chosen))]
        own = [curve for curve in own if any(value is not None for value in curve["values"])]
        if own:
            panels.append({"title": title, "curves": own})
    return {"steps": [record["global_step"] for record in kept], "phases": phases, "panels": panels}


def steps_and_curves(title: str, found: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    """One panel with a curve for each name, from its values by iteration; as :func:`curves`."""
    steps = sorted({step for values in found.values() for step in values})
    own = [
        {
            "name": name,
            "colour": hex_colour(1 + number % (len(COLOURS) - 2)),
            "width": 1.5,
            "dash": _DASHES[number // (len(COLOURS) - 2) % len(_DASHES)],
            "values": [_number(values.get(step)) for step in steps],
        }
        for number, (name, values) in enumerate(found.items())
    ]
    return {"steps": steps, "phases": [], "panels": [{"title": title, "curves": own}] if own else []}


def _thinned(records: Sequence[Record]) -> list[Record]:
    stride = math.ceil(len(records) / MOST_POINTS)
    return [
        record
        for number, record in enumerate(records)
        if number % stride == 0 or number == len(records) - 1 or any(tag.startswith("val/") for tag in record)
    ]


def _in_order(tags: Sequence[str]) -> list[str]:
    """Structures as in tables, and their mean after them."""
    own = [tag.removeprefix("val/dice/") for tag in tags if tag.startswith("val/dice/") and tag != "val/dice/mean"]
    first = [f"val/dice/{name}" for name in display_order(own)]
    return first + [tag for tag in tags if tag not in first]


def _curve(tag: str, number: int, records: Sequence[Record], classes: Sequence[str]) -> dict[str, Any]:
    name = tag
    for head in _HEADS:
        name = name.removeprefix(head)
    structure = tag.removeprefix("val/dice/")
    colour, width = hex_colour(1 + number % (len(COLOURS) - 2)), 1.5  # without yellow, too pale on white
    if tag == "val/dice/mean":
        name, colour, width = "mean", "#000000", 2.5
    elif structure in classes:
        colour = hex_colour(classes.index(structure))
    dash = _DASHES[number // (len(COLOURS) - 2) % len(_DASHES)]
    if tag.startswith("val/source/"):
        colour, dash = "#777777", _DASHES[1]
    return {
        "name": name.replace("/dice/", " ").replace("/", " ").replace("_", " "),
        "colour": colour,
        "width": width,
        "dash": dash,
        "values": [_number(record.get(tag)) for record in records],
    }


def _number(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")
