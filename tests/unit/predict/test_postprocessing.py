"""Rules for the parts and holes of each structure of a label map."""

from __future__ import annotations

import numpy as np
import pytest

from mpscl_ray.errors import ConfigError
from mpscl_ray.predict.postprocessing import (
    Postprocessing,
    Rule,
    check_choice,
    largest_component,
    largest_component_of_each,
)

CLASSES = ("background", "LV", "RV", "AA")


def parts() -> np.ndarray:
    """LV in parts of 27, 8 and 1 voxels, the last at a corner of the first; AA in one part of 12."""
    labels = np.zeros((6, 8, 8), np.uint8)
    labels[0:3, 0:3, 0:3] = 1
    labels[4:6, 6:8, 6:8] = 1
    labels[3, 3, 3] = 1
    labels[3:6, 0:2, 0:2] = 3
    return labels


def shell() -> np.ndarray:
    """LV as a closed shell around a cavity of 2 x 3 x 3 voxels, one of which is RV."""
    labels = np.zeros((6, 8, 8), np.uint8)
    labels[1:5, 1:6, 1:6] = 1
    labels[2:4, 2:5, 2:5] = 0
    labels[2, 3, 3] = 2
    return labels


def test_the_largest_part_of_each_structure_is_kept() -> None:
    labels = parts()
    kept = largest_component_of_each(CLASSES)(labels, CLASSES, None)
    assert np.array_equal(np.unique(kept, return_counts=True)[1], [6 * 64 - 27 - 12, 27, 12])
    assert (kept[0:3, 0:3, 0:3] == 1).all()
    assert np.count_nonzero(labels == 1) == 36, "the argument is not changed"
    assert not largest_component(np.zeros((2, 2, 2), bool)).any()


@pytest.mark.parametrize(("min_ml", "voxels"), [(0.0, 36), (0.5, 36), (0.51, 35), (4.0, 35), (4.1, 27), (14.0, 0)])
def test_parts_below_a_size_are_removed(min_ml: float, voxels: int) -> None:
    done = Postprocessing({"LV": Rule(min_ml=min_ml)})(parts(), CLASSES, 0.5)
    assert np.count_nonzero(done == 1) == voxels
    assert np.count_nonzero(done == 3) == 12


def test_sizes_in_ml_say_nothing_where_voxels_have_no_size() -> None:
    assert np.array_equal(Postprocessing({"LV": Rule(min_ml=100)})(parts(), CLASSES, None), parts())


def test_only_background_that_a_structure_encloses_is_filled() -> None:
    filled = Postprocessing({"LV": Rule(fill_holes=True)})(shell(), CLASSES, None)
    assert np.count_nonzero(filled == 1) == 100 - 1
    assert np.count_nonzero(filled == 2) == 1
    opened = shell()
    opened[2, 3, 1] = 0
    assert np.array_equal(Postprocessing({"LV": Rule(fill_holes=True)})(opened, CLASSES, None), opened)
    assert np.array_equal(Postprocessing({"RV": Rule(fill_holes=True)})(shell(), CLASSES, None), shell())


def test_parts_are_removed_before_holes_are_filled() -> None:
    labels = shell()
    rules = Postprocessing({"LV": Rule(fill_holes=True), "RV": Rule(min_ml=1.5)})
    assert np.count_nonzero(rules(labels, CLASSES, 1.0) == 1) == 100
    assert rules(labels, CLASSES, 1.0)[2, 3, 3] == 1


def test_rules_are_plain_values_and_say_what_they_do() -> None:
    rules = Postprocessing({"LV": Rule(True, fill_holes=True), "RV": Rule(), "AA": Rule(min_ml=0.5)}, "oracle")
    assert rules.to_json() == {"LV": {"largest_component": True, "fill_holes": True}, "AA": {"min_ml": 0.5}}
    again = Postprocessing.from_json(rules.to_json(), "oracle")
    assert again.to_json() == rules.to_json()
    assert again.oracle
    assert str(again) == "LV: largest component, holes filled; AA: parts of at least 0.5 ml"
    assert not Postprocessing({"LV": Rule()})
    assert str(Postprocessing()) == "none"


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ({"LV": {"largest": True}}, "the rule of LV has 'largest'"),
        ({"LV": {"min_ml": -1}}, "min_ml is -1"),
        ({"LV": {"min_ml": "nan"}}, "min_ml is nan"),
    ],
)
def test_other_rules_are_refused(rules: dict[str, dict[str, object]], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Postprocessing.from_json(rules)
    with pytest.raises(ConfigError, match="postprocessing is 'best'; expected 'chosen', 'none', 'largest_component'"):
        check_choice("best")
