"""The run folder as the experiment folder of Ray Train: its name and place, on a disk and in a bucket."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from pyarrow import fs

from mpscl_ray.runs.run_directory import RunDirectory, open_run
from mpscl_ray.train.ray.account import experiment, remove_account


@pytest.mark.parametrize(
    ("run", "display_name", "name", "above"),
    [
        ("runs/lge", "lge", "lge", "runs"),
        ("runs/mine/trials/007", "mine-007", "mine/trials/007", "runs"),
        ("runs/mine/shared", "mine-shared", "mine/shared", "runs"),
        ("runs/compare/cells/mpscl-a-b-1", "mpscl-a-b-1", "mpscl-a-b-1", "runs/compare/cells"),
    ],
)
def test_the_name_says_which_run_it_is(run: str, display_name: str, name: str, above: str, tmp_path: Path) -> None:
    found = experiment(RunDirectory(tmp_path / run), display_name)
    assert (found["name"], found["storage_path"]) == (name, str(tmp_path / above))
    assert found["storage_filesystem"] == fs.LocalFileSystem()

    found = experiment(open_run(f"s3://hearts/{run}?endpoint_override=localhost:9000&region=r"), display_name)
    assert (found["name"], found["storage_path"]) == (name, f"hearts/{above}")
    travelled = pickle.loads(pickle.dumps(found["storage_filesystem"]))  # to the workers, as Ray Train sends it
    assert isinstance(travelled, fs.S3FileSystem)
    assert travelled == found["storage_filesystem"]


def test_what_ray_train_wrote_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ("checkpoint_manager_snapshot.json", ".validate_storage_marker", "metrics.jsonl"):
        (tmp_path / name).touch()
    remove_account(RunDirectory(tmp_path))
    remove_account(RunDirectory(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
