"""Ray Tune's own way to resume a search, and why a ledger is there instead."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from ray.tune.schedulers import ASHAScheduler

pytestmark = pytest.mark.usefixtures("cluster")

SCORES = [1.0, 0.0]
ITERATIONS = 4


class Stopped(Exception):
    """Ends a search."""


class KeepState(tune.Callback):
    """Copies the folder of a search before its last trial starts, as a kill would leave it, and ends the search."""

    def __init__(self, folder: Path, copy: Path) -> None:
        self.folder, self.copy = folder, copy

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        if trial.config["score"] == SCORES[-1] and not self.copy.exists():
            shutil.copytree(self.folder, self.copy)
            raise Stopped


def train(config: dict[str, float]) -> None:
    for iteration in range(1, ITERATIONS + 1):
        tune.report({"score": config["score"], "iteration": iteration})


def make_tuner(folder: Path, *callbacks: tune.Callback) -> tune.Tuner:
    scheduler = ASHAScheduler("iteration", max_t=ITERATIONS, grace_period=1, reduction_factor=2)
    return tune.Tuner(
        train,
        param_space={"score": tune.grid_search(SCORES)},
        tune_config=tune.TuneConfig(metric="score", mode="max", scheduler=scheduler, max_concurrent_trials=1),
        run_config=tune.RunConfig(name="search", storage_path=str(folder), callbacks=list(callbacks), verbose=0),
    )


def iterations(results: tune.ResultGrid) -> dict[float, int]:
    """Iterations of each trial, by its score."""
    return {result.config["score"]: result.metrics["iteration"] for result in results}  # type: ignore[index]


def test_ray_tune_forgets_the_rungs_when_it_restores_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """https://github.com/ray-project/ray/issues/30838; where this fails, the ledger may no longer be needed."""
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "0")
    whole = make_tuner(tmp_path / "whole").fit()
    assert iterations(whole) == {1.0: ITERATIONS, 0.0: 1}, "the worst is stopped at the first rung"
    ended, killed = tmp_path / "ended", tmp_path / "killed"
    with pytest.raises(Stopped):
        make_tuner(ended, KeepState(ended, killed)).fit()
    restored = tune.Tuner.restore(str(killed / "search"), train).fit()
    assert iterations(restored) == dict.fromkeys(SCORES, ITERATIONS), "the first at an empty rung continues"
