"""The phantom hearts as a dataset: commands that start at the same moment, and what a killed one has left."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpscl_ray.data.dataset import load_manifest
from mpscl_ray.data.parquet_reader import read_case
from mpscl_ray.prepare import phantom_dataset
from mpscl_ray.runs.storage import join_location
from tests.nodes import ROOT
from tests.s3 import Server, serve

SCRIPT = """
import sys
from mpscl_ray.prepare import phantom_dataset
from mpscl_ray.runs.storage import parse_location
print("ready", flush=True)
sys.stdin.readline()
print(phantom_dataset.phantom_dataset(parse_location(sys.argv[1]), {"train": 1, "val": 1, "test": 1}))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("s3")) as started:
        yield started


def make_at_once(storage: str) -> list[str]:
    """What two processes print that make it at the same moment."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, storage],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    ends = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    return [out.splitlines()[-1] for out, _ in ends]


@pytest.mark.parametrize("where", ["folder", pytest.param("bucket", marks=pytest.mark.cluster)])
def test_commands_that_start_at_once_use_the_same_hearts(where: str, server: Server, tmp_path: Path) -> None:
    storage = str(tmp_path / "runs") if where == "folder" else server.url("runs")
    first, second = make_at_once(storage)
    assert first == second
    for modality in phantom_dataset.MODALITIES:
        dataset = join_location(first, modality)
        manifest = load_manifest(dataset)
        assert [case.split for case in manifest.cases] == ["train", "val", "test"]
        assert ".unfinished" not in manifest.command
        for case in manifest.cases:
            read_case(dataset, case)
    if where == "folder":
        assert [path.name for path in (tmp_path / "runs").iterdir()] == [Path(first).parent.name], (
            "nothing else is left"
        )


def test_half_a_dataset_is_replaced(tmp_path: Path) -> None:
    cases = {"train": 1, "val": 1, "test": 1}
    made = phantom_dataset.phantom_dataset(tmp_path, cases)
    assert isinstance(made, Path)
    (made / "mr" / "manifest.json").unlink()
    assert phantom_dataset.phantom_dataset(tmp_path, cases) == made
    assert len(load_manifest(made / "mr").cases) == 3
