"""Volumes that are predicted in the place of a worker, spread over the nodes of a cluster."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from mpscl_ray.compare import trainable
from mpscl_ray.config import load_config
from mpscl_ray.data.dataset import load_manifest
from mpscl_ray.distributed.parallel_map import map_volumes
from mpscl_ray.distributed.places import TaskPlace, WorkerRequest, inference_place
from mpscl_ray.errors import ConfigError, DataError, InsufficientResources
from mpscl_ray.evaluate import command as evaluate
from mpscl_ray.evaluate.run import evaluate_phases
from mpscl_ray.predict import command as predict
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train.ray import resources
from tests.hearts_run import oblique, write_hearts_run, write_image

PLACE = TaskPlace(WorkerRequest({"CPU": 2.0}, {}), "cpu", 0)
TABLE = Path("results") / "adaptation_test_prepared_protocol" / "per_volume.csv"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hearts_run(tmp_path_factory.mktemp("places"))


def where(item: int) -> tuple[int, int, dict[str, float], int]:
    return item, os.getpid(), ray.get_runtime_context().get_assigned_resources(), torch.get_num_threads()


def spread(function: Any, items: list[int], place: TaskPlace = PLACE) -> list[Any]:
    return map_volumes(
        function, items, workers=None, name=lambda item: f"volume {item}", done=lambda count: None, place=place
    )


def fail_on_three(item: int) -> int:
    if item == 3:
        raise DataError("the file is damaged")
    return item


def test_each_task_has_the_place_of_a_worker(cluster: None) -> None:
    found = spread(where, list(range(6)))
    assert [item for item, *_ in found] == list(range(6)), "results are in order"
    assert all(pid != os.getpid() and own["CPU"] == 2 and threads == 2 for _, pid, own, threads in found)


def test_errors_name_volume_and_node(cluster: None) -> None:
    with pytest.raises(DataError, match=r"^volume 3 on node [\d.]+: the file is damaged$"):
        spread(fail_on_three, [1, 2, 3])
    nowhere = TaskPlace(WorkerRequest({"CPU": 1.0, "GPU": 1.0}, {"zone": "a"}), "cuda", 0)
    with pytest.raises(InsufficientResources, match=r"needs 1 CPUs and 1 GPUs on nodes with the labels zone=a, and no"):
        spread(where, [1], nowhere)


def test_the_scores_of_tasks_are_those_of_this_process(run: Path, cluster: None) -> None:
    alone = evaluate_phases(run, ["source_only", "adaptation"], workers=0, progress=False)
    table, phases = (run / TABLE).read_bytes(), (run / "results" / "phases.csv").read_bytes()
    for written in (run / "results").rglob("*.csv"):
        written.unlink()
    evaluate_phases(run, ["source_only", "adaptation"], place=PLACE, progress=False)
    assert (run / TABLE).read_bytes() == table
    assert (run / "results" / "phases.csv").read_bytes() == phases
    of_a_cell = trainable._scores(RunDirectory(run), load_config("phantom", ["scaling.num_workers=2"]), use_gpu=False)
    assert of_a_cell["summary"] == alone["adaptation"].summary.to_json()


def test_a_case_that_a_task_cannot_read_is_named(run: Path, cluster: None, tmp_path: Path) -> None:
    other = write_hearts_run(tmp_path)
    case = load_manifest(tmp_path / "ct").split("test")[1]
    for file in (tmp_path / "ct").rglob(f"{case.id}*"):
        file.write_bytes(b"damaged")
    with pytest.raises(DataError, match=rf"^case {case.id} on node [\d.]+: ") as caught:
        evaluate_phases(other, ["adaptation"], place=PLACE, progress=False)
    assert "\n" not in str(caught.value)


def test_a_run_is_scored_where_it_trained(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["scaling.cpus_per_worker=4", "scaling.accelerator_type=A100", "scaling.node_labels={zone: a}"]
    config = load_config("phantom", [*words, "scaling.resource_timeout_s=7"])
    assert resources.evaluation_place(config, use_gpu=True) is None, "this process ends its Ray itself"
    monkeypatch.setattr(resources, "is_private", lambda: False)
    place = resources.evaluation_place(config, use_gpu=True)
    assert place == TaskPlace(resources.worker_request(config, use_gpu=True), "cuda", 7)
    assert place.task_options()["scheduling_strategy"] == "SPREAD"
    assert place.threads == 4


def test_commands_spread_volumes_over_a_cluster(
    run: Path, cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([str(run), "--workers", "0"]) == 0
    assert evaluate.main([str(run), "--ray", "auto", "--out", str(tmp_path / "scores")]) == 0
    here = run / "results" / "last_test_prepared_protocol" / "per_volume.csv"
    assert (tmp_path / "scores" / "per_volume.csv").read_bytes() == here.read_bytes()
    monkeypatch.chdir(tmp_path)
    for seed in range(3):
        write_image(tmp_path / f"p{seed}.nii.gz", seed, oblique())
    Path("broken.nii.gz").write_bytes(b"<html>not found</html>")
    assert predict.main([str(run), ".", "--out", "alone", "--workers", "0"]) == 3
    assert predict.main([str(run), ".", "--out", "spread", "--ray", "auto", "--workers", "2"]) == 3
    assert f"{tmp_path / 'broken.nii.gz'}" in capsys.readouterr().err
    for name in ("p0_prediction.nii.gz", "p1_prediction.nii.gz", "p2_prediction.nii.gz"):
        assert Path("spread", name).read_bytes() == Path("alone", name).read_bytes(), name
    one, other = (json.loads(Path(out, "volumes.json").read_text(encoding="utf-8")) for out in ("spread", "alone"))
    assert one == other
    with pytest.raises(ConfigError, match="--workers 0 is for this process and --ray for a cluster"):
        evaluate.main([str(run), "--ray", "auto", "--workers", "0"])
    with pytest.raises(ConfigError, match="--device cuda:1 names a device of this machine; with --ray give cpu or"):
        evaluate.main([str(run), "--ray", "auto", "--device", "cuda:1"])


def test_the_device_decides_what_a_volume_needs(cluster: None) -> None:
    assert inference_place(None) == inference_place("cpu")
    assert inference_place("cpu").worker.resources == {"CPU": 1}
    with_gpu = inference_place("cuda")
    assert with_gpu.worker.resources == {"CPU": 1, "GPU": 1}
    assert with_gpu.device == "cuda"
