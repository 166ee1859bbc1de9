"""Searches and comparisons with trackers: one store has all their runs. The trainings are a stub's."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpscl_ray.compare import command as compare
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.tune import command as tune
from tests.ray.conftest import CPUS, Here
from tests.stub_fit import fit
from tests.tiny import make_pair
from tests.tiny_presets import write_presets
from tests.tiny_search import ITERATIONS, trials_of, write_space
from tests.tracker_stores import forget_settings, mlflow_runs, wandb_files

pytest.importorskip("mlflow")
pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def _own_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_settings(monkeypatch)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("data"))


def test_trials_of_a_search_are_runs_of_one_experiment(here: Here, data: Path) -> None:
    file = write_space(data, "tracked", {"method.gamma": {"choice": [10, 0.1]}}, method="grid", grace_period=4)
    words = (f"scaling.cpus_per_worker={CPUS}", "search.evaluate=none", "run.loggers=[mlflow,wandb]")
    code, text = here(tune, file, *words, fit=fit)
    assert code == 0, text
    folder = data / "runs" / "tracked"
    assert f"wandb sync {folder / 'trackers/wandb'}/offline-run-*" in text
    assert [trial.state for trial in trials_of(folder)] == ["finished", "stopped"]
    client, runs = mlflow_runs(RunDirectory(folder), "tracked")
    found = {run.info.run_name: run for run in runs}
    assert {name: run.info.status for name, run in found.items()} == {"001": "FINISHED", "002": "KILLED"}
    assert {name: run.data.params["method.gamma"] for name, run in found.items()} == {"001": "10.0", "002": "0.1"}
    for trial in trials_of(folder):
        run = found[f"{trial.number:03d}"]
        assert run.data.metrics["search/score"] == pytest.approx(trial.last["val/dice/mean"])
        curve = client.get_metric_history(run.info.run_id, "val/dice/mean")
        assert [(one.step, one.value) for one in curve] == [
            (at + 8, values["val/dice/mean"]) for at, values in trial.reports.items()
        ]
    assert max(trials_of(folder)[0].reports) == ITERATIONS
    assert len(wandb_files(RunDirectory(folder))) == 2
    assert not (folder / "tensorboard").exists()


def test_cells_of_a_comparison_are_runs_of_one_experiment(here: Here, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "table"
    words = ["--data", str(data / "mr"), str(data / "ct"), "--presets", str(write_presets(tmp_path / "presets"))]
    words += ["--out", str(out), "--seeds", "1", "--directions", "forward", "run.loggers=[mlflow]"]
    code, text = here(compare, *words, "baseline", "mpscl", fit=fit)
    assert code == 0, text
    _, runs = mlflow_runs(RunDirectory(out), "table")
    assert {run.info.run_name: run.info.status for run in runs} == {
        "mr2ct-seed1-baseline": "FINISHED",
        "mr2ct-seed1-mpscl": "FINISHED",
    }
    assert all("final/adaptation/dice/mean" in run.data.metrics for run in runs)
