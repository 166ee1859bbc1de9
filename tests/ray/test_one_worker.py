"""One worker on the Ray of its command trains without Ray Train, and is replaced when it is lost."""

from __future__ import annotations

import os
import re
import signal
import threading
import time

import pytest

from mpscl_ray.config import load_config
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train import command as train
from mpscl_ray.train.ray import launch
from mpscl_ray.train.ray.one_process import needs_no_ray_train
from tests.ray.conftest import Here
from tests.tiny import make_pair
from tests.train_command import EVERY, LONG, STEPS, Runs, assert_same_run, check_status, starts

ONE = (*LONG, "scaling.num_workers=1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(make_pair(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("runs"))


def kill_the_worker(run: RunDirectory, at: int, killed: list[int]) -> None:
    """SIGKILL to the worker when the run has come that far."""
    while max((record["global_step"] for record in run.read_metrics()), default=0) < at:
        time.sleep(0.02)
    pid = re.findall(r"pid (\d+) INFO worker starts", (run.logs / "worker-0.log").read_text(encoding="utf-8"))[-1]
    os.kill(int(pid), signal.SIGKILL)
    killed.append(int(pid))


def test_a_worker_that_is_lost_is_replaced(here: Here, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def ray_train(*given: object) -> None:
        raise AssertionError("Ray Train is not started for one worker")

    monkeypatch.setattr(launch, "fit_on_ray", ray_train)
    killed: list[int] = []
    killer = threading.Thread(target=kill_the_worker, args=(runs["lost"], EVERY + 3, killed), daemon=True)
    killer.start()
    code, text = here(train, *runs.arguments("lost", *ONE))
    assert code == 0, text
    assert "worker 0 was lost: its process died; the workers are replaced and resume" in text
    assert "Traceback" not in text
    first, second = starts(runs["lost"])
    assert (first, len(killed)) == (0, 1)
    assert EVERY <= second <= STEPS, "at most one checkpoint interval is done again"
    check_status(runs["lost"], "finished", 0, "")
    code, text = here(train, *runs.arguments("calm", *ONE))
    assert code == 0, text
    assert_same_run(runs["lost"], runs["calm"])


def test_one_that_is_lost_too_often_ends_the_run(here: Here, runs: Runs) -> None:
    run = runs["often"]
    threading.Thread(target=kill_the_worker, args=(run, 2, []), daemon=True).start()
    code, text = here(train, *runs.arguments("often", *ONE, "run.max_failures=0"))
    assert code == 6
    assert "workers failed 1 time, which is once more than run.max_failures allows (worker 0 was lost" in text
    assert "Traceback" not in text


@pytest.mark.usefixtures("cluster")
def test_ray_train_trains_several_workers_and_what_a_dashboard_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (load_config("phantom", [f"scaling.num_workers={number}"]) for number in (1, 2))
    assert needs_no_ray_train(one)
    assert not needs_no_ray_train(two)
    monkeypatch.setenv("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
    assert not needs_no_ray_train(one)
