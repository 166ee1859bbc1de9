"""A run that begins at the end of another run's phase ends as one that trained all phases itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mpscl_ray.config import Config
from mpscl_ray.errors import ConfigError
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.fork import fork
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train import loop
from tests.tiny import local_data, make_pair, tiny_config

CPU = torch.device("cpu")


def train(config: Config, folder: RunDirectory) -> None:
    folder.create()
    assert loop.train(config, local_data(config), folder, CPU).state == "finished"


def equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return one == other


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunDirectory]:
    base = tmp_path_factory.mktemp("fork")
    make_pair(base)
    folder = RunDirectory(base / "parent")
    train(tiny_config(base / "mr", base / "ct", ["phases.adaptation=0"]), folder)
    return base, folder


def test_a_fork_ends_as_a_whole_run(parent: tuple[Path, RunDirectory]) -> None:
    base, begun = parent
    config = tiny_config(base / "mr", base / "ct")
    whole, forked = RunDirectory(base / "whole"), RunDirectory(base / "forked")
    train(config, whole)
    fork(forked, begun, "warm_up")
    train(config, forked)
    assert equal(checkpoint.load(whole.phases / "adaptation"), checkpoint.load(forked.phases / "adaptation"))
    assert {path.name for path in forked.phases.iterdir()} == {"source_only", "warm_up", "adaptation"}
    steps = [record["global_step"] for record in forked.read_metrics()]
    assert min(steps) > 8, "the phases before the fork were trained again"


def test_settings_of_the_forked_phase_may_differ(parent: tuple[Path, RunDirectory]) -> None:
    base, begun = parent
    ends = []
    for margin in (0.0, 0.4):
        forked = RunDirectory(base / f"margin-{margin}")
        fork(forked, begun, "warm_up")
        train(tiny_config(base / "mr", base / "ct", [f"method.margin_source={margin}"]), forked)
        ends.append(checkpoint.load(forked.phases / "adaptation")["method"]["networks"])
    assert not equal(*ends)


def test_a_second_fork_leaves_a_run_as_it_is(parent: tuple[Path, RunDirectory]) -> None:
    base, begun = parent
    forked = RunDirectory(base / "twice")
    first = fork(forked, begun, "source_only")
    assert not (forked.phases / "warm_up").exists()
    assert fork(forked, begun, "warm_up") == first


def test_a_phase_that_is_not_finished_is_named(parent: tuple[Path, RunDirectory]) -> None:
    base, begun = parent
    with pytest.raises(
        ConfigError, match=r"has not finished the phase adaptation.*it has finished source_only, warm_up"
    ):
        fork(RunDirectory(base / "none"), begun, "adaptation")
