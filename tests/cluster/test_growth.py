"""Searches and comparisons on a cluster that gets a node and loses it again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpscl_ray.runs.run_directory import RunDirectory
from tests.local_cluster import wait_until
from tests.nodes import Cluster, cluster, wait_for
from tests.tiny import make_pair
from tests.tiny_presets import write_presets
from tests.tiny_search import ends, trials_of, write_space

PATIENCE_S = 900


@pytest.fixture(scope="module")
def head() -> Iterator[Cluster]:
    with cluster() as started:
        yield started


def running(folder: Path) -> list[RunDirectory]:
    """Runs in a folder that train now."""
    runs = [RunDirectory(path) for path in sorted(folder.glob("*"))]
    return [run for run in runs if run.read_status().get("state") == "running" and run.read_metrics()]


def starts(run: RunDirectory) -> int:
    return len(re.findall("training starts", (run.logs / "worker-0.log").read_text(encoding="utf-8")))


def grow_and_shrink(head: Cluster, output: Path, folder: Path, *words: str) -> None:
    """Run a command; add a node when one run trains, and kill it when two do. The command ends well.

    A run that trains is suspended until then: on a fast machine it would end before the node has joined.
    """
    process = head.command(output, *words)
    suspended: set[int] = set()
    try:

        def are_running(number: int) -> bool:
            assert process.poll() is None, output.read_text(encoding="utf-8")
            for run in running(folder):
                pid = run.read_status()["pid"]
                if pid not in suspended:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGSTOP)
                        suspended.add(pid)
            return len(suspended) == number

        wait_until(lambda: are_running(1), "a run", PATIENCE_S)
        node = head.add()
        wait_until(lambda: are_running(2), "a second run", PATIENCE_S)
        head.lose(node)
        resume(suspended)
        assert wait_for(process, output, PATIENCE_S) == 0, output.read_text(encoding="utf-8")
    finally:
        resume(suspended)
        process.kill()


def resume(suspended: set[int]) -> None:
    """Let suspended processes go on, those that are still there."""
    while suspended:
        with contextlib.suppress(ProcessLookupError):
            os.kill(suspended.pop(), signal.SIGCONT)


def test_a_search_grows_with_the_cluster_and_goes_on_without_a_node_that_left(head: Cluster, tmp_path: Path) -> None:
    data = make_pair(tmp_path)
    margins = {"method.margin_source": {"choice": [0, 0.2, 0.4]}}
    file = write_space(data, "growing", margins, method="grid", scheduler="fifo", evaluate="none")
    folder = data / "runs" / "growing"
    longer = ("phases.adaptation=200", "run.validate_every=50", "run.checkpoint_every=10", "run.log_every=5")
    grow_and_shrink(head, tmp_path / "search.txt", folder / "trials", "mpscl_ray.tune", file, *longer)
    assert ends(folder) == [1, 2, 3], "each trial once"
    assert [list(trial.reports) for trial in trials_of(folder)] == [list(range(50, 201, 50))] * 3
    assert max(starts(RunDirectory(folder / "trials" / f"{number:03d}")) for number in (1, 2, 3)) == 2


def test_a_comparison_grows_with_the_cluster_and_goes_on_without_a_node_that_left(
    head: Cluster, tmp_path: Path
) -> None:
    data, presets, out = make_pair(tmp_path / "data"), write_presets(tmp_path / "presets", phase=200), tmp_path / "out"
    words = ["--data", str(data / "mr"), str(data / "ct"), "--presets", str(presets), "--out", str(out)]
    words += ["--seeds", "3", "--directions", "forward", "source_only", "run.log_every=5", "run.checkpoint_every=10"]
    grow_and_shrink(head, tmp_path / "table.txt", out / "cells", "mpscl_ray.compare", *words)
    cells = json.loads((out / "cells.json").read_text(encoding="utf-8"))["cells"]
    assert [cell["state"] for cell in cells.values()] == ["finished"] * 3
    assert max(starts(RunDirectory(run)) for run in (out / "cells").iterdir()) == 2
