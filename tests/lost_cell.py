"""A comparison whose cell loses its process, and which is stopped by a signal then."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from mpscl_ray.runs.run_directory import RunFolder
from tests.ray_commands import PATIENCE_S, environment


def processes_of_cells() -> list[int]:
    """Those of the cluster that was started here, which is below this process."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):  # ended meanwhile
            if (process / "cmdline").read_text().startswith("ray::run_cell"):
                parents = [int(process.name)]
                while parents[-1] > 1 and parents[-1] != os.getpid():
                    status = (Path("/proc") / str(parents[-1]) / "status").read_text()
                    parents.append(int(status.partition("PPid:")[2].split()[0]))
                found += parents[:1] if parents[-1] == os.getpid() else []
    return found


def check_a_lost_and_stopped_cell(
    out: Path, command: Sequence[str], words: Sequence[str], again: Callable[[list[str]], int]
) -> None:
    """Kill the process of the one cell, stop the command by SIGTERM when the cell has resumed, and run it again.

    Args:
        out: folder of the comparison, of presets with 60 iterations a phase.
        command: words after ``python -m`` that are the compare command.
        words: its arguments, without the cell.
        again: runs the command in this process.
    """
    words = [*words, "--seeds", "1", "--directions", "forward", "mpscl", "run.report_every=1"]
    run = RunFolder(out / "cells" / "mr2ct-seed1-mpscl")
    log, output = run.logs / "worker-0.log", out.with_suffix(".txt")
    with output.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, *words], env=environment(), stdout=stream, stderr=stream
        )
        try:
            deadline = time.monotonic() + PATIENCE_S
            for start in (1, 2):
                while time.monotonic() < deadline and process.poll() is None:
                    begun = re.findall(r"training starts at step (\d+)", log.read_text() if log.exists() else "")
                    if len(begun) == start and len(run.read_metrics()) >= int(begun[-1]) + 3:
                        break
                    time.sleep(0.1)
                if start == 1:
                    (cell,) = processes_of_cells()
                    os.kill(cell, signal.SIGKILL)
            assert int(begun[1]) > 0, "it resumes from a checkpoint"
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 130, output.read_text()
        finally:
            process.kill()
    assert 3 <= run.read_metrics()[-1]["global_step"] < 180
    assert "to go on" in output.read_text()
    assert json.loads((out / "status.json").read_text())["state"] == "interrupted"
    assert again(words) == 0
    assert [record["global_step"] for record in run.read_metrics()] == list(range(1, 181))
    assert json.loads((out / "cells.json").read_text())["cells"][run.name]["state"] == "finished"
