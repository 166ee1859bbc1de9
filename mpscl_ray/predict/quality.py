"""How good a segmentation probably is, without its label: features of it, and an estimate of its mean Dice.

A calibration (:mod:`mpscl_ray.evaluate.calibrate_quality`) makes the estimate of some of the features. It knows volumes
of the labelled domain alone: estimates rank volumes of the other domain, and their level may be off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import scipy.ndimage

from mpscl_ray.predict.postprocessing import Labels

FITTED = ("expected_dice", "confidence", "largest_part")
"""The features that an estimate is made of: the larger each is, the larger the estimate. See :func:`assess`."""
_BORDER_PIXELS = 2
_SMALLEST = 1e-3
"""Of shares within a logarithm: what is missing is not infinitely wrong."""


@dataclass(frozen=True)
class SliceMaps:
    """What the network gives for the slices of a volume, in less memory than its probabilities."""

    labels: Labels
    """(D, H, W) class indices."""
    confidence: npt.NDArray[np.float32]
    """(D, H, W) probability of the predicted class."""
    mass: npt.NDArray[np.float64]
    """(C,) sum of each class's probability over all pixels."""
    disagreement: npt.NDArray[np.float32] | None = None
    """(D, H, W), see :meth:`mpscl_ray.predict.predictor.Predictor.predict_disagreement`; None where nothing can."""

    @classmethod
    def of(cls, probabilities: npt.NDArray[np.float32], disagreement: npt.NDArray[np.float32] | None = None) -> Self:
        """From probabilities (C, D, H, W)."""
        mass = probabilities.sum(axis=(1, 2, 3), dtype=np.float64)
        return cls(probabilities.argmax(axis=0).astype(np.uint8), probabilities.max(axis=0), mass, disagreement)


@dataclass(frozen=True)
class Reference:
    """What labels of the training cases are like."""

    shares: tuple[float, ...]
    """(S,) of each structure among the pixels of all structures, the median over the cases."""
    pairs: tuple[tuple[float, ...], ...]
    """(C, C), see :func:`touching_pairs`, over all cases."""

    @classmethod
    def of(cls, labels: Sequence[Labels], num_classes: int) -> Self:
        """From label maps (D, H, W), one or more."""
        shares = np.median([structure_shares(one, num_classes) for one in labels], axis=0)
        pairs = np.sum([touching_pairs(one, num_classes) for one in labels], axis=0)
        return cls(tuple(shares.tolist()), tuple(map(tuple, pairs.tolist())))


@dataclass(frozen=True)
class Calibration:
    """Mean Dice as a linear function of features that grows with each of them."""

    intercept: float
    weights: Mapping[str, float]
    """By feature, none negative."""
    reference: Reference

    def __post_init__(self) -> None:
        """Raises ValueError for what is no such function."""
        if set(self.weights) != set(FITTED):
            raise ValueError(f"it weights {', '.join(self.weights) or 'nothing'}; expected {', '.join(FITTED)}")
        if not math.isfinite(self.intercept) or not all(0 <= weight < math.inf for weight in self.weights.values()):
            raise ValueError("a weight of it is below 0 or no number")

    def estimate(self, features: Mapping[str, float]) -> float:
        """Mean Dice, in [0, 1]."""
        value = self.intercept + sum(weight * features[name] for name, weight in self.weights.items())
        return min(max(value, 0.0), 1.0)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        reference = {"shares": list(self.reference.shares), "pairs": [list(row) for row in self.reference.pairs]}
        return {"intercept": self.intercept, "weights": dict(self.weights), "reference": reference}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], classes: Sequence[str]) -> Self:
        """Inverse of :meth:`to_json`. Raises ValueError, KeyError, TypeError or AttributeError for anything else."""
        known = values["reference"]
        shares = tuple(float(share) for share in known["shares"])
        pairs = tuple(tuple(float(value) for value in row) for row in known["pairs"])
        if {len(shares) + 1, len(pairs), *map(len, pairs)} != {len(classes)}:
            raise ValueError(f"its reference is not one of {len(classes)} classes")
        if not (np.isfinite(shares).all() and np.isfinite(pairs).all() and np.min(pairs) >= 0):
            raise ValueError("its reference has what is no number, or pairs below 0")
        weights = {str(name): float(weight) for name, weight in values["weights"].items()}
        return cls(float(values["intercept"]), weights, Reference(shares, pairs))


@dataclass(frozen=True)
class Quality:
    """What is known of a segmentation without its label."""

    estimate: float | None
    """Of its mean Dice, in [0, 1]."""
    reason: str | None
    """Why there is no estimate."""
    features: Mapping[str, float]
    """Of the volume."""
    structures: Mapping[str, Mapping[str, float]]
    """Of each structure: ``expected_dice``, ``parts`` (0: it is missing), ``largest_part``, ``log_ratio``."""

    @property
    def missing(self) -> list[str]:
        """Structures that were not found."""
        return [name for name, found in self.structures.items() if not found["parts"]]

    @property
    def rank(self) -> float:
        """The lower, the sooner to look at: the estimate, without one ``expected_dice``."""
        return self.features["expected_dice"] if self.estimate is None else self.estimate


def assess(maps: SliceMaps, classes: Sequence[str], calibrations: Sequence[Calibration]) -> Quality:
    """Features of a volume's segmentation, and the estimate.

    ``expected_dice``: 2 sum_P p / (\\|P\\| + sum p) of a structure's pixels P and probabilities p, the mean over the
    structures. ``confidence``: probability of the predicted class, mean over all structures and two pixels around them.
    ``largest_part``: share of a structure's largest connected part, mean. ``ratios``: distance of the log shares of the
    structures from those of labels, mean. ``adjacency``: minus the Kullback-Leibler divergence of pairs of classes that
    touch from those of labels. ``disagreement`` of the runs of an ensemble, over the pixels of ``confidence``. What
    is missing has 0 in the first and the third.

    Args:
        maps: of the network, before any postprocessing.
        classes: names, background first.
        calibrations: of the network, or of each member of an ensemble, which give the mean of their estimates; none
            where one has none, and there are then no features that compare with labels.
    """
    labels, number = maps.labels, len(classes)
    expected, parts = _expected_dice(maps, number), [_parts(labels, index) for index in range(1, number)]
    structures: dict[str, dict[str, float]] = {
        name: {"expected_dice": float(dice), "parts": count, "largest_part": share}
        for name, dice, (count, share) in zip(classes[1:], expected[1:], parts, strict=True)
    }
    region = scipy.ndimage.binary_dilation(labels > 0, np.ones((1, 3, 3), np.bool_), _BORDER_PIXELS)
    features = {
        "expected_dice": float(expected[1:].mean()),
        "confidence": float(maps.confidence[region].mean()) if region.any() else 0.0,
        "largest_part": float(np.mean([share for _, share in parts])),
    }
    if maps.disagreement is not None:
        features["disagreement"] = float(maps.disagreement[region].mean()) if region.any() else 0.0
    if not calibrations:
        return Quality(None, "these weights are not calibrated (evaluate --calibrate-quality)", features, structures)
    reference = calibrations[0].reference
    ratios = _logarithm(structure_shares(labels, number)) - _logarithm(np.array(reference.shares))
    for found, ratio in zip(structures.values(), ratios, strict=True):
        found["log_ratio"] = float(ratio)
    features["ratios"] = float(np.abs(ratios).mean())
    features["adjacency"] = _agreement(np.array(reference.pairs), touching_pairs(labels, number))
    estimate = float(np.mean([calibration.estimate(features) for calibration in calibrations]))
    return Quality(estimate, None, features, structures)


def touching_pairs(labels: Labels, num_classes: int) -> npt.NDArray[np.float64]:
    """How often pixels of each two classes are neighbours in a slice, (C, C), symmetric; 0 for two of background.

    ``labels`` are (D, H, W); values from ``num_classes`` on, such as not annotated, have no neighbour.
    """
    counts = np.zeros((num_classes, num_classes))
    for one, other in ((labels[:, 1:], labels[:, :-1]), (labels[:, :, 1:], labels[:, :, :-1])):
        known = (one < num_classes) & (other < num_classes)
        numbers = one[known].astype(np.int64) * num_classes + other[known]
        counts += np.bincount(numbers, minlength=num_classes**2).reshape(num_classes, num_classes)
    counts[0, 0] = 0
    return (counts + counts.T) / 2


def structure_shares(labels: Labels, num_classes: int) -> npt.NDArray[np.float64]:
    """(S,) pixels of each structure over those of all structures; 0 where there is none."""
    counts = np.bincount(labels.ravel(), minlength=num_classes)[1:num_classes]
    shares: npt.NDArray[np.float64] = counts / max(int(counts.sum()), 1)
    return shares


def _expected_dice(maps: SliceMaps, num_classes: int) -> npt.NDArray[np.float64]:
    """(C,) Dice of each predicted class with what the probabilities expect."""
    labels = maps.labels.ravel()
    inside = np.bincount(labels, maps.confidence.ravel(), num_classes)
    sizes = np.bincount(labels, minlength=num_classes) + maps.mass
    dice: npt.NDArray[np.float64] = 2 * inside / np.maximum(sizes, 1e-12)
    return dice


def _parts(labels: Labels, index: int) -> tuple[int, float]:
    """Number of connected parts of a structure, and the share of the largest one."""
    numbered, count = scipy.ndimage.label(labels == index)
    sizes = np.bincount(numbered.ravel())[1:]
    return int(count), float(sizes.max() / sizes.sum()) if count else 0.0


def _logarithm(shares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    values: npt.NDArray[np.float64] = np.log(np.maximum(shares, _SMALLEST))
    return values


def _agreement(expected: npt.NDArray[np.float64], seen: npt.NDArray[np.float64]) -> float:
    """Minus the Kullback-Leibler divergence of counts of pairs (C, C), a little of the expected ones mixed in."""
    expected, seen = (counts / max(float(counts.sum()), 1e-12) for counts in (expected, seen))
    seen = (1 - _SMALLEST) * seen + _SMALLEST * expected
    there = expected > 0
    return -float((expected[there] * np.log(expected[there] / seen[there])).sum())
