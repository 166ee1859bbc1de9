"""The tune command on a real local Ray: to the end, killed and gone on with, and nothing left behind."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ray = pytest.importorskip("ray")

from mpscl_ray import cli, tune  # noqa: E402
from mpscl_ray.cluster_session import connect  # noqa: E402
from mpscl_ray.config import load_config, to_dict  # noqa: E402
from mpscl_ray.run_folder import RunFolder  # noqa: E402
from mpscl_ray.search.ledger import Ledger, Trial  # noqa: E402
from tests.ray_commands import assert_nothing_is_reserved, run_until_killed  # noqa: E402
from tests.tiny import SETTINGS, make_dataset, make_pair  # noqa: E402

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 300
ITERATIONS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = make_pair(tmp_path_factory.mktemp("data"))
    make_dataset(base / "unlabelled", "ct", seed=1, labelled=())
    return base


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two CPUs, which trials of one worker fill."""
    with connect(2, object_store_memory=200 * 2**20):
        yield


@pytest.fixture(scope="module")
def space(data: Path) -> Callable[..., str]:
    """Writes a space over the tiny settings; gives its path."""

    def write(name: str, distributions: dict[str, Any], **search: Any) -> str:
        folders = [f"data.source={data / 'mr'}", f"data.target={data / 'ct'}", f"run.storage={data / 'runs'}"]
        lengths = [f"phases.adaptation={ITERATIONS}", "run.validate_every=2", "scaling.workers=1"]
        base = to_dict(load_config("small/mpscl", [*SETTINGS, *folders, *lengths]))
        base["run"]["name"] = name
        file = data / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**base, "preset": "small/mpscl", "search": search, "space": distributions}))
        return str(file)

    return write


@pytest.fixture
def here(
    cluster: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs the command in this process, on the cluster: exit code, and all that was printed."""

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["tune", *words])
        with pytest.raises(SystemExit) as ended:
            cli.run(tune.main)
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out + captured.err

    return run


Here = Callable[..., tuple[int, str]]
Spaces = Callable[..., str]


def trials_of(folder: Path) -> list[Trial]:
    return [trial for _, trial in sorted(Ledger(folder / "ledger.jsonl").trials.items())]


def ends(folder: Path) -> list[int]:
    """Number of each trial that has an end in the ledger, as often as it has."""
    ledger = folder / "ledger.jsonl"
    records = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    return sorted(record["number"] for record in records if record["event"] == "end")


def whole(space: Spaces) -> str:
    """Weights beyond what float32 holds make a loss that is not finite; of the others, ever fewer go on."""
    distributions = {"method.gamma": {"choice": [10, 1.0e39, 1, 0.1]}}
    return space("whole", distributions, method="grid", grace=2, reduction=50, metric="information", evaluate="all")


@pytest.fixture
def beginning(here: Here, space: Spaces, data: Path) -> str:
    """Run of the phases that the trials of a search share."""
    folder = data / "runs" / "whole" / "shared"
    if not RunFolder(folder).exists:
        assert here(whole(space))[0] == 0
    return str(folder)


def test_a_search_stops_what_falls_behind_records_what_fails_and_leaves_a_preset(
    here: Here, space: Spaces, data: Path
) -> None:
    file = whole(space)
    code, text = here(file)
    assert code == 0, text
    folder = data / "runs" / "whole"
    assert_nothing_is_reserved()
    assert ends(folder) == list(range(1, 5)), "every trial has one end"
    trials = trials_of(folder)
    assert {trial.number for trial in trials if trial.state == "failed"} == {2}
    assert all("not finite" in trial.reason for trial in trials if trial.state == "failed")
    stopped = [trial for trial in trials if trial.state == "stopped"]
    finished = [trial for trial in trials if trial.state == "finished"]
    assert stopped, "with less weight on the contrast they learn less in so few iterations"
    assert finished, "the best of all is never behind"
    assert all(list(trial.reports) == list(range(2, ITERATIONS + 1, 2)) for trial in finished)
    for trial in stopped:
        run = RunFolder(folder / "trials" / f"{trial.number:03d}")
        rung = int(trial.reason.rpartition(" ")[2])
        assert trial.iteration == rung < ITERATIONS, "it waited for the decision"
        assert run.read_metrics()[-1]["iteration"] <= rung + 1
        assert run.read_status()["state"] == "interrupted"
        assert not list(run.path.glob("checkpoints/*")), "weights of a stopped trial are of no use"
    shared = {record["phase"] for record in RunFolder(folder / "shared").read_metrics()}
    phases = {
        record["phase"] for t in trials for record in RunFolder(folder / "trials" / f"{t.number:03d}").read_metrics()
    }
    assert (shared, phases) == ({"source_only", "warm_up"}, {"adaptation"})

    summary = json.loads((folder / "results" / "summary.json").read_text())
    assert (summary["metric"], summary["oracle"]) == ("information", False)
    assert summary["trials"] == {"finished": len(finished), "stopped": len(stopped), "failed": 1}
    best = next(trial for trial in trials if trial.number == summary["best"])
    config = load_config(str(folder / "best.yaml"))
    assert config.method.gamma == best.settings["method.gamma"]  # type: ignore[union-attr]
    assert (config.run.name, config.phases.source_only, config.data.source) == ("whole-best", 4, str(data / "mr"))
    rows = list(csv.DictReader((folder / "results" / "trials.csv").open()))
    assert [row["state"] for row in rows] == [trial.state for trial in trials]
    evaluated = json.loads((folder / "results" / "test.json").read_text())["rows"]
    own = [int(row.split()[1].rstrip(":")) for row in evaluated if row.startswith("trial")]
    assert own == [trial.number for trial in finished]
    assert all((folder / "results" / f"{name}.png").stat().st_size for name in ("curves", "parallel", "effects"))
    assert len(list((folder / "tensorboard").glob("*/events*"))) == 4
    assert RunFolder(folder).read_status()["state"] == "finished"
    assert f"best: trial {best.number:03d}" in text
    assert "8 iterations) are trained once for all trials: 24 iterations less" in text

    before = (folder / "ledger.jsonl").read_text()
    tables = [folder / "results" / "test.json", *folder.glob("trials/*/results/*/summary.json")]
    written = [table.stat().st_mtime_ns for table in tables]
    assert len(written) > len(finished)
    code, again = here(file)
    assert (code, "4 trials" in again) == (0, True)
    assert (folder / "ledger.jsonl").read_text() == before, "a finished search is not run again"
    assert [table.stat().st_mtime_ns for table in tables] == written, "and not evaluated again"
    assert (folder / "results" / "test.txt").read_text() in again
    code, fewer = here(file, "search.evaluate=best")
    assert code == 0
    assert "search.evaluate: " in fewer
    phases = json.loads((folder / "results" / "test.json").read_text())["rows"]
    assert len(phases) == 3, "another choice is evaluated: of one trial, the end of each phase"
    code, refused = here(file, "method.delta_th=0.3")
    assert code == 2
    assert "was started with another config: method.delta_th: 0.25 in the run, 0.3 now" in refused


def test_a_killed_search_goes_on_and_accounts_for_each_trial_once(here: Here, space: Spaces, data: Path) -> None:
    distributions = {"method.margin_source": {"choice": [0, 0.2, 0.4]}}
    file = space("killed", distributions, method="grid", early_stopping=False, evaluate="none")
    folder = data / "runs" / "killed"
    ledger = folder / "ledger.jsonl"

    def reports() -> int:
        return ledger.read_text().count('"report"') if ledger.exists() else 0

    run_until_killed(["mpscl_ray.tune", file], lambda: (folder / "shared" / "metrics.jsonl").exists())
    assert ends(folder) == []
    run_until_killed(["mpscl_ray.tune", file], lambda: reports() >= 2)
    in_the_middle = Ledger(ledger)
    assert not all(trial.ended for trial in in_the_middle.trials.values())
    begun = {
        number: max(
            (r["global_step"] for r in RunFolder(folder / "trials" / f"{number:03d}").read_metrics()), default=0
        )
        for number in in_the_middle.trials
    }
    run_until_killed(["mpscl_ray.tune", file], lambda: len(ends(folder)) >= 1)
    code, text = here(file)
    assert code == 0, text
    assert_nothing_is_reserved()
    assert ends(folder) == [1, 2, 3]
    trials = trials_of(folder)
    assert [trial.settings["method.margin_source"] for trial in trials] == [0, 0.2, 0.4]
    for trial in trials:
        assert trial.state == "finished"
        assert list(trial.reports) == list(range(2, ITERATIONS + 1, 2)), "no report twice, none left out"
        log = (folder / "trials" / f"{trial.number:03d}" / "logs" / "worker-0.log").read_text()
        starts = [int(step) for step in re.findall(r"training starts at step (\d+)", log)]
        assert starts[0] == 8, "a trial begins where the shared phases ended"
        if begun.get(trial.number, 0) > 10:
            assert starts[-1] > 8, "an interrupted trial goes on from its own checkpoint"


def test_a_target_without_labels_is_searched_by_a_label_free_criterion_from_a_run_that_is_given(
    here: Here, space: Spaces, data: Path, beginning: str
) -> None:
    file = space("free", {"method.delta_th": {"uniform": [0, 0.5]}}, trials=1, evaluate="none")
    target = f"data.target={data / 'unlabelled'}"
    code, text = here(file, target, "--metric", "oracle")
    assert code == 2
    assert "search.metric=oracle needs labels of all validation cases" in text
    code, text = here(file, target, "--warm-up", beginning)
    assert code == 2
    assert "is not the beginning of these trials: the target dataset is another one" in text
    code, text = here(file, "--warm-up", beginning, "optim.momentum=0.5", "run.name=other")
    assert code == 2
    assert "optim.momentum is 0.9 there and 0.5 here" in text
    code, text = here(file, target)
    assert code == 0, text
    summary = json.loads((data / "runs" / "free" / "results" / "summary.json").read_text())
    assert not summary["oracle"]
    assert summary["best"] == 1
    assert "uses their labels" not in text


def test_ctrl_c_stops_all_trials_with_checkpoints_and_the_command_goes_on(
    here: Here, space: Spaces, data: Path, beginning: str
) -> None:
    file = space("stopped", {"method.margin_source": {"choice": [0, 0.4]}}, method="grid", evaluate="none")
    folder = data / "runs" / "stopped"
    script = f"until grep -q report {folder / 'ledger.jsonl'} 2>/dev/null; do sleep 0.1; done; kill -INT {os.getpid()}"
    sender = subprocess.Popen(["bash", "-c", script])
    try:
        code, text = here(file, "--warm-up", beginning, "phases.adaptation=400")
    finally:
        sender.kill()
        sender.wait()
    assert code == 130, text
    assert "stopped by SIGINT; 0 of 2 trials have ended" in text
    assert RunFolder(folder).read_status()["state"] == "interrupted"
    assert_nothing_is_reserved()
    interrupted = [RunFolder(folder / "trials" / name) for name in ("001", "002")]
    assert any(list(run.checkpoints.glob("step-*")) for run in interrupted)
    assert ends(folder) == []
