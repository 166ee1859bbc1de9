"""Batch normalisation over workers, and the other collectives, in gloo processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Run = Callable[[str, int], list[dict[str, np.ndarray[Any, Any]]]]
several = pytest.mark.parametrize("world_size", [2, 4])


@several
def test_equals_the_layer_on_the_union_of_the_batches(run: Run, world_size: int) -> None:
    for arrays in run("batch-norm", world_size):
        names = [name for name in arrays if name.startswith("ours.")]
        assert len(names) > 40
        for name in names:
            ours, reference = arrays[name], arrays[name.replace("ours.", "reference.")]
            tolerance = 1e-11 if ours.dtype == np.float64 else 2e-5
            scale = np.abs(reference).max()
            np.testing.assert_allclose(ours, reference, rtol=0, atol=tolerance * scale, err_msg=name)


@several
def test_running_statistics_move_only_where_asked(run: Run, world_size: int) -> None:
    for arrays in run("batch-norm", world_size):
        assert int(arrays["ours.two_parts.num_batches_tracked"]) == 4
        assert int(arrays["ours.second_moves.num_batches_tracked"]) == 2


@several
def test_objects_and_sums(run: Run, world_size: int) -> None:
    squares = sum((rank + 1) ** 2 for rank in range(world_size))
    denominator = 2 * sum(range(world_size)) + 1
    for rank, arrays in enumerate(run("objects", world_size)):
        np.testing.assert_array_equal(arrays["counts"], [[sum(range(world_size)), world_size]])
        assert float(arrays["halves"]) == 0.5 * world_size
        assert bool(arrays["drift_was_seen"])
        assert float(arrays["any"]) == 1.0
        assert float(arrays["none"]) == 0.0
        assert float(arrays["ratio"]) == pytest.approx(squares / denominator)
        # Averaged over the workers this is the gradient of the ratio.
        assert float(arrays["ratio_gradient"]) == pytest.approx(world_size * 2 * (rank + 1) / denominator)
