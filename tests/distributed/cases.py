"""What each worker of the distributed tests runs. The global batch of a step is the same for any number of workers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from tests.distributed import global_batches, trainings
from tests.distributed.parts import batch_losses, batch_norm, objects
from tests.distributed.trainings import (
    STRONG,
    adamw,
    look_and_train,
    non_finite,
    parity,
    sifa,
    source_only_then_adapted,
)


def partly_annotated(case: str) -> dict[str, Any]:
    """A case whose global batches have three source images, and half of the fifth, that are not annotated."""
    global_batches.HIDDEN = True
    try:
        return CASES[case]()
    finally:
        global_batches.HIDDEN = False


def accumulated(case: str) -> dict[str, Any]:
    """A case in two micro-batches."""
    whole = trainings.OPTIM
    trainings.OPTIM = dataclasses.replace(whole, accumulate=2)
    try:
        return CASES[case]()
    finally:
        trainings.OPTIM = whole


def recomputed(case: str) -> dict[str, Any]:
    """A case whose blocks are computed once more in the backward pass."""
    kept = trainings.OPTIM
    trainings.OPTIM = dataclasses.replace(kept, recompute=True)
    try:
        return CASES[case]()
    finally:
        trainings.OPTIM = kept


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "fc-released": lambda: parity({"discriminator": "fc", "margin_form": "released"}),
    "fc-paper": lambda: parity({"discriminator": "fc", "margin_form": "paper"}),
    "patchgan-released": lambda: parity(
        {"discriminator": "patchgan", "margin_form": "released", "temperature_source": 2.0}
    ),
    "patchgan-paper": lambda: parity({"discriminator": "patchgan", "margin_form": "paper"}),
    "fc-baseline": lambda: parity({"discriminator": "fc", "beta": 0.0, "gamma": 0.0}),
    "segmentation": source_only_then_adapted,
    "segmentation-batch": lambda: look_and_train("segmentation", segmentation_loss="plain", class_weight_floor=0.4),
    "adamw": adamw,
    "advent": lambda: look_and_train("advent", discriminator_width=4, **STRONG),
    "minent": lambda: look_and_train("advent", variant="minent", **STRONG),
    "adaoutput": lambda: look_and_train("adaoutput", discriminator_width=4, discriminator="patchgan", **STRONG),
    "adaoutput-least-squares": lambda: look_and_train(
        "adaoutput", discriminator_width=4, adversarial_loss="least_squares", **STRONG
    ),
    "clan": lambda: look_and_train("clan", discriminator_width=4, lambda_adversarial=0.1, lambda_weight=0.1),
    "clan-focal": lambda: look_and_train(
        "clan", discriminator_width=4, segmentation_loss="focal", lambda_adversarial=0.1, warmup_fraction=0.2
    ),
    "intrada": lambda: look_and_train("intrada", discriminator_width=4, **STRONG),
    "intrada-volumes": lambda: look_and_train(
        "intrada", discriminator_width=4, unit="volume", score="foreground_entropy", **STRONG
    ),
    "cag": lambda: look_and_train("cag", min_pixels=2, probability_threshold=0.4),
    "cag-ce": lambda: look_and_train(
        "cag",
        min_pixels=2,
        segmentation_loss="ce",
        distance_quantile=None,
        distance_threshold=0.01,
        bn_running_stats="target",
    ),
    "mean_teacher": lambda: look_and_train("mean_teacher", seed=3, mixing=0.5, share_matching=0.5, ramp=3),
    "mean_teacher-target": lambda: look_and_train("mean_teacher", bn_running_stats="target", ramp=0),
    "mean_teacher-all": lambda: look_and_train(
        "mean_teacher",
        seed=3,
        bn_running_stats="target",
        histogram_matching=0.5,
        mixing=0.5,
        consistency=1.0,
        contrast=0.5,
        delta_th=0.02,
        share_matching=0.5,
        adabn=True,
        ramp=3,
    ),
    "sifa": lambda: sifa(pool_size=2),
    "sifa-first": lambda: sifa(version="v1", pool_size=2, dropout=0.25, adversarial_prediction_ramp=(0.1, 0.4)),
    "adabn": lambda: look_and_train("adabn"),
    **{
        f"{case}-partly-annotated": functools.partial(partly_annotated, case)
        for case in ("fc-released", "clan-focal", "cag-ce", "mean_teacher", "sifa")
    },
    **{
        f"{case}-accumulated": functools.partial(accumulated, case)
        for case in ("fc-released", "segmentation", "sifa-first")
    },
    "fc-released-recomputed": functools.partial(recomputed, "fc-released"),
    "non-finite-source": lambda: non_finite("source"),
    "non-finite-target": lambda: non_finite("target"),
    "batch-norm": batch_norm,
    "objects": objects,
    "batch-losses": batch_losses,
}


def run_case(name: str) -> dict[str, np.ndarray[Any, Any]]:
    """What this worker has in the end."""
    results = CASES[name]()
    return {key: np.asarray(x.detach() if isinstance(x, Tensor) else x) for key, x in results.items()}
