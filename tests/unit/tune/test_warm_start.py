"""The run that trains what all trials of a search share."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpscl_ray.config import load_config
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.tune.warm_start import _shared_config


@pytest.mark.parametrize(("accumulate", "at_once", "workers"), [(1, 4, 4), (1, 7, 4), (2, 20, 4), (8, 4, 1)])
def test_the_shared_run_takes_the_workers_that_can_share_a_batch(
    tmp_path: Path, accumulate: int, at_once: int, workers: int
) -> None:
    batch = "data.global_batch_size=8"
    config = load_config("phantom", [batch, "scaling.num_workers=1", f"optim.accumulate={accumulate}"])
    shared = _shared_config(config, ["source_only"], RunDirectory(tmp_path), at_once)
    assert shared.scaling.num_workers == workers
    assert [name for name, _ in shared.schedule] == ["source_only"]
