"""A training on Ray before it starts and after it ended: the data it opens, and the error it ends with."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from mpscl_ray.data.slices import LocalSlices
from mpscl_ray.errors import ClusterError, ConfigError, StorageError, TrainingError
from mpscl_ray.runs.control_files import FAILURE_FILE, STOP_FILE
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train.domains import load_domains, open_data
from mpscl_ray.train.ray import launch
from mpscl_ray.train.ray.failures import causes
from mpscl_ray.train.ray.hanging import StepWatch
from tests.tiny import local_data, make_dataset, make_pair, tiny_config


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("data"))


def test_labels_are_opened_for_training_slices_of_one_domain_alone(pair: Path) -> None:
    opened: list[tuple[str, str, bool]] = []

    def open_slices(folder: Path, split: str, *, labels: bool, in_memory: object) -> LocalSlices:
        opened.append((folder.name, split, labels))
        return LocalSlices(folder, split, labels=labels)

    expected = {
        "small/mpscl": {("mr", "train", True), ("ct", "train", False)},
        "small/source_only": {("mr", "train", True)},
        "small/supervised": {("ct", "train", True)},
    }
    for preset, training_slices in expected.items():
        del opened[:]
        config = tiny_config(pair / "mr", pair / "ct", preset=preset)
        data = open_data(config, load_domains(config)[0], open_slices)
        assert set(opened) == training_slices | {("mr", "val", True), ("ct", "val", True)}
        assert (data.unlabelled is None) == (preset != "small/mpscl")


def test_validation_slices_are_opened_with_labels_only_if_all_have_them(pair: Path, tmp_path: Path) -> None:
    def open_slices(folder: Path, split: str, *, labels: bool, in_memory: object) -> LocalSlices:
        return LocalSlices(folder, split, labels=labels)

    target = make_dataset(tmp_path / "ct", "ct", seed=1, labelled=("train",))
    config = tiny_config(pair / "mr", target)
    domains, warnings = load_domains(config)
    data = open_data(config, domains, open_slices)
    assert warnings == []
    assert data.validation["source"].files.labels
    assert not data.validation["target"].files.labels

    source = make_dataset(tmp_path / "mr", "mr", cases={"train": 2})
    config = tiny_config(source, make_dataset(tmp_path / "bare", "ct", seed=1, labelled=(), cases={"train": 1}))
    domains, warnings = load_domains(config)
    assert open_data(config, domains, open_slices).validation == {}
    assert any("no labelled validation cases" in warning for warning in warnings)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, choose_postprocessing=True))
    with pytest.raises(ConfigError, match="choose_postprocessing=true needs labelled validation cases of the source"):
        load_domains(config)


def test_causes_name_the_worker_that_died_not_those_that_noticed() -> None:
    died = ray.exceptions.ActorDiedError()
    noticed = RuntimeError("Connection closed by peer")
    assert causes({0: noticed, 1: died}) == "worker 1 was lost: its process died"
    gone = "worker 0 was cut off: a process or a node that it communicated with was lost"
    assert causes({0: noticed}) == gone
    assert causes({0: RuntimeError("of its own")}) == "worker 0 failed: of its own"


def test_causes_name_the_workers_that_did_not_answer(tmp_path: Path) -> None:
    watch = StepWatch(tmp_path / "log", 15.0)
    watch._nodes = ["10.0.0.1", "10.0.0.1", "10.0.0.2"]
    for _ in range(34):
        watch.step_begins()
    waited = watch.explain(RuntimeError("[unbound_buffer.cc:78] Timed out waiting 15000ms for recv operation"))
    assert waited is not None
    assert watch.explain(RuntimeError("Connection closed by peer")) is None
    after = "for 15 s (scaling.collective_timeout_s) after step 33"
    hangs = f"did not answer {after}: its process hangs, or the network to it is cut"
    assert causes({0: waited, 1: waited}) == f"worker 2 on 10.0.0.2 {hangs}"
    assert causes({1: waited}) == f"worker 0 on 10.0.0.1 or worker 2 on 10.0.0.2 {hangs}"
    cut = "the network between 10.0.0.1, 10.0.0.1, 10.0.0.2 is cut or too slow"
    assert causes({0: waited, 1: waited, 2: waited}) == f"the workers did not hear from each other {after}: {cut}"
    assert causes({0: waited, 1: ray.exceptions.ActorDiedError()}) == "worker 1 was lost: its process died"
    assert causes({0: waited, 1: ValueError("of its own")}).endswith("worker 1 failed: of its own")


def test_workers_that_fail_too_often_end_the_run_with_their_causes(pair: Path, tmp_path: Path) -> None:
    folder = RunDirectory(tmp_path)
    config = tiny_config(pair / "mr", pair / "ct", ["run.max_failures=2"])
    launched = launch.Launch(config, folder, local_data(config), False)
    died = ray.exceptions.ActorDiedError()
    error = launched._explain(ray.train.WorkerGroupError("text", {1: died}))
    assert isinstance(error, TrainingError)
    assert "workers failed 3 times, which is once more than run.max_failures allows" in str(error)
    assert "worker 1 was lost: its process died" in str(error)
    error = launched._explain(ray.exceptions.RaySystemError("gone"))
    assert isinstance(error, ClusterError)
    assert "Ray ended the training" in str(error)
    defect = KeyError("x")
    assert launched._explain(defect) is defect


def launched(pair: Path, folder: RunDirectory, train: Callable[[], dict[str, Any]]) -> launch.Launch:
    """A training that is what ``train`` does."""
    config = tiny_config(pair / "mr", pair / "ct")
    return launch.Launch(config, folder, local_data(config), False, fit=lambda *_: train())


def test_the_error_of_a_worker_is_raised_with_its_own_type(pair: Path, tmp_path: Path) -> None:
    failure = tmp_path / FAILURE_FILE
    error = {"exit_code": StorageError.exit_code, "reason": "no space left"}

    def fails() -> dict[str, Any]:
        failure.write_text(json.dumps(error))
        raise RuntimeError("the error of Ray")

    for train in (fails, lambda: {"state": "failed", **error}):
        training = launched(pair, RunDirectory(tmp_path), train)
        training.start()
        with pytest.raises(StorageError, match="no space left"):
            training.wait(lambda: None)
        assert not failure.exists(), "the next start does not see it"


def test_a_stop_ends_the_training_and_no_later_start(pair: Path, tmp_path: Path) -> None:
    stop = tmp_path / STOP_FILE

    def train() -> dict[str, Any]:
        deadline = time.monotonic() + 30
        while not stop.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return {"state": "interrupted" if stop.exists() else "finished", "phase": "warm_up", "iteration": 3, "step": 9}

    training = launched(pair, RunDirectory(tmp_path), train)
    training.start()
    assert not training.stop_requested
    outcome = training.wait(training.request_stop)
    assert (outcome.state, outcome.step, training.stop_requested) == ("interrupted", 9, True)
    assert not stop.exists()
    for name in (STOP_FILE, FAILURE_FILE):
        (tmp_path / name).write_text("of a command that was killed")
    launched(pair, RunDirectory(tmp_path), train)
    assert list(tmp_path.iterdir()) == []
