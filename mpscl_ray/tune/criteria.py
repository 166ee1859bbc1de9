"""What trials are compared by.

``oracle`` is target validation Dice: a selection by it uses labels that unsupervised adaptation must not need. The
other criteria use no target label.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

ORACLE = "oracle"

CRITERIA: dict[str, str] = {
    ORACLE: "mean Dice on the target's validation volumes; uses their labels",
    "source_dice": "mean Dice on the source's validation volumes",
    "source_dice_less_entropy": "source Dice less the entropy of the target's predictions",
    "confidence": "one less the entropy of the target's predictions",
    "information": "mutual information of pixel and class on the target (Krause et al. 2010)",
    "nuclear_norm": "nuclear norm of the target's predictions (Cui et al. 2020)",
    "neighbourhood_density": "soft neighbourhood density of the target's predictions (Saito et al. 2021)",
    "class_ratio_agreement": "agreement of the classes' shares with the source's labels (Bateson et al. 2020)",
    "adjacency_agreement": "agreement of the shares of neighbouring pairs of classes with the source's labels",
    "source_dice_and_class_ratio": "source Dice less target entropy, plus agreement of class shares over their entropy",
}
"""Meaning of each value of ``search.metric``; larger is better for all."""

LABEL_FREE, WITHOUT_SOURCE = "source_dice_less_entropy", "confidence"
"""The label-free defaults: where the target has no validation labels, and where the source has none either.

Over four searches on the phantom the first had the highest rank correlation with target Dice, the second the highest of
those that need no source (tests/benchmarks/EXPERIMENTS.md)."""


def score(record: Mapping[str, Any], metric: str) -> float:
    """Value of a criterion in a validation record of metrics.jsonl; NaN where the record lacks what it needs."""

    def value(tag: str) -> float:
        return float(record.get(tag, math.nan))

    if metric == "source_dice_less_entropy":
        return value("val/source/dice/mean") - value("val/entropy")
    tags = {ORACLE: "val/dice/mean", "source_dice": "val/source/dice/mean"}
    return value(tags.get(metric, f"val/unsupervised/{metric}"))
