"""Searches and comparisons, submitted as jobs to two nodes that have the package, of which one dies in the middle."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mpscl_ray.config import load_config, to_dict
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.tune.ledger import Ledger
from tests.local_cluster import PATIENCE_S, LocalCluster, wait_until
from tests.tiny import SETTINGS, make_pair

SHARED, OWN, EVERY = 8, 100, 10
LENGTHS = (
    f"phases.adaptation={OWN}",
    f"run.validate_every={EVERY}",
    f"run.checkpoint_every={EVERY}",
    "run.log_every=1",
    "run.max_failures=1",
    "scaling.num_workers=1",
)
OF_TRAININGS = re.compile(r"ray::(RayTrainWorker|TrainController|ImplicitFunc)")
"""Not of them is Ray Train's PlacementGroupCleaner, which holds nothing: one may stay for each controller that was
killed."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Two nodes with one CPU each, which two trainings fill."""
    with LocalCluster(nodes=2, cpus=1, installed=True) as started:
        yield started


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("data"))


def submit(cluster: LocalCluster, name: str, folder: Path, *words: str) -> None:
    """Submit a command of the package as a job that brings no files."""
    done = cluster.command(
        "ray", "job", "submit", "--no-wait", "--submission-id", name, "--", "python", "-m", *words, cwd=folder
    )
    assert done.returncode == 0, done.stdout


def trainings(cluster: LocalCluster) -> list[dict[str, Any]]:
    """Ray's account of trainings, which the dashboard serves."""
    status, content = cluster.get("/api/train/v2/runs/v1", cluster.token)
    return list(content["train_runs"]) if status == 200 else []


def on_the_second_node(cluster: LocalCluster, run: RunDirectory) -> bool:
    """Whether a run trains in a process of that node."""
    status = run.read_status()
    if status.get("state") != "running":
        return False
    try:
        environment = Path(f"/proc/{status['pid']}/environ").read_bytes().split(b"\0")
    except OSError:  # ended meanwhile
        return False
    return f"MPSCL_CLUSTER_NODE={cluster.folder}/1".encode() in environment


def starts(run: RunDirectory) -> list[int]:
    """Steps at which it started."""
    log = (run.logs / "worker-0.log").read_text(encoding="utf-8")
    return [int(step) for step in re.findall(r"training starts at step (\d+)", log)]


def steps(run: RunDirectory) -> int:
    return max((record["global_step"] for record in run.read_metrics()), default=0)


def lose_a_node_that_trains(cluster: LocalCluster, job: str, runs: dict[str, RunDirectory], beyond: int) -> str:
    """Kill the second node when one of these runs has come far enough there; returns the key of that run."""

    def found() -> list[str]:
        assert cluster.job(job)["status"] in ("PENDING", "RUNNING"), cluster.logs(job)
        return [
            key
            for key, run in runs.items()
            if beyond < steps(run) < SHARED + OWN - EVERY and on_the_second_node(cluster, run)
        ]

    (lost,) = wait_until(found, "a training on the second node")
    cluster.script("kill", "1")
    return str(lost)


def kill_the_process_of_a_trial(runs: dict[str, RunDirectory]) -> str:
    """SIGKILL to the process that Ray Tune runs one of these trials in; returns the key of the trial."""

    def training() -> list[str]:
        return [
            key
            for key, run in runs.items()
            if SHARED + EVERY < steps(run) < SHARED + OWN - EVERY and run.read_status()["state"] == "running"
        ]

    key = str(wait_until(training, "another trial")[0])
    os.kill(runs[key].read_status()["pid"], signal.SIGKILL)
    return key


def assert_ended(cluster: LocalCluster, job: str) -> None:
    """The job has succeeded, and no place and no process of its trainings is left."""
    ended = ("SUCCEEDED", "FAILED", "STOPPED")
    wait_until(lambda: cluster.job(job)["status"] in ended, f"the end of {job}", 2 * PATIENCE_S)
    assert cluster.job(job)["status"] == "SUCCEEDED", cluster.logs(job)

    def left() -> list[str]:
        groups = cluster.get("/api/v0/placement_groups", cluster.token)[1]["data"]["result"]["result"]
        places = [group["placement_group_id"] for group in groups if group["state"] != "REMOVED"]
        return places + [title for title in cluster.processes(0) if OF_TRAININGS.match(title)]

    deadline = time.monotonic() + 60
    while left() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left() == []


def test_a_search_that_loses_a_node_and_a_process_ends_each_trial_once(
    cluster: LocalCluster, data: Path, tmp_path: Path
) -> None:
    folders = [f"data.source={data / 'mr'}", f"data.target={data / 'ct'}", f"run.storage={data / 'runs'}"]
    space = to_dict(load_config("small/mpscl", [*SETTINGS, *folders, *LENGTHS, "run.name=lossy"]))
    space |= {
        "preset": "small/mpscl",
        "search": {"method": "grid", "scheduler": "fifo", "evaluate": "none"},
        "space": {"method.margin_source": {"choice": [0, 0.2, 0.4]}},
    }
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    submit(cluster, "search", tmp_path, "mpscl_ray.tune", str(tmp_path / "space.yaml"))
    folder = data / "runs" / "lossy"
    runs = {f"lossy-{number:03d}": RunDirectory(folder / "trials" / f"{number:03d}") for number in (1, 2, 3)}
    lost = lose_a_node_that_trains(cluster, "search", runs, SHARED + EVERY)
    reached = steps(runs[lost])
    hit = kill_the_process_of_a_trial({name: run for name, run in runs.items() if name != lost})
    assert_ended(cluster, "search")

    trials = Ledger(folder / "ledger.jsonl").trials
    records = [json.loads(line) for line in (folder / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(record["number"] for record in records if record["event"] == "end") == [1, 2, 3]
    for trial in trials.values():
        assert (trial.state, list(trial.reports)) == ("finished", list(range(EVERY, OWN + 1, EVERY)))
    for name, run in runs.items():
        begun = starts(run)
        assert begun[0] == SHARED
        assert name in (lost, hit) or len(begun) == 1, "the others are not disturbed"
    assert starts(runs[lost])[-1] >= reached - EVERY, "at most one checkpoint interval is done again"
    assert starts(runs[hit])[-1] > SHARED

    shown = {entry["name"]: entry["status"] for entry in trainings(cluster)}
    assert shown == {"lossy/shared": "FINISHED"}, "the trials train in the processes of Ray Tune"
