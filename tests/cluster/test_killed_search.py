"""A search that is killed in turn in its shared phases, in its trials and near its end, and resumes each time."""

from __future__ import annotations

import re
from pathlib import Path

from mpscl_ray.distributed.ray_session import connect
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.tune import command as tune
from mpscl_ray.tune.ledger import Ledger
from tests.ray_commands import assert_nothing_is_reserved, run_until_killed
from tests.tiny import make_pair
from tests.tiny_search import ITERATIONS, SHARED_STEPS, ends, trials_of, write_space


def test_a_killed_search_resumes_and_accounts_for_each_trial_once(tmp_path: Path) -> None:
    data = make_pair(tmp_path)
    margins = {"method.margin_source": {"choice": [0, 0.2, 0.4]}}
    file = write_space(data, "killed", margins, method="grid", scheduler="fifo", evaluate="none")
    folder = data / "runs" / "killed"
    ledger = folder / "ledger.jsonl"

    def reports() -> int:
        return ledger.read_text(encoding="utf-8").count('"report"') if ledger.exists() else 0

    with connect(2, object_store_memory=200 * 2**20):
        run_until_killed(["mpscl_ray.tune", file], lambda: (folder / "shared" / "metrics.jsonl").exists())
        assert ends(folder) == []
        run_until_killed(["mpscl_ray.tune", file], lambda: reports() >= 2)
        in_the_middle = Ledger(ledger)
        assert not all(trial.ended for trial in in_the_middle.trials.values())
        begun = {
            number: max(
                (r["global_step"] for r in RunDirectory(folder / "trials" / f"{number:03d}").read_metrics()), default=0
            )
            for number in in_the_middle.trials
        }
        run_until_killed(["mpscl_ray.tune", file], lambda: len(ends(folder)) >= 1)
        assert tune.main([file]) == 0
        assert_nothing_is_reserved()
    assert ends(folder) == [1, 2, 3]
    trials = trials_of(folder)
    assert [trial.settings["method.margin_source"] for trial in trials] == [0, 0.2, 0.4]
    for trial in trials:
        assert trial.state == "finished"
        assert list(trial.reports) == list(range(2, ITERATIONS + 1, 2)), "no report twice, none left out"
        log = (folder / "trials" / f"{trial.number:03d}" / "logs" / "worker-0.log").read_text(encoding="utf-8")
        starts = [int(step) for step in re.findall(r"training starts at step (\d+)", log)]
        assert starts[0] == SHARED_STEPS, "a trial begins where the shared phases ended"
        if begun.get(trial.number, 0) > SHARED_STEPS + 2:
            assert starts[-1] > SHARED_STEPS, "an interrupted trial resumes from its own checkpoint"
