"""The run folder: records that survive, and no silent change of config."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mpscl_ray.errors import ConfigError, DataError, StorageError
from mpscl_ray.runs import environment, run_directory
from mpscl_ray.runs.run_directory import RunDirectory

CONFIG = """\
run:
  name: demo
  storage: runs
method:
  name: mpscl
  margin_source: 0.3
  betas: [0.9, 0.99]
scaling:
  num_workers: 2
  device: auto
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    folder = RunDirectory(tmp_path / "runs" / "demo")
    folder.create()
    return folder


# ---- the folder ----


def test_layout_is_the_documented_one(run: RunDirectory) -> None:
    assert not run.exists
    run.create()
    run.write_config(CONFIG)
    run.write_model({"classes": ["background", "MYO"]})
    run.write_environment(["train", "phantom"])
    run.append_metrics({"global_step": 1})
    run.write_status("running")
    assert run.exists
    assert run.read_config() == CONFIG
    assert run.read_model() == {"classes": ["background", "MYO"]}
    assert run_directory.__doc__ is not None
    documented = re.findall(r"^        ([\w.]+)(?:/\w*)*  +", run_directory.__doc__, re.MULTILINE)
    assert set(os.listdir(run.path)) <= set(documented)


def test_making_the_object_touches_nothing(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "runs" / "demo")
    assert os.listdir(tmp_path) == []


def test_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(StorageError, match=rf"{tmp_path}/runs.* is a file where a folder is needed"):
        RunDirectory(tmp_path / "runs" / "demo").create()
    with pytest.raises(StorageError, match="is a file where a folder is needed"):
        RunDirectory(tmp_path / "runs").create()


def test_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, data: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(StorageError, match=rf"cannot write {tmp_path}/demo: Permission denied .*choose another folder"):
        RunDirectory(tmp_path / "demo").create()


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind the superuser")
def test_folder_that_is_read_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        RunDirectory(tmp_path / "demo").create()


def test_reading_a_run_that_is_not_there(run: RunDirectory) -> None:
    with pytest.raises(ConfigError, match=r"demo is not the folder of a run: it has no config.yaml$"):
        run.require()
    with pytest.raises(ConfigError, match=r"nowhere: no such folder, expected that of a run$"):
        RunDirectory(run.path.parent / "nowhere").require()
    other = RunDirectory(run.path.parent / "other")
    other.create()
    other.write_config(CONFIG)
    with pytest.raises(ConfigError, match=r"; runs beside it: other$"):
        run.require()
    with pytest.raises(DataError, match=r"model.json is missing"):
        run.read_model()
    run.model_file.write_text("{")
    with pytest.raises(DataError, match=r"model.json is damaged"):
        run.read_model()


# ---- config of a resumed run ----


def test_same_config_goes_on(run: RunDirectory) -> None:
    run.write_config(CONFIG)
    assert run.check_config(CONFIG) == []
    assert run.check_config("# reordered\nscaling: {device: auto, num_workers: 2}\n" + CONFIG.split("scaling")[0]) == []


def test_changed_config_is_refused_with_all_keys(run: RunDirectory) -> None:
    run.write_config(CONFIG)
    now = (
        CONFIG.replace("0.3", "0.4")
        .replace("0.99", "0.999")
        .replace("num_workers: 2", "num_workers: 4")
        .replace("  device: auto\n", "")
    )
    with pytest.raises(ConfigError) as caught:
        run.check_config(now, may_change=["scaling.num_workers", "run"])
    message = str(caught.value)
    assert "the run demo was started with another config" in message
    assert "method.margin_source: 0.3 in the run, 0.4 now" in message
    assert "method.betas: [0.9, 0.99] in the run, [0.9, 0.999] now" in message
    assert 'scaling.device: "auto" in the run, absent now' in message
    assert "scaling.num_workers:" not in message
    assert message.endswith("; set them back, or give another run.name")
    with pytest.raises(ConfigError, match=r"; set it back, give another run\.name, or --allow-change$"):
        run.check_config(CONFIG.replace("0.3", "0.4"), option="--allow-change")


def test_allowed_changes_are_returned(run: RunDirectory) -> None:
    run.write_config(CONFIG)
    now = CONFIG.replace("num_workers: 2", "num_workers: 4")
    assert run.check_config(now, may_change=["scaling"]) == ["scaling.num_workers: 2 in the run, 4 now"]
    with pytest.raises(ConfigError):
        run.check_config(now, may_change=["scal"])


def test_a_run_that_is_older_than_a_setting_has_its_default(run: RunDirectory) -> None:
    run.write_config(CONFIG)
    defaults = {"method": {"margin_source": 0.4, "ema": 0.99}, "optim": {"accumulate": 1}}
    now = CONFIG + "optim: {accumulate: 1}\n"
    assert run.check_config(now, defaults=defaults) == []
    with pytest.raises(ConfigError, match=r"config: optim\.accumulate: 1 in the run, 2 now; set it back"):
        run.check_config(now.replace("accumulate: 1", "accumulate: 2"), defaults=defaults)
    with pytest.raises(ConfigError, match=r"config: optim\.accumulate: absent in the run, 1 now; "):
        run.check_config(now)


def test_a_run_that_is_older_than_the_kind_of_optimiser_keeps_its_weight_decay(run: RunDirectory) -> None:
    """Null stands for 5e-4 with SGD, which such a run has."""
    run.write_config(CONFIG + "optim: {weight_decay: 0.0005}\n")
    defaults = {"optim": {"kind": "sgd", "weight_decay": None}}
    now = CONFIG + "optim: {kind: sgd, weight_decay: null}\n"
    assert run.check_config(now, defaults=defaults) == []
    assert run.check_config(now.replace("null", "0.0005"), defaults=defaults) == []
    with pytest.raises(ConfigError, match=r"config: optim\.kind: \"sgd\" in the run, \"adamw\" now; set it back"):
        run.check_config(now.replace("sgd", "adamw"), defaults=defaults)
    run.write_config(CONFIG + "optim: {weight_decay: 0.0001}\n")
    with pytest.raises(ConfigError, match=r"optim\.weight_decay: 0\.0001 in the run, null now"):
        run.check_config(now, defaults=defaults)
    run.write_config(now.replace("null", "0.0005"))
    with pytest.raises(ConfigError, match=r"optim\.weight_decay: 0\.0005 in the run, null now"):
        run.check_config(now, defaults=defaults)


def test_damaged_config(run: RunDirectory) -> None:
    run.write_config("{")
    with pytest.raises(DataError, match=r"config.yaml is damaged"):
        run.check_config(CONFIG)


# ---- metrics ----


def test_metrics_round_trip(run: RunDirectory) -> None:
    run.append_metrics({"global_step": 1, "phase": "warm_up", "train/loss": 0.1 + 0.2, "none": None})
    run.append_metrics(
        {"global_step": 2, "a": np.float32(0.5), "b": torch.tensor(2.5), "c": math.inf, "d": -math.inf, "e": math.nan}
    )
    first, second = run.read_metrics()
    assert first == {"global_step": 1, "phase": "warm_up", "train/loss": 0.1 + 0.2, "none": None}
    assert math.isnan(second.pop("e"))
    assert second == {"global_step": 2, "a": 0.5, "b": 2.5, "c": math.inf, "d": -math.inf}
    for line in run.metrics_file.read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize("torn", [b'{"global_step": 3, "x', b'{"global_step": 3}', b"\0\0\0\0", b'{"glob\n', b"\n"])
def test_torn_last_line_is_left_out_and_overwritten(run: RunDirectory, torn: bytes) -> None:
    for step in (1, 2):
        run.append_metrics({"global_step": step})
    whole = run.metrics_file.read_bytes()
    run.metrics_file.write_bytes(whole + torn)
    assert [record["global_step"] for record in run.read_metrics()] == [1, 2]
    RunDirectory(run.path).append_metrics({"global_step": 3, "new": True})
    assert run.metrics_file.read_bytes() == whole + b'{"global_step": 3, "new": true}\n'


def test_damaged_line_in_the_middle_is_named(run: RunDirectory) -> None:
    run.metrics_file.write_bytes(b'{"global_step": 1}\n{"glob\n{"global_step": 3}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl line 2 is damaged"):
        run.read_metrics()


def test_rewind_drops_what_is_made_again(run: RunDirectory) -> None:
    run.rewind_metrics(0)
    assert not run.metrics_file.exists()
    for step in (10, 20, 30, 40):
        run.append_metrics({"global_step": step, "value": math.nan})
    before = run.metrics_file.read_bytes()
    with run.metrics_file.open("ab") as file:
        file.write(b'{"torn')
    run.rewind_metrics(20)
    assert run.metrics_file.read_bytes() == b"".join(before.splitlines(keepends=True)[:2])
    run.append_metrics({"global_step": 30})
    assert [record["global_step"] for record in run.read_metrics()] == [10, 20, 30]


def test_rewind_drops_the_start_of_the_next_phase(run: RunDirectory) -> None:
    """Its record has the global step at which the phase before ended, and it is begun again."""
    records = [(10, "first"), (20, "first"), (20, "second"), (30, "second")]
    for step, phase in records:
        run.append_metrics({"global_step": step, "phase": phase})
    run.rewind_metrics(30, "second")
    assert len(run.read_metrics()) == 4
    run.rewind_metrics(20, "first")
    assert [(record["global_step"], record["phase"]) for record in run.read_metrics()] == records[:2]


def test_metrics_on_a_full_disk_keep_what_was_written(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    run.append_metrics({"global_step": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"metrics.jsonl: no space left"):
            run.append_metrics({"global_step": 2})
    run.append_metrics({"global_step": 3})
    assert [record["global_step"] for record in run.read_metrics()] in ([1, 3], [1, 2, 3])


def test_what_is_written_is_synced_before_it_has_its_name(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a power cut: a file's contents before the rename, its folder after it; a record before it is counted."""
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        file = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(f"sync {file.name}" + (f" {file.stat().st_size}" if file.is_file() else ""))
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        events.append(f"rename {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    run.write_config("a: 1\n")
    run.append_metrics({"global_step": 1})
    assert events == [
        f"sync .config.yaml.partial-{os.getpid()} 5",
        "rename config.yaml",
        "sync demo",
        f"sync metrics.jsonl {run.metrics_file.stat().st_size}",
    ]


# ---- status and environment ----


def test_status_keeps_what_is_not_given(run: RunDirectory) -> None:
    assert run.read_status() == {}
    run.write_status(
        "running", phase="warm_up", iteration=5, global_step=105, resume_command="python -m mpscl_ray.train"
    )
    run.write_status("failed", exit_code=6, reason="loss_contrastive_target is not finite")
    status = run.read_status()
    assert (status.pop("pid"), status.pop("host")) == (os.getpid(), platform.node())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", status.pop("updated"))
    assert status == {
        "state": "failed",
        "exit_code": 6,
        "reason": "loss_contrastive_target is not finite",
        "resume_command": "python -m mpscl_ray.train",
        "phase": "warm_up",
        "iteration": 5,
        "global_step": 105,
    }
    run.write_status("running")
    assert run.read_status()["reason"] == ""
    assert run.read_status()["exit_code"] is None


def test_damaged_status_can_be_replaced(run: RunDirectory) -> None:
    run.status_file.write_text('{"state": "run')
    with pytest.raises(DataError, match=r"status.json is damaged"):
        run.read_status()
    run.write_status("running", phase="warm_up")
    assert run.read_status()["phase"] == "warm_up"


def test_environment_says_what_ran_and_no_secrets(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "environment-secret")
    run.write_environment(["train", "data=https://user:url-secret@host/x", "api_key=key-secret", "run.name=demo"])
    text = run.environment_file.read_text(encoding="utf-8")
    content = json.loads(text)
    assert content["command"] == ["train", "data=https://***@host/x", "api_key=***", "run.name=demo"]
    assert "secret" not in text
    assert content["torch"]["version"] == torch.__version__
    assert content["packages"]["numpy"] == np.__version__
    assert "ray" in content["packages"]
    assert content["python"].endswith(".".join(map(str, sys.version_info[:3])))
    assert os.uname().nodename not in (content["platform"], *content["command"])


def test_environments_of_earlier_starts_are_kept(run: RunDirectory) -> None:
    run.write_environment(["first"])
    started = json.loads(run.environment_file.read_text(encoding="utf-8"))["started"]
    run.write_environment(["second"])
    assert json.loads(run.environment_file.read_text(encoding="utf-8"))["command"] == ["second"]
    (kept,) = run.logs.glob("environment-*.json")
    assert kept.stem == "environment-" + re.sub(r"\D", "", started.removesuffix("+00:00"))
    assert json.loads(kept.read_text(encoding="utf-8"))["command"] == ["first"]


def test_gpus_are_read_from_the_driver(tmp_path: Path) -> None:
    assert environment._gpus(tmp_path) == {"gpus": [], "gpu_driver": None}
    for bus, name in (("01", "NVIDIA A100-SXM4-80GB"), ("02", "NVIDIA H200")):
        folder = tmp_path / "gpus" / f"0000:{bus}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t\t {name}\nIRQ:   \t\t 42\n")
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\n")
    assert environment._gpus(tmp_path) == {"gpus": ["NVIDIA A100-SXM4-80GB", "NVIDIA H200"], "gpu_driver": "550.54.15"}


def test_commit_is_that_of_the_code_alone(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    assert environment._commit(package) is None
    (package / "__init__.py").touch()
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "of somebody else")
    assert environment._commit(package) is None
    git("add", ".")
    git("commit", "--quiet", "--message", "ours")
    assert environment._commit(package) == git("rev-parse", "HEAD")
    (package / "__init__.py").write_text("changed")
    assert environment._commit(package) == git("rev-parse", "HEAD") + "-dirty"
