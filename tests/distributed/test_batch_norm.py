"""Batch normalisation over workers, and the other collectives, in gloo processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module", params=[2, 4])
def ranks(
    request: pytest.FixtureRequest, run_workers: Callable[[int, tuple[str, ...]], dict[str, list[Arrays]]]
) -> dict[str, list[Arrays]]:
    return run_workers(request.param, ("batch-norm", "objects"))


def test_equals_the_layer_on_the_union_of_the_batches(ranks: dict[str, list[Arrays]]) -> None:
    for arrays in ranks["batch-norm"]:
        names = [name for name in arrays if name.startswith("ours.")]
        assert len(names) > 40
        for name in names:
            ours, reference = arrays[name], arrays[name.replace("ours.", "reference.")]
            tolerance = 1e-11 if ours.dtype == np.float64 else 2e-5
            scale = np.abs(reference).max()
            np.testing.assert_allclose(ours, reference, rtol=0, atol=tolerance * scale, err_msg=name)


def test_running_statistics_move_only_where_asked(ranks: dict[str, list[Arrays]]) -> None:
    for arrays in ranks["batch-norm"]:
        assert int(arrays["ours.two_parts.num_batches_tracked"]) == 4
        assert int(arrays["ours.second_moves.num_batches_tracked"]) == 2


def test_objects_and_sums(ranks: dict[str, list[Arrays]]) -> None:
    world_size = len(ranks["objects"])
    squares = sum((rank + 1) ** 2 for rank in range(world_size))
    denominator = 2 * sum(range(world_size)) + 1
    for rank, arrays in enumerate(ranks["objects"]):
        np.testing.assert_array_equal(arrays["counts"], [[sum(range(world_size)), world_size]])
        assert float(arrays["halves"]) == 0.5 * world_size
        assert bool(arrays["drift_was_seen"])
        assert float(arrays["any"]) == 1.0
        assert float(arrays["none"]) == 0.0
        assert float(arrays["ratio"]) == pytest.approx(squares / denominator)
        # Averaged over the workers this is the gradient of the ratio.
        assert float(arrays["ratio_gradient"]) == pytest.approx(world_size * 2 * (rank + 1) / denominator)
