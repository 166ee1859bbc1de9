"""Jobs on a real cluster of two nodes, guarded by a token: submitted, followed, stopped, resumed, cut in half."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mpscl_ray.config import load_config, to_yaml
from mpscl_ray.errors import ConfigError, Interrupted
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.run_directory import RunDirectory
from tests.local_cluster import ROOT, LocalCluster, wait_until
from tests.tiny import SETTINGS, make_pair

PHASE = 40
EVERY = 10
STEPS = 3 * PHASE
LONG = (
    *(f"phases.{phase}={PHASE}" for phase in ("source_only", "warm_up", "adaptation")),
    f"run.checkpoint_every={EVERY}",
    f"run.validate_every={PHASE}",
    "run.log_every=1",
    "scaling.num_workers=2",
    "scaling.resource_timeout_s=600",
)
BEYOND_THE_LIMIT = 600 * 2**20
"""Ray refuses to upload more than 500 MiB."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Two nodes with one CPU each: two workers need both of them."""
    with LocalCluster(nodes=2, cpus=1) as started:
        yield started


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout in which somebody has worked: with runs and data that must not travel."""
    copy = tmp_path_factory.mktemp("checkout")
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in files.stdout.splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    for folder in ("runs", "data"):
        (copy / folder).mkdir()
        with (copy / folder / "large").open("wb") as file:
            file.truncate(BEYOND_THE_LIMIT)
    return copy


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Builds the train command of a run."""
    data, storage = make_pair(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("runs")
    folders = [f"data.source={data / 'mr'}", f"data.target={data / 'ct'}", f"run.storage={storage}"]
    file = storage / "small.yaml"
    file.write_text(to_yaml(load_config("small/mpscl", [*SETTINGS, *folders, *LONG])))

    def build(name: str, *overrides: str) -> list[str]:
        return ["python", "-m", "mpscl_ray.train", str(file), f"run.name={name}", *overrides]

    return build


Train = Callable[..., list[str]]


def run_of(command: list[str]) -> RunDirectory:
    return RunDirectory(Path(command[3]).parent / command[4].removeprefix("run.name="))


def starts(run: RunDirectory) -> list[int]:
    """The steps at which worker 0 has started, in turn."""
    file = run.logs / "worker-0.log"
    return (
        [int(step) for step in re.findall(r"training starts at step (\d+)", file.read_text(encoding="utf-8"))]
        if file.exists()
        else []
    )


def step(run: RunDirectory) -> int:
    return max((record["global_step"] for record in run.read_metrics()), default=0)


def wait_for_steps(cluster: LocalCluster, job: str, run: RunDirectory, steps: int, start: int = 1) -> int:
    """Wait until the workers have made so many steps since their ``start``-th start; returns the step."""

    def reached() -> int:
        assert cluster.job(job)["status"] in ("PENDING", "RUNNING"), cluster.logs(job)
        begun = starts(run)
        return step(run) if len(begun) >= start and step(run) >= begun[start - 1] + steps else 0

    return int(wait_until(reached, f"step {steps} of {job}"))


# ------------------------------------------------------------------------------------ stopped, resumed, cut in half


@pytest.fixture(scope="module")
def resumed(cluster: LocalCluster, checkout: Path, train: Train) -> tuple[RunDirectory, str]:
    """A run that is stopped, goes on in another job, loses a node and gets it back; what the last job printed."""
    command = train("resumed")
    run = run_of(command)
    assert cluster.submit("first", *command, cwd=checkout, wait=False).returncode == 0
    reached = wait_for_steps(cluster, "first", run, EVERY + 3)
    assert cluster.command("ray", "job", "stop", "first").returncode == 0
    assert cluster.job("first")["status"] == "STOPPED"
    status = run.read_status()
    assert (status["state"], status["exit_code"]) == ("interrupted", Interrupted.exit_code)
    assert re.match(r"stopped by SIGTERM at iteration \d+ of the phase \w+, a checkpoint is written", status["reason"])
    stopped = step(run)
    assert reached <= stopped < STEPS
    newest = checkpoint.list_checkpoints(run.checkpoints)[-1]
    assert newest.name == checkpoint.checkpoint_name(stopped)
    checkpoint.verify(newest)
    assert status["resume_command"] in cluster.logs("first")
    assert shlex.split(status["resume_command"]) == command

    with ThreadPoolExecutor() as followers:
        following = followers.submit(cluster.submit, "second", *command, cwd=checkout)
        wait_until(lambda: cluster.get("/api/jobs/second", cluster.token)[0] == 200, "the second job")
        reached = wait_for_steps(cluster, "second", run, EVERY + 3, start=2)
        cluster.script("kill", "1")
        wait_until(lambda: "the workers are replaced" in cluster.logs("second"), "the notice of the loss")
        cluster.script("start", "1")
        try:
            followed = following.result()
        except subprocess.TimeoutExpired:
            nodes = cluster.command("ray", "status").stdout
            workers = [file.read_text(encoding="utf-8") for file in sorted(run.logs.glob("worker-*.log"))]
            pytest.fail("\n".join(["the job did not end", cluster.logs("second"), nodes, *workers]), pytrace=False)
    assert followed.returncode == 0, followed.stdout
    first, second, third = starts(run)
    assert (first, second) == (0, stopped)
    assert reached - EVERY <= third <= step(run), "at most one checkpoint interval is done again"
    return run, followed.stdout


def test_a_job_that_was_stopped_and_then_lost_a_node_succeeds(
    resumed: tuple[RunDirectory, str], cluster: LocalCluster
) -> None:
    run, printed = resumed
    assert cluster.job("second")["status"] == "SUCCEEDED"
    status = run.read_status()
    assert (status["state"], status["exit_code"], status["global_step"]) == ("finished", 0, STEPS)
    assert [record["global_step"] for record in run.read_metrics()] == list(range(1, STEPS + 1))
    assert (run.results / "phases.csv").is_file()
    assert re.search(r"worker . (was lost|was cut off).*; the workers are replaced", printed)
    assert printed.count("resuming from the checkpoint step-") == 2
    assert f"adaptation {PHASE}/{PHASE} (100%)" in printed
    assert "\r" not in printed
    assert "Traceback" not in printed
    assert "warning" not in printed.lower()


def test_the_cluster_shows_the_run_its_settings_its_nodes_and_its_loss(
    resumed: tuple[RunDirectory, str], cluster: LocalCluster
) -> None:
    run, _ = resumed
    status, content = cluster.get("/api/train/v2/runs/v1", cluster.token)
    assert status == 200
    shown = [entry for entry in content["train_runs"] if entry["name"].startswith(run.name)]
    assert len(shown) == 2
    last = max(shown, key=lambda entry: entry["start_time_ns"])
    assert last["status"] == "FINISHED"
    settings = last["run_settings"]["train_loop_config"]
    assert settings["phases"]["adaptation"] == PHASE
    assert settings["data"]["augmentation"]["rotation_deg"] == 10
    lost, replaced = last["attempts"]
    for attempt in (lost, replaced):
        assert len({worker["node_id"] for worker in attempt["workers"]}) == 2, "one worker on each node"
    assert lost["status"] == "ERRORED"
    with urllib.request.urlopen(f"http://127.0.0.1:{cluster.metrics_port(0)}/metrics", timeout=60) as answer:
        assert re.search(r"^ray_mpscl_restarts_total\{.*\} 1\.0$", answer.read().decode(), re.MULTILINE)


# ------------------------------------------------------------------------------------------------------ locked


def test_nobody_is_let_in_without_the_token(cluster: LocalCluster) -> None:
    for path in ("/api/jobs/", "/api/version", "/api/train/v2/runs/v1", "/api/v0/nodes"):
        assert cluster.get(path)[0] == 401
        assert cluster.get(path, "0" * 64)[0] == 403
        assert cluster.get(path, cluster.token)[0] == 200
    refused = cluster.command("ray", "job", "submit", "--", "true", RAY_AUTH_MODE="disabled")
    assert refused.returncode != 0
    assert "token authentication is enabled" in refused.stdout
    joined = "from mpscl_ray.distributed.ray_session import connect\nwith connect(): print('in')"
    friend = cluster.command("python", "-c", joined)
    assert friend.stdout == "in\n", "and no warning"


def test_the_token_is_in_no_log_and_no_run(resumed: tuple[RunDirectory, str], cluster: LocalCluster) -> None:
    run, printed = resumed
    token = cluster.token
    assert token not in printed
    files = [file for folder in (run.path, cluster.folder) for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 50
    assert [str(file) for file in files if token.encode() in file.read_bytes()] == [str(cluster.folder / "token")]


# -------------------------------------------------------------------------------------------------- what goes wrong


def test_a_job_that_cannot_run_fails_with_its_sentence(cluster: LocalCluster, train: Train) -> None:
    command = train("refused", "scaling.worker=2")
    done = cluster.submit("refused", *command)
    assert done.returncode == 1
    assert (
        "error: 'scaling.worker' on the command line is not a setting; did you mean 'scaling.num_workers'?"
        in done.stdout
    )
    assert cluster.job("refused")["status"] == "FAILED"
    assert f"exit code {ConfigError.exit_code}" in cluster.job("refused")["message"]
