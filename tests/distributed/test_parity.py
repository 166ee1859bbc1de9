"""N workers with a batch of B compute what one worker with a batch of N B computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mpscl_ray import methods

Ranks = list[dict[str, np.ndarray[Any, Any]]]
Run = Callable[[str, int], Ranks]

RELATIVE = 1e-5
EXACT = {"mean_teacher": 1e-12, "mean_teacher-target": 1e-12, "mean_teacher-all": 1e-12}
"""Stricter limits of cases whose labels and selections hang on comparisons."""
MPSCL_CASES = ["fc-released", "fc-paper", "patchgan-released", "patchgan-paper"]
OTHER_CASES = [
    "fc-baseline",
    "segmentation",
    "segmentation-batch",
    "adamw",
    "advent",
    "minent",
    "adaoutput",
    "adaoutput-least-squares",
    "adabn",
    "clan",
    "clan-focal",
    "intrada",
    "intrada-volumes",
    "cag",
    "cag-ce",
    "mean_teacher",
    "mean_teacher-target",
    "mean_teacher-all",
    "sifa",
    "sifa-first",
]
PARTLY_ANNOTATED = [
    f"{case}-partly-annotated" for case in ("fc-released", "clan-focal", "cag-ce", "mean_teacher", "sifa")
]
ACCUMULATED = [f"{case}-accumulated" for case in ("fc-released", "segmentation", "sifa-first")]
RANK_DEPENDENT = ["fc-released", "intrada", "cag"]
"""Shares, splits and anchors; the others sum, or take their part of a draw, which two workers show."""
SEVERAL = [
    *((case, 2) for case in (*MPSCL_CASES, *OTHER_CASES, *PARTLY_ANNOTATED, *ACCUMULATED)),
    *((case, 4) for case in RANK_DEPENDENT),
]


def relative_deviation(ours: np.ndarray[Any, Any], reference: np.ndarray[Any, Any]) -> float:
    assert ours.shape == reference.shape
    difference = float(np.abs(ours.astype(float) - reference).max())
    scale = float(np.abs(reference).max())
    return difference / scale if scale > 0 else difference


@pytest.mark.parametrize(("case", "world_size"), SEVERAL)
def test_result_does_not_depend_on_the_number_of_workers(run: Run, case: str, world_size: int) -> None:
    (reference,) = run(case, 1)
    compared = [name for name in reference if not name.startswith("local.") and name != "checksum"]
    kinds = ("gradient_first.", "gradient_last.", "metric.loss_", "state.networks.segmenter.", "state.optimisers.")
    for kind in kinds if case != "adabn" else kinds[3:4]:
        assert any(name.startswith(kind) for name in compared), kind
    for ours in run(case, world_size):
        deviations = {name: relative_deviation(ours[name], reference[name]) for name in compared}
        worst = max(deviations, key=lambda name: deviations[name])
        assert deviations[worst] < EXACT.get(case, RELATIVE), f"{worst}: {deviations[worst]}"


def test_the_gradient_of_the_losses_of_the_batch_is_that_of_one_worker(run: Run) -> None:
    (reference,) = run("batch-losses", 1)
    for ours in run("batch-losses", 2):
        for name in reference:
            np.testing.assert_allclose(ours[name], reference[name], rtol=1e-12, atol=1e-15, err_msg=name)


def test_every_method_is_compared_over_numbers_of_workers() -> None:
    compared = {case.partition("-")[0] for case, _ in SEVERAL}
    missing = {*methods.METHODS, "fc", "patchgan"} - compared
    assert missing == {"mpscl"}, "MPSCL is there by the kinds of its discriminator"


@pytest.mark.parametrize(("case", "world_size"), SEVERAL)
def test_all_ranks_hold_the_same(run: Run, case: str, world_size: int) -> None:
    first, *others = run(case, world_size)
    for other in others:
        for name in first:
            if not name.startswith("local."):
                np.testing.assert_array_equal(other[name], first[name], err_msg=name)


@pytest.mark.parametrize("case", MPSCL_CASES)
def test_the_batches_are_as_uneven_as_the_claim_needs(run: Run, case: str) -> None:
    selected = np.stack([ours["local.pseudo_label_fraction"] for ours in run(case, 2)])
    few, many = np.sort(selected.mean(axis=1))
    assert few > 0
    assert many > 2 * few
    assert np.any(selected.max(axis=0) > 5 * selected.min(axis=0))
    # A mean of the workers' means would be another number: the local losses differ.
    local = [ours["local.loss_cross_entropy_main"] for ours in run(case, 2)]
    assert np.all(np.abs(local[0] - local[1]) > 1e-3)
    # Class 2 is on the last rank alone, so rank 0 would divide by another sum of weights; class 3 is nowhere.
    (reference,) = run(case, 1)
    assert np.all(reference["state.prototypes"][3] == 0)
    assert np.all(reference["state.prototypes"][2].any())


@pytest.mark.parametrize("case", PARTLY_ANNOTATED)
def test_what_is_not_annotated_changes_the_result_and_spares_a_worker(run: Run, case: str) -> None:
    """Otherwise the comparison of partly annotated batches would show nothing."""
    (whole,), (partly,) = run(case.removesuffix("-partly-annotated"), 1), run(case, 1)
    assert np.abs(partly["metric.loss_segmentation"][0] - whole["metric.loss_segmentation"][0]) > 1e-4
    assert np.isfinite(partly["metric.loss_segmentation"]).all()
    first, second = (ours["local.loss_segmentation"][0] for ours in run(case, 2))
    assert first < 0.6 * second


@pytest.mark.parametrize("case", ACCUMULATED)
def test_micro_batches_have_batch_statistics_of_their_own(run: Run, case: str) -> None:
    """Otherwise the comparison of accumulated gradients would show nothing."""
    (whole,), (parts,) = run(case.removesuffix("-accumulated"), 1), run(case, 1)
    assert relative_deviation(parts["metric.loss_segmentation"], whole["metric.loss_segmentation"]) > 1e-4


@pytest.mark.parametrize("workers", [1, 2])
def test_recomputed_blocks_change_nothing(run: Run, workers: int) -> None:
    """Not one bit of losses, gradients, weights and running statistics, on any worker."""
    for ours, kept in zip(run("fc-released-recomputed", workers), run("fc-released", workers), strict=True):
        assert ours.keys() == kept.keys()
        for name, value in kept.items():
            assert np.array_equal(ours[name], value, equal_nan=True), name


def test_training_moved_the_weights(run: Run) -> None:
    (reference,) = run("fc-released", 1)
    losses = reference["metric.loss_segmentation"]
    assert losses[-1] < 0.9 * losses[0]
