"""Curves as plain values: their order, names and colours, what has no value, and how long trainings are thinned."""

from __future__ import annotations

import json
import math
from typing import Any

from mpscl_ray.runs.curves import MOST_POINTS, curves, steps_and_curves
from mpscl_ray.runs.palette import hex_colour

CLASSES = ("background", "MYO", "LAC", "LVC", "AA")


def record(step: int, phase: str = "source_only", **values: float) -> dict[str, Any]:
    tags = {name.replace("__", "/"): value for name, value in values.items()}
    return {"global_step": step, "phase": phase, "iteration": step, "iterations": 100, **tags}


def test_structures_have_their_colours_and_the_order_of_tables() -> None:
    dice = {f"val__dice__{name}": 0.5 for name in (*CLASSES[1:], "mean")}
    found = curves([record(10, **dice, val__source__dice__mean=0.75)], CLASSES)
    (panel,) = found["panels"]
    assert [curve["name"] for curve in panel["curves"]] == ["AA", "LAC", "LVC", "MYO", "mean", "source mean"]
    assert [curve["colour"] for curve in panel["curves"][:4]] == [hex_colour(index) for index in (4, 2, 3, 1)]
    assert panel["curves"][5]["values"] == [0.75]


def test_what_was_not_measured_is_null_and_phases_begin_where_the_one_before_ended() -> None:
    records = [
        record(10, train__loss_segmentation=1.0),
        record(20, train__loss_segmentation=math.nan),
        record(30, "warm_up", train__loss_segmentation=0.123456789, train__loss_adversarial=2.0),
    ]
    found = curves(records)
    assert found["steps"] == [10, 20, 30]
    assert found["phases"] == [{"start": 0, "name": "source_only"}, {"start": 20, "name": "warm_up"}]
    (panel,) = found["panels"]
    values = {curve["name"]: curve["values"] for curve in panel["curves"]}
    assert values == {"segmentation": [1.0, None, 0.12346], "adversarial": [None, None, 2.0]}
    json.dumps(found, allow_nan=False)


def test_of_a_long_training_every_validation_is_kept() -> None:
    records = [record(step, train__loss_segmentation=1.0) for step in range(10 * MOST_POINTS)]
    for at in (7, 4321):
        records[at]["val/entropy"] = 0.5
    found = curves(records)
    assert {7, 4321, 10 * MOST_POINTS - 1} <= set(found["steps"])
    assert MOST_POINTS <= len(found["steps"]) <= MOST_POINTS + 3


def test_without_records_there_is_no_panel() -> None:
    assert curves([])["panels"] == []
    assert steps_and_curves("score", {})["panels"] == []


def test_curves_with_different_steps_share_an_axis() -> None:
    found = steps_and_curves("score", {"001": {10: 0.5, 20: 0.75}, "002": {10: 0.25}})
    assert found["steps"] == [10, 20]
    assert [curve["values"] for curve in found["panels"][0]["curves"]] == [[0.5, 0.75], [0.25, None]]
