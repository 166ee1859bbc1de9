"""A run on two nodes of one CPU each: what every node must see, and what happens when one of them goes and comes."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpscl_ray.errors import Interrupted, StorageError
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.run_directory import RunDirectory
from tests.nodes import Cluster, cluster, wait_for
from tests.tiny import SETTINGS, make_pair, tiny_settings

PATIENCE_S = 900
EVERY = 20
LONG = (
    "phases.source_only=1000000",
    f"run.checkpoint_every={EVERY}",
    "run.validate_every=1000000",
    "run.log_every=10",
    "optim.lr=1e-4",
    "scaling.resize_check_s=5",
)
"""Never ends by itself."""


@pytest.fixture(scope="module")
def pair() -> Iterator[Cluster]:
    with cluster() as started:
        yield started


def places(folder: Path) -> list[str]:
    return [f"data.source={folder / 'mr'}", f"data.target={folder / 'ct'}", f"run.storage={folder / 'runs'}"]


def words(folder: Path, name: str, *overrides: str) -> list[str]:
    settings = [*tiny_settings("small/source_only"), *places(folder), f"run.name={name}", *overrides]
    return ["mpscl_ray.train", "small/source_only", *settings]


def steps(run: RunDirectory) -> int:
    return max((record["global_step"] for record in run.read_metrics()), default=0)


def sizes(run: RunDirectory) -> list[int]:
    """Number of workers of each start that came to training, as worker 0 logged it."""
    return [int(size) for size in re.findall(r"training starts at step \d+ with (\d+) workers", log(run))]


def starts(run: RunDirectory) -> list[int]:
    """Step that each of them began at."""
    return [int(step) for step in re.findall(r"training starts at step (\d+)", log(run))]


def log(run: RunDirectory) -> str:
    file = run.logs / "worker-0.log"
    return file.read_text(encoding="utf-8") if file.exists() else ""


def test_a_node_that_does_not_see_the_run_folder_is_named_before_the_first_step(pair: Cluster, tmp_path: Path) -> None:
    make_pair(tmp_path)
    (tmp_path / "runs").mkdir()
    stray = pair.add(hide=tmp_path / "runs")
    try:
        one = [*places(tmp_path), "scaling.num_workers=1"]
        for name, command in (
            ("stray", words(tmp_path, "stray")),
            ("search", ["mpscl_ray.tune", *SETTINGS, *one, "run.name=search"]),
            ("compare", ["mpscl_ray.compare", "source_only", "--directions", "forward", "--presets", "small", *one]),
        ):
            output = tmp_path / f"{name}.txt"
            code = wait_for(pair.command(output, *command), output, PATIENCE_S)
            assert code == StorageError.exit_code, output.read_text(encoding="utf-8")
            sentence = rf"error: node 127.0.0.2: {tmp_path / 'runs' / name} is another folder there than where the"
            assert re.search(sentence, output.read_text(encoding="utf-8")), output.read_text(encoding="utf-8")
    finally:
        pair.lose(stray)
    assert steps(RunDirectory(tmp_path / "runs" / "stray")) == 0
    assert not (tmp_path / "runs" / "search" / "trials").exists()
    assert not list((tmp_path / "runs" / "compare" / "cells").iterdir())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("elastic"))


def test_a_lost_node_shrinks_the_run_and_a_new_one_grows_it(pair: Cluster, folder: Path) -> None:
    second = pair.add()
    run, output = RunDirectory(folder / "runs" / "elastic"), folder / "output.txt"
    process = pair.command(output, *words(folder, "elastic", *LONG, "scaling.num_workers=[1,2]"))

    def wait_until_trained_by(workers: list[int]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while sizes(run) != workers or steps(run) < starts(run)[-1] + 2 * EVERY:
            assert process.poll() is None, output.read_text(encoding="utf-8")
            assert time.monotonic() < deadline, output.read_text(encoding="utf-8")
            time.sleep(0.1)

    wait_until_trained_by([2])
    reached = steps(run)
    second.kill()
    wait_until_trained_by([2, 1])
    assert starts(run)[1] >= reached - EVERY, "at most one checkpoint interval is done again"
    pair.add()
    wait_until_trained_by([2, 1, 2])
    process.terminate()
    assert wait_for(process, output, PATIENCE_S) == Interrupted.exit_code, output.read_text(encoding="utf-8")
    text = output.read_text(encoding="utf-8")
    for notice in (
        "training with 2 of 1 to 2 workers",
        "training with 1 of 1 to 2 workers",
        "the workers are replaced and resume",
    ):
        assert notice in text, text

    end = checkpoint.list_checkpoints(run.checkpoints)[-1]
    assert [record["global_step"] for record in run.read_metrics()][-1] == checkpoint.step_of(end)
