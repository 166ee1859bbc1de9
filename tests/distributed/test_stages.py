"""Methods with stages, through the training loop: what two workers prepare and then train is what one does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.run_directory import RunDirectory
from tests.tiny import STAGES, make_pair, tiny_config
from tests.tiny_runs import train_and_watch
from tests.worker_processes import on_workers


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All that lies in nested mappings and lists, by where it lies."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from leaves(item, f"{name}/{number}")
    else:
        yield name, value


@pytest.mark.parametrize("name", STAGES)
def test_stages_do_not_depend_on_the_number_of_workers(name: str, tmp_path: Path) -> None:
    data = make_pair(tmp_path / "data")
    config = tiny_config(data / "mr", data / "ct", STAGES[name], preset=f"phantom/{name}")
    assert config.method.bn_running_stats == "target", "CAG's anchors then need a pass of their own over the source"
    ends = []
    for workers in (1, 2):
        run = tmp_path / f"{workers}"
        found = on_workers(workers, train_and_watch, config, run, None, torch.float64)
        assert all(outcome.state == "finished" for outcome, _ in found)
        phases = RunDirectory(run).store.finished_phases()
        states = {phase: checkpoint.load(RunDirectory(run).phases / phase) for phase in phases}
        ends.append(
            {phase: dict(leaves({**state["method"], **state.get("fixed", {})})) for phase, state in states.items()}
        )
    one, two = ends
    assert one.keys() == two.keys() >= {"source_only", "adaptation" if name == "mean_teacher" else "warm_up"}
    for phase, expected in one.items():
        assert two[phase].keys() == expected.keys()
        for key, value in expected.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(two[phase][key], value, rtol=1e-7, atol=1e-9, msg=f"{phase} {key}")
            else:
                assert two[phase][key] == value, f"{phase} {key}"
