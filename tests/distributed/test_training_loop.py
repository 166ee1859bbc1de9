"""The training loop on one and on two workers, in gloo processes, at the precision it is used with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mpscl_ray import checkpoint
from mpscl_ray.run_folder import RunFolder
from tests.tiny import make_pair, tiny_config, train_in_processes

TOLERANCE = 1e-4
SETTINGS = ("phases.source_only=3", "phases.warm_up=3", "run.report_every=1")
"""Ten steps."""
DISCRETE = ("train/selected_fraction", "train/discriminator_accuracy", "val/dice", "val/source/dice", "val/selection")
"""What counts pixels moves in jumps of a pixel."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[RunFolder, list[Any]]]:
    """Run folder and what each worker saw: of one worker, of two, and of two, one, and two in turn."""
    data = make_pair(tmp_path_factory.mktemp("data"))
    config = tiny_config(data / "mr", data / "ct", SETTINGS)
    found = {}
    for name, parts in {"one": [(1, None)], "two": [(2, None)], "cut": [(2, 5), (2, None)], "mixed": [(2, 4), (1, None)]}.items():
        run = tmp_path_factory.mktemp(name)
        seen = [train_in_processes(config, run, workers=workers, stop_after=stop) for workers, stop in parts]
        assert all(process["outcome"]["step"] == 10 for process in seen[-1])
        found[name] = RunFolder(run), [step for part in seen for step in by_step(part)]
    return found


def by_step(processes: list[Any]) -> list[list[list[str]]]:
    """What all workers saw, one after the other, by step and domain."""
    return [
        [sum(parts, []) for parts in zip(*domains, strict=True)]
        for domains in zip(*(process["seen"] for process in processes), strict=True)
    ]


@pytest.mark.parametrize("name", ["two", "cut", "mixed"])
def test_the_data_and_their_order_do_not_depend_on_the_number_of_workers(runs: dict[str, Any], name: str) -> None:
    expected = runs["one"][1]
    assert len(expected) == 10
    assert [len(domains) for domains in expected] == [1] * 3 + [2] * 7
    assert runs[name][1] == expected


@pytest.mark.parametrize("name", ["two", "mixed"])
def test_metrics_and_weights_do_not_depend_on_the_number_of_workers(runs: dict[str, Any], name: str) -> None:
    reference, run = runs["one"][0], runs[name][0]
    for ours, theirs in zip(run.read_metrics(), reference.read_metrics(), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if isinstance(value, float) and not key.startswith("speed/"):
                tolerance = 2e-2 if key.startswith(DISCRETE) else TOLERANCE
                assert ours[key] == pytest.approx(value, rel=tolerance, abs=tolerance), (key, ours["global_step"])
    for phase in ("source_only", "warm_up", "adaptation"):
        one, other = (checkpoint.load(folder.phases / phase)["method"] for folder in (reference, run))
        for network, weights in one["networks"].items():
            for key, tensor in weights.items():
                deviation = (other["networks"][network][key] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-12)
                assert deviation < TOLERANCE, (phase, network, key, float(deviation))
    assert torch.allclose(one["prototypes"], other["prototypes"], rtol=TOLERANCE, atol=TOLERANCE)


def test_two_workers_that_were_stopped_go_on_bit_for_bit(runs: dict[str, Any]) -> None:
    for phase in ("source_only", "warm_up", "adaptation"):
        for file in (checkpoint.TENSORS, checkpoint.STATE):
            whole, cut = ((runs[name][0].phases / phase / file).read_bytes() for name in ("two", "cut"))
            assert whole == cut, (phase, file)
