"""The status of a training that is killed, as another process reads it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from mpscl_ray.report.runs import read_runs
from mpscl_ray.runs.run_directory import RunDirectory
from tests.tiny import make_pair, tiny_settings

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = "import sys, mpscl_ray; mpscl_ray.train_segmenter('small/mpscl', sys.argv[1:], device='cpu')"


def test_a_killed_training_says_where_it_was_and_that_it_is_dead(tmp_path: Path) -> None:
    data = make_pair(tmp_path / "data")
    settings = [*tiny_settings("small/mpscl"), f"data.source={data / 'mr'}", f"data.target={data / 'ct'}"]
    settings += [f"run.storage={tmp_path}", "run.name=run", "phases.source_only=100000", "run.log_every=1"]
    run = RunDirectory(tmp_path / "run")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, *settings], env=environment, start_new_session=True)
    try:
        seen: list[int] = []
        deadline = time.monotonic() + 120
        while len(seen) < 2 and time.monotonic() < deadline and process.poll() is None:
            status = run.read_status()
            if status.get("global_step", 0) > max(seen, default=0):
                seen.append(status["global_step"])
            time.sleep(0.05)
        assert len(seen) == 2, "the status does not move"
        assert run.store.lock_owner() == process.pid
        assert "running (iteration " in read_runs([run.path])[0].state
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    status = run.read_status()
    assert (status["state"], status["pid"], status["phase"]) == ("running", process.pid, "source_only")
    assert seen[1] <= status["global_step"] == status["iteration"] <= run.read_metrics()[-1]["global_step"]
    assert (status["iterations"], status["total_steps"]) == (100000, 100008)
    assert status["iterations_per_s"] > 0 < status["eta_s"]
    assert status["checkpoint"].startswith("step-")
    assert status["validation"]["global_step"] > 0
    assert run.store.lock_owner() is None
    assert read_runs([run.path])[0].state.startswith(
        f"killed (iteration {status['iteration']} of source_only); the same"
    )
