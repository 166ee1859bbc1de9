"""What MLflow and Weights & Biases have of a run, read from their own local stores."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mpscl_ray.errors import ConfigError
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.runs.trackers import TRACKERS_FOLDER, TrackedRun, Tracking, check_installed
from tests.tracker_stores import forget_settings, mlflow_runs, wandb_files, wandb_history, wandb_records

ABOUT = TrackedRun("first", "", {"optim.lr": 0.1, "network.layers": [1, 2], "data.source": ""}, {"method": "mpscl"})
CURVE = "train/loss_segmentation"


@pytest.fixture(autouse=True)
def _own_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_settings(monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    folder = RunDirectory(tmp_path / "first")
    folder.create()
    return folder


def measure(run: RunDirectory, *steps: int, value: float = 1.0) -> None:
    for step in steps:
        record = {"global_step": step, "phase": "adaptation", "iteration": step, "val/dice/mean": math.nan}
        run.append_metrics({**record, CURVE: value / step})


def track(run: RunDirectory, *loggers: str, warnings: list[str] | None = None, about: TrackedRun = ABOUT) -> Tracking:
    def no_warning(text: str) -> None:
        raise AssertionError(text)

    return Tracking(run, run, about, loggers, no_warning if warnings is None else warnings.append)


def test_a_missing_package_is_said_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_installed(["tensorboard"])
    with pytest.raises(ConfigError, match=r'wandb is not installed: run pip install "mpscl_ray\[wandb\]", or leave'):
        check_installed(["tensorboard", "wandb"])


def test_nothing_is_written_where_no_tracker_is_asked_for(run: RunDirectory) -> None:
    measure(run, 1)
    tracking = track(run, "tensorboard")
    tracking.update()
    tracking.close("finished", {"final/adaptation/dice/mean": 0.5})
    assert not (run.path / TRACKERS_FOLDER).exists()


def test_mlflow_has_settings_curve_and_scores_and_a_resumed_run_goes_on(run: RunDirectory) -> None:
    pytest.importorskip("mlflow")
    measure(run, 10, 20, 30)
    track(run, "mlflow").close("interrupted")
    client, (found,) = mlflow_runs(run)
    assert found.info.status == "KILLED"
    run.rewind_metrics(20)  # the run resumes from its checkpoint
    resumed = track(run, "mlflow")
    resumed.update()
    measure(run, 30, 40)
    resumed.close("finished", {"final/adaptation/dice/mean": 0.5})
    client, (found,) = mlflow_runs(run)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "first")
    assert found.data.params == {"optim.lr": "0.1", "network.layers": "[1, 2]", "data.source": ""}
    assert found.data.tags.items() >= {"method": "mpscl", "state": "finished"}.items()
    curve = [(one.step, one.value) for one in client.get_metric_history(found.info.run_id, CURVE)]
    assert sorted(curve) == [(10, 1 / 10), (20, 1 / 20), (30, 1 / 30), (40, 1 / 40)]
    assert found.data.metrics["final/adaptation/dice/mean"] == 0.5
    assert "val/dice/mean" not in found.data.metrics  # it was not a number


def test_runs_of_a_search_are_in_one_store(run: RunDirectory) -> None:
    pytest.importorskip("mlflow")
    for name in ("001", "002"):
        trial = RunDirectory(run.path / "trials" / name)
        trial.create()
        measure(trial, 1, 2)
        about = TrackedRun(name, "search", {}, {})
        Tracking(trial, run, about, ["mlflow"], print).close("stopped", {"search/score": 0.25})
    _, found = mlflow_runs(run, "search")
    assert {one.info.run_name: one.data.metrics["search/score"] for one in found} == {"001": 0.25, "002": 0.25}


def test_wandb_is_offline_and_a_resumed_run_has_the_same_name_there(run: RunDirectory) -> None:
    pytest.importorskip("wandb")
    measure(run, 10, 20)
    track(run, "wandb").close("interrupted")
    run.rewind_metrics(10)
    measure(run, 20, 30)
    track(run, "wandb").close("finished", {"final/adaptation/dice/mean": 0.5})
    files = wandb_files(run)
    assert len(files) == 2
    assert len({file.name for file in files}) == 1  # run-ID.wandb: W&B joins them
    assert wandb_history(files, CURVE) == [(10, 1 / 10), (20, 1 / 20), (30, 1 / 30)]
    last = list(wandb_records(files[1]))
    config = {item.key: json.loads(item.value_json) for one in last for item in one.run.config.update}
    assert config["optim.lr"] == 0.1
    summary = {"/".join(item.nested_key) or item.key: item.value_json for one in last for item in one.summary.update}
    assert (summary["final/adaptation/dice/mean"], summary["state"]) == ("0.5", '"finished"')
    assert next(list(one.run.tags) for one in last if one.HasField("run")) == ["method: mpscl"]


def test_a_server_that_does_not_answer_stops_nothing_and_misses_nothing(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    measure(run, 1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    warnings: list[str] = []
    tracking = track(run, "mlflow", warnings=warnings)
    tracking.update()
    measure(run, 2)
    tracking.close("interrupted")
    (warning,) = warnings
    assert "mlflow takes no records (" in warning
    assert "127.0.0.1:9" in warning
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    measure(run, 3)
    track(run, "mlflow").close("finished")
    client, (found,) = mlflow_runs(run)
    assert [one.step for one in client.get_metric_history(found.info.run_id, CURVE)] == [1, 2, 3]
