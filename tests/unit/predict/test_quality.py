"""Features of a segmentation without its label, and the estimate that a calibration makes of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mpscl_ray.predict.quality import FITTED, Calibration, Reference, SliceMaps, assess, touching_pairs

CLASSES = ("background", "LV", "RV")
WEIGHTS = {"expected_dice": 0.5, "confidence": 0.25, "largest_part": 0.25}


def maps(labels: np.ndarray, confidence: float, disagreement: float | None = None) -> SliceMaps:
    """The network's probabilities: that of the label everywhere the same, the rest spread evenly."""
    probabilities = np.full((3, *labels.shape), (1 - confidence) / 2, np.float32)
    np.put_along_axis(probabilities, labels[None].astype(np.intp), confidence, axis=0)
    spread = None if disagreement is None else np.full(labels.shape, disagreement, np.float32)
    return SliceMaps.of(probabilities, spread)


def hearts() -> np.ndarray:
    """Both structures, 64 pixels and 16: RV in parts of 12 and 4."""
    labels = np.zeros((2, 20, 20), np.uint8)
    labels[0, 2:10, 2:10] = 1
    labels[1, 4:8, 12:15] = 2
    labels[1, 15:17, 15:17] = 2
    return labels


def test_features_of_a_made_label_map() -> None:
    labels = hearts()
    reference = Reference.of([labels], 3)
    found = assess(maps(labels, 0.8, 0.25), CLASSES, [Calibration(0.0, WEIGHTS, reference)])
    mass = [64 * 0.8 + 736 * 0.1, 16 * 0.8 + 784 * 0.1]
    dice = [2 * 64 * 0.8 / (64 + mass[0]), 2 * 16 * 0.8 / (16 + mass[1])]
    assert found.structures["LV"] == pytest.approx(
        {"expected_dice": dice[0], "parts": 1, "largest_part": 1.0, "log_ratio": 0.0}
    )
    assert found.structures["RV"] == pytest.approx(
        {"expected_dice": dice[1], "parts": 2, "largest_part": 0.75, "log_ratio": 0.0}
    )
    assert found.features == pytest.approx(
        {
            "expected_dice": np.mean(dice),
            "confidence": 0.8,
            "largest_part": 0.875,
            "disagreement": 0.25,
            "ratios": 0.0,
            "adjacency": 0.0,
        },
        abs=1e-6,
    )
    assert found.estimate == pytest.approx(0.5 * np.mean(dice) + 0.25 * 0.8 + 0.25 * 0.875)
    assert (found.reason, found.missing, found.rank) == (None, [], found.estimate)


def test_confidence_is_that_of_the_structures_and_their_border() -> None:
    """Far from the structures the network may be as unsure as it likes."""
    labels = np.zeros((1, 20, 20), np.uint8)
    labels[0, 5:8, 5:8] = 1
    sure = np.zeros((1, 20, 20), np.float32)
    sure[0, 3:10, 3:10] = 0.6
    sure[0, 5:8, 5:8] = 0.9
    found = assess(SliceMaps(labels, sure, np.zeros(3)), CLASSES, ())
    assert found.features["confidence"] == pytest.approx((9 * 0.9 + 40 * 0.6) / 49)


def test_a_missing_structure_is_named_and_counts_as_nothing() -> None:
    reference = Reference.of([hearts()], 3)
    labels = np.where(hearts() == 2, 0, hearts()).astype(np.uint8)
    found = assess(maps(labels, 1.0), CLASSES, [Calibration(0.0, WEIGHTS, reference)])
    assert found.missing == ["RV"]
    assert (found.features["expected_dice"], found.features["largest_part"]) == (0.5, 0.5)
    assert found.structures["RV"]["log_ratio"] == pytest.approx(math.log(1e-3 / 0.2))
    assert found.features["adjacency"] < -0.1
    nothing = assess(maps(np.zeros((2, 8, 8), np.uint8), 1.0), CLASSES, ())
    assert nothing.missing == ["LV", "RV"]
    assert nothing.features == {"expected_dice": 0.0, "confidence": 0.0, "largest_part": 0.0}


def test_pairs_that_touch_are_counted_by_hand() -> None:
    labels = np.array([[[0, 0, 1], [0, 2, 1], [255, 2, 2]]], np.uint8)
    assert touching_pairs(labels, 3).tolist() == [[0, 0.5, 1], [0.5, 1, 1], [1, 1, 2]]


def test_without_a_calibration_there_are_features_and_a_reason_but_no_estimate() -> None:
    found = assess(maps(hearts(), 0.8), CLASSES, ())
    assert found.estimate is None
    assert "--calibrate-quality" in str(found.reason)
    assert found.rank == found.features["expected_dice"]
    assert "ratios" not in found.features


def test_an_estimate_grows_with_each_feature_and_stays_between_0_and_1() -> None:
    calibration = Calibration(-0.2, WEIGHTS, Reference((0.8, 0.2), ((0.0,) * 3,) * 3))
    low = dict.fromkeys(FITTED, 0.5)
    for name in FITTED:
        assert calibration.estimate({**low, name: 0.6}) > calibration.estimate(low)
    assert calibration.estimate(dict.fromkeys(FITTED, 0.0)) == 0.0
    assert calibration.estimate(dict.fromkeys(FITTED, 3.0)) == 1.0


def test_members_of_an_ensemble_give_the_mean_of_their_estimates() -> None:
    reference = Reference.of([hearts()], 3)
    both = [Calibration(level, dict.fromkeys(FITTED, 0.0), reference) for level in (0.4, 0.8)]
    assert assess(maps(hearts(), 0.8), CLASSES, both).estimate == pytest.approx(0.6)


@pytest.mark.parametrize(
    "change",
    [
        {"weights": {**WEIGHTS, "confidence": -1.0}},
        {"weights": {"confidence": 1.0}},
        {"intercept": "nan"},
        {"reference": {"shares": [1.0], "pairs": [[0.0]]}},
        {"reference": {"shares": [0.5, float("inf")], "pairs": [[0.0] * 3] * 3}},
        {"reference": 3},
    ],
    ids="negative,other_features,nan,other_classes,infinite,no_object".split(","),
)
def test_what_is_no_calibration_is_refused(change: dict[str, object]) -> None:
    good = Calibration(0.1, WEIGHTS, Reference((0.8, 0.2), ((0.0,) * 3,) * 3))
    assert Calibration.from_json(good.to_json(), CLASSES) == good
    with pytest.raises((ValueError, TypeError, KeyError)):
        Calibration.from_json({**good.to_json(), **change}, CLASSES)
