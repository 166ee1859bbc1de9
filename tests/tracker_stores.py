"""What is in the local stores of MLflow and Weights & Biases, read with their own libraries."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.runs.trackers import TRACKERS_FOLDER


def forget_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out those of the user, and after the test those that the trackers are given."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")


def mlflow_runs(run: RunDirectory, experiment: str = "mpscl_ray") -> tuple[Any, list[Any]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run.path / TRACKERS_FOLDER / 'mlflow.db'}")
    return client, client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def wandb_records(file: Path) -> Iterator[Any]:
    """Records of a .wandb file, which is a log of LevelDB after seven bytes: blocks of 32 KiB with parts of records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, record = file.read_bytes(), 7, b""
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


def wandb_history(files: Sequence[Path], tag: str) -> list[tuple[int, float]]:
    """Step and value of each record of a tag, over the files of a run in order."""
    found = []
    for file in files:
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "history":
                items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                if tag in items:
                    found.append((int(items["_step"]), json.loads(items[tag])))
    return found


def wandb_files(run: RunDirectory) -> list[Path]:
    return sorted((run.path / TRACKERS_FOLDER / "wandb").glob("offline-run-*/run-*.wandb"))
