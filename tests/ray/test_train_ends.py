"""How the train command ends where training itself is not what is tested: what trains is a stub, or nothing does."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from mpscl_ray.config import Config, load_config
from mpscl_ray.errors import ClusterError, ConfigError, DataError, Interrupted, TrainingError
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.control_files import STOP_FILE
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train import command as train
from mpscl_ray.train import run as train_run
from mpscl_ray.train.ray.launch import fit_on_ray
from tests.ray.conftest import CPUS, Here
from tests.stub_fit import fit
from tests.tiny import make_dataset, make_pair
from tests.train_command import Runs, check_status, starts, wait_for_free_cpus


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(make_pair(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("runs"))


def test_a_loss_that_is_not_finite_and_a_damaged_checkpoint(here: Here, runs: Runs) -> None:
    """The first phase is sane, the second one is not; then a sane rate, with the newest checkpoint damaged."""
    run = runs["wild"]
    words = runs.arguments("wild", "phases.source_only_lr=0.01", "run.checkpoint_every=2", "scaling.num_workers=1")
    code, text = here(train, *words, "optim.lr=1e30", fit=fit)
    assert code == TrainingError.exit_code
    assert "a loss or gradient was not finite, seen at iteration 1 of the phase warm_up" in text
    assert "loss_cross_entropy_main nan" in text
    assert "Traceback" not in text
    check_status(run, "failed", TrainingError.exit_code, "the checkpoint step-0000004 is from before it")
    older, newest = checkpoint.list_checkpoints(run.checkpoints)

    data = bytearray((newest / checkpoint.TENSORS).read_bytes())
    data[len(data) // 2] ^= 4
    (newest / checkpoint.TENSORS).write_bytes(data)
    code, text = here(train, *words, "optim.lr=0.01", "--allow-change", fit=fit)
    assert code == 0, text
    assert "changed for the rest of the run: optim.lr: 1e+30 in the run, 0.01 now" in text
    assert run.read_metrics()[-1]["global_step"] == 12
    assert starts(run) == [0, checkpoint.step_of(older)]
    check_status(run, "finished", 0, "")
    assert load_config(run.config_file).optim.lr == 0.01


def test_what_the_cluster_does_not_have(here: Here, runs: Runs) -> None:
    for settings, sentence in (
        (
            ["scaling.num_workers=4"],
            f"4 workers need 4 CPUs, and the cluster has {CPUS} CPUs ({CPUS} free); use scaling.num_workers=2",
        ),
        (
            ["scaling.device=gpu", "scaling.num_workers=1"],
            f"need 1 CPUs and 1 GPUs, and the cluster has {CPUS} CPUs ({CPUS} free) and 0 GPUs",
        ),
        (
            ["scaling.accelerator_type=A100", "scaling.num_workers=1"],
            "and 0 GPUs (0 free) and no node with A100",
        ),
        (["scaling.memory_gb=1000000"], "2 workers need 2 CPUs and 2e+06 GB of memory, and the cluster has"),
        (
            ["scaling.node_labels={market-type: spot}", "scaling.placement_strategy=SPREAD"],
            "2 workers need 2 CPUs on nodes with the labels market-type=spot placed by SPREAD, and the cluster has",
        ),
        (["scaling.cpus_per_worker=2"], f"2 workers need 4 CPUs, and the cluster has {CPUS} CPUs"),
    ):
        words = runs.arguments("refused", "scaling.num_workers=2", *settings)
        code, text = here(train, *words)
        assert code == ClusterError.exit_code
        assert sentence in text
        assert "Traceback" not in text
    check_status(runs["refused"], "failed", ClusterError.exit_code, "2 workers need 4 CPUs")


@pytest.mark.parametrize("file", ["search.yaml", "cells.json"])
def test_the_folder_of_a_search_or_a_comparison_is_no_place_for_a_training(runs: Runs, file: str) -> None:
    run = runs["many"]
    run.path.mkdir(exist_ok=True)
    (run.path / file).write_text("{}")
    with pytest.raises(ConfigError, match=r"is the folder of a \w+; give the training another run.name"):
        train.main(runs.arguments("many", "data.source=/nonexistent"))
    assert [path.name for path in run.path.iterdir()] == [file], "it is left as it was"
    (run.path / file).unlink()


@ray.remote(num_cpus=2)
class Other:
    """Holds most of the cluster."""


def test_what_the_cluster_has_but_others_use(here: Here, runs: Runs) -> None:
    other = Other.remote()
    ray.get(other.__ray_ready__.remote())
    code, text = here(train, *runs.arguments("busy", "scaling.num_workers=2", "scaling.resource_timeout_s=1"))
    assert code == ClusterError.exit_code
    shortage = f"2 workers need 2 CPUs, and the cluster has {CPUS} CPUs (1 free); use scaling.num_workers=1"
    assert f"error: {shortage}" in text
    ray.kill(other)
    wait_for_free_cpus()


@pytest.mark.cluster
def test_what_others_take_before_the_workers_start(here: Here, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    others = []

    def others_come(*arguments: Any) -> dict[str, Any]:
        others.append(Other.remote())
        ray.get(others[-1].__ray_ready__.remote())
        return fit_on_ray(*arguments)

    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "2")
    words = runs.arguments("taken", "scaling.num_workers=2", "run.max_failures=0")
    code, text = here(train, *words, fit=others_come)
    assert code == ClusterError.exit_code
    assert "error: the workers found no resources any more: 2 workers need 2 CPUs" in text
    assert "Traceback" not in text
    ray.kill(others[0])
    wait_for_free_cpus()


def test_a_dataset_with_a_flipped_bit(here: Here, runs: Runs, tmp_path: Path) -> None:
    target = make_dataset(tmp_path / "ct", "ct", seed=1)
    file = target / "train" / "ct_train_1.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 16
    file.write_bytes(data)
    code, text = here(train, *runs.arguments("flipped", f"data.target={target}", "data.in_memory=true"), fit=fit)
    assert code == DataError.exit_code, text
    assert f"error: {file}: damaged" in text
    assert "Traceback" not in text


def test_the_upper_bound(here: Here, runs: Runs) -> None:
    words = runs.arguments("upper", "run.select=oracle", "scaling.num_workers=1", preset="small/supervised")
    code, text = here(train, *words, fit=fit)
    assert code == 0, text
    assert "trains on 18 labelled ct slices and no other slices, 1 CPU worker\n" in text
    assert "except here: the supervised bound" in text
    assert "best is chosen with target labels (oracle)" in text
    assert [path.name for path in runs["upper"].phases.iterdir()] == ["supervised"]


def test_a_target_without_any_label(here: Here, runs: Runs, tmp_path: Path) -> None:
    target = make_dataset(tmp_path / "ct", "ct", seed=1, labelled=(), cases={"train": 2})
    words = runs.arguments("bare", f"data.target={target}", "scaling.num_workers=1", preset="small/source_only")
    code, text = here(train, *words, fit=fit)
    assert code == 0, text
    assert "no test or validation volume of the target is labelled" in text
    assert not (runs["bare"].results / "phases.txt").exists()


def test_a_stop_that_came_too_late_for_training_is_not_forgotten(here: Here, runs: Runs) -> None:
    def stopped_at_its_end(*arguments: Any) -> dict[str, Any]:
        outcome = fit(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)
        return outcome

    words = runs.arguments("late", "scaling.num_workers=1")
    code, text = here(train, *words, fit=stopped_at_its_end)
    assert code == Interrupted.exit_code
    assert "stopped by SIGTERM between training, which is done, and its evaluation" in text


def test_interrupted_during_the_evaluation(here: Here, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    words = runs.arguments("evaluated", "scaling.num_workers=1")
    with monkeypatch.context() as patch:
        patch.setattr(train_run, "evaluate_phases", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
        code, text = here(train, *words, fit=fit)
    assert code == Interrupted.exit_code
    assert "stopped by SIGINT during the evaluation; to resume:" in text
    status = runs["evaluated"].read_status()
    assert (status["state"], status["phase"], status["global_step"]) == ("interrupted", "adaptation", 12)
    assert here(train, *words, fit=fit)[0] == 0
    check_status(runs["evaluated"], "finished", 0, "")


def test_a_stopped_run_is_resumable_before_its_checkpoint_is_written(here: Here, runs: Runs) -> None:
    while_running: dict[str, Any] = {}
    seen: dict[str, Any] = {}

    def stopped_in_the_middle(config: Config, folder: RunDirectory, *more: Any) -> dict[str, Any]:
        fit(config, folder, *more)
        while folder.read_status().get("global_step") != 12:
            time.sleep(0.01)
        while_running.update(folder.read_status())
        os.kill(os.getpid(), signal.SIGTERM)
        while not (folder.path / STOP_FILE).exists():
            time.sleep(0.01)
        while folder.read_status()["state"] == "running":
            time.sleep(0.01)
        seen.update(folder.read_status())  # whatever stops it may kill it now
        return {"state": "interrupted", "phase": "adaptation", "iteration": 3, "step": 11, "losses": {}}

    assert here(train, *runs.arguments("middle", "scaling.num_workers=1"), fit=stopped_in_the_middle)[0] == 130
    assert (while_running["state"], while_running["phase"], while_running["total_steps"]) == (
        "running",
        "adaptation",
        12,
    )
    assert (while_running["checkpoint"], while_running["validation"]["global_step"]) == ("step-0000012", 12)
    assert (seen["state"], seen["exit_code"], seen["global_step"]) == ("interrupted", 130, 12)
    assert seen["reason"] == "stopped by SIGTERM; resumes from the last complete checkpoint"


def test_a_file_in_the_run_folder_stops_a_run_too(here: Here, runs: Runs) -> None:
    def asked_to_stop(config: Config, folder: RunDirectory, *more: Any) -> dict[str, Any]:
        (folder.path / STOP_FILE).touch()
        return fit(config, folder, *more)

    code, text = here(train, *runs.arguments("asked", "scaling.num_workers=1"), fit=asked_to_stop)
    assert code == Interrupted.exit_code
    assert "stopped by the file stop-requested in the run folder at iteration 1 of the phase source_only" in text


def test_results_in_the_working_directory_of_a_job_are_warned_of(here: Here, runs: Runs, tmp_path: Path) -> None:
    job = tmp_path / "_ray_pkg_0123456789abcdef"
    words = runs.arguments("job", "scaling.num_workers=1", "phases.warm_up=0", "phases.adaptation=0")
    assert "warning" not in here(train, *words, fit=fit)[1]
    code, text = here(train, *words, f"run.storage={job}", fit=fit)
    assert code == 0
    assert "lies in the working directory of this job, which Ray deletes after it" in text


def test_a_defect_keeps_its_traceback_and_is_in_the_status(here: Here, runs: Runs) -> None:
    def defective(*arguments: Any) -> dict[str, Any]:
        raise ZeroDivisionError("division by zero")

    with pytest.raises(ZeroDivisionError):
        here(train, *runs.arguments("defect", "scaling.num_workers=1"), fit=defective)
    check_status(runs["defect"], "failed", 1, "ZeroDivisionError: division by zero")


def test_a_run_with_longer_phases_resumes_although_it_was_finished(here: Here, runs: Runs) -> None:
    words = runs.arguments("longer", "scaling.num_workers=1")
    assert here(train, *words, fit=fit)[0] == 0
    longer = [*words, "phases.adaptation=8"]
    assert here(train, *longer, fit=fit)[0] == ConfigError.exit_code
    code, text = here(train, *longer, "--allow-change", fit=fit)
    assert code == 0
    assert "phases.adaptation: 4 in the run, 8 now" in text
    assert starts(runs["longer"]) == [0, 12]
    assert runs["longer"].read_metrics()[-1]["global_step"] == 16
