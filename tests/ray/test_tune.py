"""The tune command on a real Ray Tune: trials of a stub whose scores are known, and two that are really trained."""

from __future__ import annotations

import csv
import functools
import json
import os
import subprocess
from pathlib import Path

import pytest
from ray import tune as ray_tune

from mpscl_ray.config import Config, load_config, to_yaml
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.control_files import STOP_FILE
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train.domains import load_domains, model_description
from mpscl_ray.tune import command as tune
from mpscl_ray.tune.space import load_space
from tests.ray.conftest import CPUS, Here
from tests.ray_commands import assert_nothing_is_reserved
from tests.stub_fit import fit
from tests.tiny import local_data, make_dataset, make_pair
from tests.tiny_search import ITERATIONS, SHARED_STEPS, ends, trials_of, write_space


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = make_pair(tmp_path_factory.mktemp("data"))
    make_dataset(base / "unlabelled", "ct", seed=1, labelled=())
    return base


def test_a_search_stops_what_falls_behind_records_what_fails_and_leaves_a_preset(here: Here, data: Path) -> None:
    """The larger the weight, the better the stub; beyond what it takes, its loss is not finite."""
    weights = {"method.gamma": {"choice": [10, 1.0e39, 1, 0.1]}}
    file = write_space(
        data,
        "whole",
        weights,
        method="grid",
        scheduler="pausing_asha",
        grace_period=2,
        reduction_factor=50,
        metric="information",
        evaluate="none",
    )
    code, text = here(tune, file, fit=fit)
    assert code == 0, text
    folder = data / "runs" / "whole"
    assert_nothing_is_reserved()
    assert ends(folder) == [1, 2, 3, 4], "every trial has one end"
    trials = trials_of(folder)
    # A rung keeps one of fifty: nobody passes the first, and of those that wait there the best is trained in full.
    assert [trial.state for trial in trials] == ["finished", "failed", "stopped", "stopped"]
    assert "not finite" in trials[1].reason
    assert list(trials[0].reports) == list(range(2, ITERATIONS + 1, 2))
    for trial in trials[2:]:
        run = RunDirectory(folder / "trials" / f"{trial.number:03d}")
        assert trial.reason.endswith(" 2")
        assert trial.iteration == 2, "it waited for the decision"
        assert run.read_metrics()[-1]["iteration"] == 2
        assert run.read_status()["state"] == "interrupted"
        assert not list(run.path.glob("checkpoints/*")), "weights of a stopped trial are of no use"
    runs = [RunDirectory(folder / "trials" / f"{trial.number:03d}") for trial in trials]
    assert {record["phase"] for record in RunDirectory(folder / "shared").read_metrics()} == {"source_only", "warm_up"}
    assert {record["phase"] for run in runs for record in run.read_metrics()} == {"adaptation"}

    summary = json.loads((folder / "results" / "summary.json").read_text(encoding="utf-8"))
    assert (summary["metric"], summary["oracle"], summary["best"]) == ("information", False, 1)
    assert summary["trials"] == {"finished": 1, "stopped": 2, "failed": 1}
    config = load_config(str(folder / "best.yaml"))
    assert config.method.gamma == 10  # type: ignore[union-attr]
    assert (config.run.name, config.phases.source_only, config.data.source) == ("whole-best", 4, str(data / "mr"))
    rows = list(csv.DictReader((folder / "results" / "trials.csv").open()))
    assert [row["state"] for row in rows] == [trial.state for trial in trials]
    assert not (folder / "results" / "test.json").exists()
    assert all((folder / "results" / f"{name}.png").stat().st_size for name in ("curves", "parallel", "effects"))
    assert len(list((folder / "tensorboard").glob("*/events*"))) == 4
    status = RunDirectory(folder).read_status()
    assert status["state"] == "finished"
    assert status["trials"] == {"total": 4, "finished": 1, "stopped": 2, "failed": 1, "running": 0}
    assert "<dd>4 of 4 ended</dd>" in RunDirectory(folder).progress_page.read_text(encoding="utf-8")
    assert "best: trial 001" in text
    assert "8 iterations) are trained once for all trials: 24 iterations less" in text

    before = (folder / "ledger.jsonl").read_text(encoding="utf-8")
    code, evaluated = here(tune, file, "search.evaluate=all", fit=fit)
    assert code == 0
    assert "search.evaluate: " in evaluated
    rows = json.loads((folder / "results" / "test.json").read_text(encoding="utf-8"))["rows"]
    assert list(rows) == ["source_only", "warm_up", "trial 1: gamma = 10"], "of one trial, the end of each phase"
    tables = [folder / "results" / "test.json", *folder.glob("trials/*/results/*/summary.json")]
    assert len(tables) == 4
    written = [table.stat().st_mtime_ns for table in tables]
    code, again = here(tune, file, "search.evaluate=all", fit=fit)
    assert (code, "4 trials" in again) == (0, True)
    assert (folder / "ledger.jsonl").read_text(encoding="utf-8") == before, "a finished search is not run again"
    assert [table.stat().st_mtime_ns for table in tables] == written, "and not evaluated again"
    assert (folder / "results" / "test.txt").read_text(encoding="utf-8") in again
    code, refused = here(tune, file, "method.delta_th=0.3", fit=fit)
    assert code == 2
    assert "was started with another config: method.delta_th: 0.25 in the run, 0.3 now" in refused


def test_asha_of_ray_tune_stops_the_trials_that_are_behind_at_a_rung(here: Here, data: Path) -> None:
    """A trial takes all CPUs, so they come one after the other: the first continues, the others are worse."""
    file = write_space(data, "asha", {"method.gamma": {"choice": [10, 1, 0.1]}}, method="grid", grace_period=4)
    code, text = here(tune, file, f"scaling.cpus_per_worker={CPUS}", "search.evaluate=none", fit=fit)
    assert code == 0, text
    assert "trials are compared at iterations 4 of the adaptation: the best 1/4 continue" in text
    assert "1 trial at a time" in text
    assert_nothing_is_reserved()
    trials = trials_of(data / "runs" / "asha")
    assert [(trial.state, trial.iteration) for trial in trials] == [
        ("finished", ITERATIONS),
        ("stopped", 4),
        ("stopped", 4),
    ]
    for trial in trials[1:]:
        assert trial.reason == "fell behind at iteration 4"
        assert not list((data / "runs" / "asha" / "trials" / f"{trial.number:03d}").glob("checkpoints/*"))

    grid = ray_tune.ResultGrid(ray_tune.ExperimentAnalysis(str(data / "runs" / "asha" / "tune")))
    assert sorted((found.config["method.gamma"], found.metrics["iteration"]) for found in grid) == [
        (0.1, 4),
        (1, 4),
        (10, ITERATIONS),
    ]
    (best,) = (found for found in grid if found.config["number"] == 1)
    assert list(best.metrics_dataframe["iteration"]) == list(range(2, ITERATIONS + 1, 2))
    assert list(best.metrics_dataframe["score"]) == [values["val/dice/mean"] for values in trials[0].reports.values()]
    assert list(Path(best.path).glob("events*"))


def test_two_trials_are_really_trained(here: Here, data: Path) -> None:
    """No stub: each trains in the process of its trial. The larger rate diverges; they share no phase."""
    rates = {"optim.lr": {"choice": [0.01, 1.0e30]}}
    file = write_space(data, "real", rates, method="grid", scheduler="fifo", evaluate="best")
    code, text = here(tune, file)
    assert code == 0, text
    assert_nothing_is_reserved()
    folder = data / "runs" / "real"
    one, other = trials_of(folder)
    assert (one.state, list(one.reports)) == ("finished", list(range(2, ITERATIONS + 1, 2)))
    assert other.state == "failed"
    assert "a loss or gradient was not finite" in other.reason
    metrics = RunDirectory(folder / "trials" / "001").read_metrics()
    values = {tag: value for tag, value in metrics[-1].items() if tag.startswith("val/")}
    assert one.last == values, "the ledger has what the worker measured"
    rows = json.loads((folder / "results" / "test.json").read_text(encoding="utf-8"))["rows"]
    assert list(rows) == ["source_only", "warm_up", "trial 1: lr = 0.01"]


def a_run(config: Config, path: Path) -> str:
    """Make a run of a stub with these settings; returns its folder."""
    run = RunDirectory(path)
    run.create()
    run.write_config(to_yaml(config))
    run.write_model(model_description(config, load_domains(config)[0]))
    assert fit(config, run, local_data(config), False, run.name)["state"] == "finished"
    return str(path)


def test_a_target_without_labels_is_searched_by_a_label_free_criterion_from_a_run_that_is_given(
    here: Here, data: Path
) -> None:
    file = write_space(data, "free", {"method.delta_th": {"uniform": [0, 0.5]}}, num_samples=1, evaluate="none")
    given = a_run(load_space(file).base, data / "runs" / "given")
    target = f"data.target={data / 'unlabelled'}"
    code, text = here(tune, file, target, "--metric", "oracle", fit=fit)
    assert code == 2
    assert "search.metric=oracle needs labels of all validation cases" in text
    code, text = here(tune, file, target, "--warm-up", given, fit=fit)
    assert code == 2
    assert "does not have the phases that these trials share: the target dataset is another one" in text
    code, text = here(tune, file, "--warm-up", given, "optim.momentum=0.5", "run.name=other", fit=fit)
    assert code == 2
    assert "optim.momentum is 0.9 there and 0.5 here" in text
    code, text = here(tune, file, target, fit=fit)
    assert code == 0, text
    summary = json.loads((data / "runs" / "free" / "results" / "summary.json").read_text(encoding="utf-8"))
    assert not summary["oracle"]
    assert summary["best"] == 1
    assert "uses their labels" not in text


def test_a_stop_file_ends_the_shared_phases_and_the_trials_and_the_command_resumes(here: Here, data: Path) -> None:
    file = write_space(data, "asked", {"method.margin_source": {"choice": [0, 0.4]}}, method="grid", evaluate="none")
    folder = data / "runs" / "asked"
    shared, trial = folder / "shared" / "metrics.jsonl", folder / "ledger.jsonl"
    for seen, ended in ((shared, "0 of 2"), (trial, "0 of 2")):
        wait = f"until grep -q 'val/' {seen} 2>/dev/null; do sleep 0.1; done; touch {folder / STOP_FILE}"
        sender = subprocess.Popen(["bash", "-c", wait])
        try:
            code, text = here(tune, file, fit=functools.partial(fit, seconds_a_step=1))
        finally:
            sender.kill()
            sender.wait()
        assert code == 130, text
        assert f"stopped by the file stop-requested in its folder; {ended} trials have ended" in text
        assert f"to resume:\n  python -m mpscl_ray.tune {file}" in text
        assert_nothing_is_reserved()
    assert RunDirectory(folder / "trials" / "001").store.step_checkpoints()
    code, text = here(tune, file, fit=fit)
    assert code == 0, text
    assert ends(folder) == [1, 2]


def test_ctrl_c_stops_all_trials_with_checkpoints_and_the_command_resumes(here: Here, data: Path) -> None:
    margins = {"method.margin_source": {"choice": [0, 0.4]}}
    file = write_space(data, "stopped", margins, method="grid", scheduler="fifo", evaluate="none")
    folder = data / "runs" / "stopped"
    logs = " ".join(str(folder / "trials" / name / "logs" / "worker-0.log") for name in ("001", "002"))
    both = f"[ $(grep -l 'training starts' {logs} 2>/dev/null | wc -l) = 2 ]"
    reported = f"grep -q report {folder / 'ledger.jsonl'} 2>/dev/null"
    script = f"until {reported} && {both}; do sleep 0.1; done; kill -INT {os.getpid()}"
    sender = subprocess.Popen(["bash", "-c", script])
    try:
        code, text = here(tune, file, fit=functools.partial(fit, seconds_a_step=2))
    finally:
        sender.kill()
        sender.wait()
    assert code == 130, text
    assert "stopped by SIGINT; 0 of 2 trials have ended" in text
    assert RunDirectory(folder).read_status()["state"] == "interrupted"
    assert_nothing_is_reserved()
    interrupted = [RunDirectory(folder / "trials" / name) for name in ("001", "002")]
    steps = {run.name: checkpoint.step_of(Path(run.store.step_checkpoints()[-1])) for run in interrupted}
    assert max(steps.values()) > SHARED_STEPS
    assert ends(folder) == []

    code, text = here(tune, file, fit=fit)
    assert code == 0, text
    assert ends(folder) == [1, 2]
    for name, step in steps.items():
        log = (folder / "trials" / name / "logs" / "worker-0.log").read_text(encoding="utf-8")
        assert f"training starts at step {step} " in log, "an interrupted trial resumes from its own checkpoint"
    for trial in trials_of(folder):
        assert list(trial.reports) == list(range(2, ITERATIONS + 1, 2)), "no report twice, none left out"
