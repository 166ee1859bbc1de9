"""A node whose end is announced: a checkpoint is written before it goes, and the run continues from it."""

from __future__ import annotations

import time
from pathlib import Path

from mpscl_ray.errors import Interrupted
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.run_directory import RunDirectory
from tests.cluster.test_elastic import LONG, PATIENCE_S, sizes, starts, steps, words
from tests.nodes import cluster, wait_for
from tests.tiny import make_pair

NEVER = "run.checkpoint_every=1000000"
GRACE_S = 120


def test_a_node_that_will_be_preempted_leads_to_a_checkpoint_in_time(tmp_path: Path) -> None:
    make_pair(tmp_path)
    run, output = RunDirectory(tmp_path / "runs" / "spot"), tmp_path / "output.txt"
    with cluster() as pair:
        second = pair.add()
        process = pair.command(output, *words(tmp_path, "spot", *LONG, NEVER, "scaling.num_workers=[1,2]"))
        deadline = time.monotonic() + PATIENCE_S

        def alive() -> bool:
            assert process.poll() is None, output.read_text(encoding="utf-8")
            assert time.monotonic() < deadline, output.read_text(encoding="utf-8")
            time.sleep(0.1)
            return True

        while alive() and (sizes(run) != [2] or steps(run) < 20):
            pass
        assert checkpoint.list_checkpoints(run.checkpoints) == []
        announced = time.monotonic()
        pair.announce_preemption(second, GRACE_S)
        while alive() and not checkpoint.list_checkpoints(run.checkpoints):
            assert time.monotonic() - announced < GRACE_S
        (saved,) = checkpoint.list_checkpoints(run.checkpoints)
        reached = steps(run)
        while alive() and steps(run) < reached + 20:
            pass  # the run goes on as long as the node lives
        assert sizes(run) == [2]
        second.kill()
        while alive() and (sizes(run) != [2, 1] or steps(run) < starts(run)[1] + 20):
            pass
        assert starts(run)[1] == checkpoint.step_of(saved)
        process.terminate()
        assert wait_for(process, output, PATIENCE_S) == Interrupted.exit_code
    text = output.read_text(encoding="utf-8")
    assert (
        "the node of worker 1 will be taken away in " in text or "the node of worker 0 will be taken away in " in text
    )
    assert text.count("will be taken away") == 1, text
