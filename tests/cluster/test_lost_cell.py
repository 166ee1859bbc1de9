"""A comparison whose cell, with its workers on Ray Train, loses its process and is stopped by a signal."""

from __future__ import annotations

from pathlib import Path

from mpscl_ray.compare import command as compare
from mpscl_ray.distributed.ray_session import connect
from tests.lost_cell import check_a_lost_and_stopped_cell
from tests.tiny import make_pair
from tests.tiny_presets import write_presets


def test_a_lost_cell_resumes_a_signal_stops_it_after_a_checkpoint_and_the_same_command_resumes(tmp_path: Path) -> None:
    data, presets = make_pair(tmp_path / "data"), write_presets(tmp_path / "presets", phase=60)
    words = ["--data", str(data / "mr"), str(data / "ct"), "--presets", str(presets), "--out", str(tmp_path / "out")]
    with connect(2, object_store_memory=200 * 2**20):
        check_a_lost_and_stopped_cell(tmp_path / "out", ["mpscl_ray.compare"], words, compare.main)
