"""A comparison whose cell loses its process, with its workers on Ray Train, and which is stopped by a signal then."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mpscl_ray.compare import command as compare
from mpscl_ray.distributed.ray_session import connect
from mpscl_ray.runs.run_directory import RunDirectory
from tests.ray_commands import PATIENCE_S, environment
from tests.tiny import make_pair
from tests.tiny_presets import write_presets


def processes_of_cells() -> list[int]:
    """Trials of Ray Tune, of the cluster that was started here, which is below this process."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):  # ended meanwhile
            if (process / "cmdline").read_text(encoding="utf-8").startswith("ray::ImplicitFunc"):
                parents = [int(process.name)]
                while parents[-1] > 1 and parents[-1] != os.getpid():
                    status = (Path("/proc") / str(parents[-1]) / "status").read_text(encoding="utf-8")
                    parents.append(int(status.partition("PPid:")[2].split()[0]))
                found += parents[:1] if parents[-1] == os.getpid() else []
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with connect(2, object_store_memory=200 * 2**20):
        yield


def test_a_lost_cell_resumes_a_signal_stops_it_after_a_checkpoint_and_the_same_command_resumes(
    cluster: None, tmp_path: Path
) -> None:
    data, presets, out = make_pair(tmp_path / "data"), write_presets(tmp_path / "presets", phase=60), tmp_path / "out"
    words = ["--data", str(data / "mr"), str(data / "ct"), "--presets", str(presets), "--out", str(out)]
    words += ["--seeds", "1", "--directions", "forward", "mpscl", "run.log_every=1"]
    run = RunDirectory(out / "cells" / "mr2ct-seed1-mpscl")
    log, output = run.logs / "worker-0.log", out.with_suffix(".txt")
    with output.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "mpscl_ray.compare", *words], env=environment(), stdout=stream, stderr=stream
        )
        try:
            deadline = time.monotonic() + PATIENCE_S
            for start in (1, 2):
                while time.monotonic() < deadline and process.poll() is None:
                    begun = re.findall(
                        r"training starts at step (\d+)", log.read_text(encoding="utf-8") if log.exists() else ""
                    )
                    if len(begun) == start and len(run.read_metrics()) >= int(begun[-1]) + 3:
                        break
                    time.sleep(0.1)
                if start == 1:
                    (cell,) = processes_of_cells()
                    os.kill(cell, signal.SIGKILL)
            assert int(begun[1]) > 0, "it resumes from a checkpoint"
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 130, output.read_text(encoding="utf-8")
        finally:
            process.kill()
    assert 3 <= run.read_metrics()[-1]["global_step"] < 180
    text = output.read_text(encoding="utf-8")
    assert "to resume" in text
    assert "lost its process and resumes from its last checkpoint: " in text
    assert "Traceback" not in text
    assert json.loads((out / "status.json").read_text(encoding="utf-8"))["state"] == "interrupted"
    assert compare.main(words) == 0
    assert [record["global_step"] for record in run.read_metrics()] == list(range(1, 181))
    assert json.loads((out / "cells.json").read_text(encoding="utf-8"))["cells"][run.name]["state"] == "finished"
