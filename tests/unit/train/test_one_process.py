"""A training of one worker in the process of a trial or a cell: what it leaves, where it stops, how it resumes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mpscl_ray.errors import ConfigError
from mpscl_ray.runs.control_files import VALIDATION_GATE_FILE
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train.ray.one_process import fit_in_this_process, own_resources
from mpscl_ray.train.ray.worker import STOP_THERE
from tests.tiny import local_data, make_pair, tiny_config


@pytest.mark.filterwarnings("ignore:constrained_layout")  # curves of four steps
def test_it_stops_at_a_validation_where_a_scheduler_says_so_and_resumes_there(tmp_path: Path) -> None:
    data = make_pair(tmp_path)
    lengths = ("phases.source_only=4", "phases.warm_up=0", "phases.adaptation=0", "run.validate_every=2")
    config = tiny_config(data / "mr", data / "ct", [*lengths, "scaling.num_workers=1"])
    slices, run = local_data(config), RunDirectory(tmp_path / "run")
    run.create()
    with run.lock():
        run.control_files.write(VALIDATION_GATE_FILE, f"2 {STOP_THERE}")
        found = fit_in_this_process(config, run, slices, False, "tiny")
        stopped_at = found["step"]
        assert (found["state"], stopped_at) == ("interrupted", 3), "in the step after the validation"
        (run.path / "stop-requested").unlink()
        run.control_files.write(VALIDATION_GATE_FILE, "4")
        found = fit_in_this_process(config, run, slices, False, "tiny")
    assert (found["state"], found["step"]) == ("finished", 4)
    log = (run.logs / "worker-0.log").read_text(encoding="utf-8")
    assert re.findall(r"training starts at step (\d) with 1 workers", log) == ["0", "3"]
    assert [record["global_step"] for record in run.read_metrics() if "val/dice/mean" in record] == [2, 4]
    assert list(run.tensorboard.glob("events*"))
    assert run.store.finished_phases() == ["source_only"]


def test_its_process_reserves_what_a_worker_needs_and_nothing_beside_several(tmp_path: Path) -> None:
    data = make_pair(tmp_path)
    one = tiny_config(data / "mr", data / "ct", ["scaling.num_workers=1", "scaling.cpus_per_worker=2"])
    assert own_resources(one, use_gpu=True).resources == {"CPU": 2, "GPU": 1}
    two = tiny_config(data / "mr", data / "ct", ["scaling.num_workers=2"])
    assert own_resources(two, use_gpu=True).resources == {}


def test_an_error_is_logged_and_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_pair(tmp_path)
    config = tiny_config(data / "mr", data / "ct", ["scaling.num_workers=1"])
    run = RunDirectory(tmp_path / "run")
    run.create()

    def fail(*given: object) -> None:
        raise ConfigError("a sentence")

    monkeypatch.setattr("mpscl_ray.train.loop.train", fail)
    with run.lock(), pytest.raises(ConfigError, match="a sentence"):
        fit_in_this_process(config, run, local_data(config), False, "tiny")
    assert "a sentence" in (run.logs / "worker-0.log").read_text(encoding="utf-8")
