"""The state of each method in a checkpoint keeps its names and shapes, so that earlier runs can resume."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mpscl_ray.methods import METHODS
from tests.tiny_methods import MAKE, assert_equal_states, batch

SHAPES: dict[str, dict[str, list[int] | int]] = json.loads(
    gzip.decompress(Path(__file__).with_name("method_states.json.gz").read_bytes())
)
"""Shape of each tensor and value of each number in the state of a tiny method that has been stepped in a phase."""


@pytest.mark.parametrize("name", METHODS)
def test_a_state_as_it_was_saved_before_is_taken_over_whole(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    saved: dict[str, Any] = {"optimisers": {}}
    for path, found in SHAPES[name].items():
        value: Any = found
        if isinstance(found, list):
            whole = path.endswith("num_batches_tracked")
            value = torch.tensor(7) if whole else torch.rand(found, generator=generator) + 0.5
            double = path in ("anchors.counts", "anchors.gap_quantiles") or path.startswith("statistics.")
            value = value.double() if double else value
        *branch, leaf = _split(path)
        place = saved
        for part in branch:
            place = place.setdefault(part, {})
        place[leaf] = value
    method = MAKE[name](seed=5)
    method.load_state_dict(saved)
    saved.get("anchors", {}).pop("gap_quantiles", None)  # Earlier states of CAG have them; nothing reads them.
    state = method.state_dict()
    assert float(state["phase"].pop("skipped", 0)) == 0  # Earlier states have no such number.
    assert_equal_states(state, saved)
    assert float(method.step(batch(0), 1)["non_finite"]) == 0


def _split(path: str) -> list[str]:
    """Networks have one name for each tensor, with dots in it: "networks", network, tensor."""
    depth = {"networks": 2, "optimisers": 3, "teacher": 1}.get(path.split(".")[0], 9)
    return path.split(".", depth)
