"""Ray Train's own account of a run: its checkpoints, which stay where they are."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray.train
from ray.train.torch import TorchTrainer

from mpscl_ray.config import Config
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train import command as train
from mpscl_ray.train.ray import launch
from tests.ray.conftest import Here
from tests.tiny import make_pair
from tests.train_command import EVERY, LONG, PHASE, STEPS, Runs, starts


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(make_pair(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("runs"))


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[ray.train.Result]:
    """What Ray Train returns from each training."""
    found: list[ray.train.Result] = []
    fit = TorchTrainer.fit

    def keep(trainer: TorchTrainer) -> ray.train.Result:
        found.append(fit(trainer))
        return found[-1]

    monkeypatch.setattr(TorchTrainer, "fit", keep)
    return found


def kill_worker(run: RunDirectory, at: int) -> None:
    """SIGKILL to worker 1 when the run has come that far."""
    while max((record["global_step"] for record in run.read_metrics()), default=0) < at:
        time.sleep(0.05)
    (pid,) = re.findall(r"pid (\d+) INFO worker starts", (run.logs / "worker-1.log").read_text(encoding="utf-8"))
    os.kill(int(pid), signal.SIGKILL)


def test_ray_train_knows_the_checkpoints_of_a_run_and_leaves_them(
    here: Here, runs: Runs, results: list[ray.train.Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, seen = runs["account"], tmp_path / "seen"
    run_worker = launch.run_worker

    def noting_worker(settings: dict[str, Any], **more: Any) -> dict[str, Any]:
        found = ray.train.get_checkpoint()
        if ray.train.get_context().get_world_rank() == 0:
            with seen.open("a") as file:
                file.write(f"{found and found.path}\n")
        return run_worker(settings, **more)

    def disturbed(config: Config, folder: RunDirectory, *more: Any) -> dict[str, Any]:
        threading.Thread(target=kill_worker, args=(run, PHASE + EVERY), daemon=True).start()
        return launch.fit_on_ray(config, folder, *more)

    monkeypatch.setattr(launch, "run_worker", noting_worker)
    code, text = here(train, *runs.arguments("account", *LONG), fit=disturbed)
    assert code == 0, text
    (result,) = results
    first, second = seen.read_text().splitlines()
    assert first == "None"
    assert Path(second).parent == run.checkpoints.absolute()
    told = checkpoint.step_of(Path(second))
    assert 0 < told <= starts(run)[1], "the newest one may have been completed just before the kill"

    assert result.checkpoint is not None
    newest = checkpoint.list_checkpoints(run.checkpoints)
    assert Path(result.checkpoint.path) == newest[-1].absolute()
    with result.checkpoint.as_directory() as folder:
        checkpoint.verify(Path(folder))
    assert result.metrics is not None
    assert (result.metrics["checkpoint"], result.metrics["global_step"]) == (newest[-1].name, STEPS)
    assert result.metrics["val/dice/mean"] == run.read_metrics()[-1]["val/dice/mean"]
    assert result.best_checkpoints is not None
    steps = [checkpoint.step_of(Path(known.path)) for known, _ in result.best_checkpoints]
    assert steps == sorted(set(steps)), "each is reported once"
    assert len(newest) == 2, "Ray Train deletes none, run.keep_checkpoints does"
    assert sorted(path.name for path in run.path.glob("checkpoint*")) == ["checkpoints"], "and copies none"
    assert not list(run.path.glob(".validate*"))

    again, text = here(train, *runs.arguments("account", *LONG, f"phases.adaptation={PHASE + 1}"), "--allow-change")
    assert again == 0, text
    assert seen.read_text().splitlines()[2] == "None", "another start"
    assert results[1].best_checkpoints is not None
    steps = [checkpoint.step_of(Path(known.path)) for known, _ in results[1].best_checkpoints]
    assert steps == [STEPS, STEPS + 1]
