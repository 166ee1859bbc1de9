"""Event files, as TensorBoard reads them."""

from __future__ import annotations

import math
import os
import re
import struct
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from mpscl_ray.errors import StorageError
from mpscl_ray.runs import tensorboard
from mpscl_ray.runs.tensorboard import TensorBoard


def events_of(folder: Path) -> list[Event]:
    """All events as TensorBoard reads them: files by name, records after their lengths, purged at each restart."""
    events: list[Event] = []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                events = [earlier for earlier in events if earlier.step < event.step]
            events.append(event)
            data = data[16 + length :]
    return events


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events_of(folder):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_records_arrive_under_their_tags_at_once(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "tensorboard", warn=print)
    record = {
        "global_step": 20,
        "phase": "adaptation",
        "iteration": 5,
        "train/loss_segmentation": 0.5,
        "train/pseudo_label_fraction": torch.tensor(0.25),
        "val/dice/LVC": np.float64(0.75),
        "val/dice/AA": math.nan,
        "val/source/dice/mean": 1,
        "perf/images_per_s": math.inf,
    }
    board.record(record)
    assert scalars_of(tmp_path / "tensorboard") == {
        "train/loss_segmentation": [(20, 0.5)],
        "train/pseudo_label_fraction": [(20, 0.25)],
        "val/dice/LVC": [(20, 0.75)],
        "val/source/dice/mean": [(20, 1.0)],
        "perf/images_per_s": [(20, math.inf)],
    }
    board.close()
    board.close()
    board.record(record)


def test_documented_tags_are_kept_word_for_word(tmp_path: Path) -> None:
    assert tensorboard.__doc__ is not None
    tags = re.findall(
        r"(?:train|val|perf)/[\w/]+", tensorboard.__doc__.replace("*", "main").replace("<structure>", "LVC")
    )
    assert len(tags) >= 9
    with closing(TensorBoard(tmp_path, warn=print)) as board:
        board.record({"global_step": 1, **dict.fromkeys(tags, 1.0)})
    assert set(scalars_of(tmp_path)) == set(tags)


def test_curves_are_continuous_over_restarts(tmp_path: Path) -> None:
    with closing(TensorBoard(tmp_path, warn=print)) as board:
        for step in range(10, 60, 10):
            board.record({"global_step": step, "train/loss": 1.0})
    # Two restarts within a second; the first of them is killed before it closes its file.
    killed = TensorBoard(tmp_path, resume_step=30, warn=print)
    killed.record({"global_step": 40, "train/loss": 2.0})
    with closing(TensorBoard(tmp_path, resume_step=40, warn=print)) as board:
        board.record({"global_step": 50, "train/loss": 3.0})
    assert scalars_of(tmp_path)["train/loss"] == [(10, 1.0), (20, 1.0), (30, 1.0), (40, 2.0), (50, 3.0)]
    killed.close()


def test_panel_is_a_png(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    with closing(TensorBoard(tmp_path, warn=print)) as board:
        board.panel(7, "target", image)
    (value,) = [value for event in events_of(tmp_path) for value in event.summary.value]
    assert value.tag == "panel/target"
    assert (value.image.height, value.image.width) == (20, 30)
    assert value.image.encoded_image_string.startswith(b"\x89PNG")


def test_full_disk_is_said_once_and_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    board = TensorBoard(tmp_path, warn=warnings.append)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for step in range(100):
            board.record({"global_step": step, "train/loss": 1.0})
    board.close()
    assert len(warnings) == 1
    assert f"{tmp_path} cannot be written (No space left on device)" in warnings[0]


def test_unwritable_folder_is_said_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(StorageError, match="tensorboard is a file where a folder is needed"):
        TensorBoard(tmp_path / "tensorboard", warn=print)


def test_hyperparameters_are_what_tensorboard_compares_runs_by(tmp_path: Path) -> None:
    with closing(TensorBoard(tmp_path, warn=print)) as board:
        board.hyperparameters(
            {"method.gamma": 0.3, "method.margin_form": "paper", "data.in_memory": True}, ["search/score"]
        )
    plugins = [
        HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for event in events_of(tmp_path)
        for value in event.summary.value
    ]
    session = next(plugin.session_start_info for plugin in plugins if plugin.HasField("session_start_info"))
    assert session.hparams["method.gamma"].number_value == 0.3
    assert session.hparams["method.margin_form"].string_value == "paper"
    assert session.hparams["data.in_memory"].bool_value or session.hparams["data.in_memory"].number_value == 1
    experiment = next(plugin.experiment for plugin in plugins if plugin.HasField("experiment"))
    assert [info.name.tag for info in experiment.metric_infos] == ["search/score"]
