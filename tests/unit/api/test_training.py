"""The public Python API: training, and the document that leads from data to scores."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mpscl_ray import (
    Config,
    ConfigError,
    DataError,
    TrainingError,
    TrainingResult,
    load_config,
    load_segmenter,
    train_segmenter,
)
from mpscl_ray.config import differences
from mpscl_ray.runs.run_directory import RunDirectory
from tests.tiny import tiny_config, tiny_settings
from tests.tiny_runs import train as train_locally
from tests.tracker_stores import forget_settings, mlflow_runs, wandb_files, wandb_history

ROOT = Path(__file__).resolve().parents[3]
DOCUMENT = ROOT / "docs" / "python-api.md"


@pytest.mark.filterwarnings("ignore:.*no structure was found")  # after a few steps of training
def test_the_document_runs(hearts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block after block in an empty folder. The preset phantom is replaced by a tiny one on tiny volumes, which lie
    where a run leaves the phantom hearts."""
    monkeypatch.chdir(tmp_path)
    for folder in ("scans", "runs/phantom-tiny/nifti"):
        Path(folder).parent.mkdir(parents=True, exist_ok=True)
        Path(folder).symlink_to(hearts / "scans")
    settings: dict[str, Any] = {"preset": "phantom", "data": {"global_batch_size": 4}}
    for line in (*tiny_settings("phantom"), "scaling.num_workers=2"):
        key, _, value = line.partition("=")
        *sections, last = key.split(".")
        place = settings
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = yaml.safe_load(value)
    settings["data"] |= {"source": str(hearts / "data" / "ct"), "target": str(hearts / "data" / "mr")}
    Path("tiny.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    text = DOCUMENT.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 160
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    assert len([line for line in blocks[0].splitlines() if line]) <= 8
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        exec(
            compile(block.replace('"phantom"', '"tiny.yaml"'), f"block {number + 1} of {DOCUMENT.name}", "exec"), names
        )
    assert set(names["scores"]) == {"MYO", "LAC", "LVC", "AA"}
    assert names["out"].exists()
    assert math.isfinite(names["loss"].item())


def test_training_leaves_what_the_command_leaves(
    result: TrainingResult, tiny: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert result.run == Path(tiny.run.storage) / "phantom"
    assert (result.run / "status.json").exists()
    status = json.loads((result.run / "status.json").read_text(encoding="utf-8"))
    assert (status["state"], status["exit_code"], status["phase"]) == ("finished", 0, "adaptation")
    assert differences(load_config(result.run / "config.yaml"), tiny).keys() == {"scaling.num_workers"}
    assert list(result.scores) == ["source_only", "warm_up", "adaptation"]
    assert set(result.scores["adaptation"]) == {"mean", "MYO", "LAC", "LVC", "AA"}
    assert 0 <= result.scores["adaptation"]["MYO"]["dice"] <= 1
    assert result.last_checkpoint == result.run / "checkpoints" / "step-0000012"
    assert result.best_checkpoint == result.run / "best"
    assert {path.name for path in result.run.iterdir()} >= {"progress.png", "tensorboard", "results", "metrics.jsonl"}
    assert (result.run / "results" / "phases.png").exists()
    assert b"panel/target" in b"".join(path.read_bytes() for path in (result.run / "tensorboard").iterdir())

    # The loop as tests run it on data that they open themselves.
    _, folder = train_locally(tiny, tmp_path / "run")
    without_speed = [
        [{key: value for key, value in record.items() if not key.startswith("perf/")} for record in records]
        for records in (result.history, folder.read_metrics())
    ]
    assert without_speed[0] == without_speed[1]

    # Once more: the result of the finished run.
    checkpoint = result.last_checkpoint.stat().st_mtime_ns
    again = train_segmenter(tiny, device="cpu")
    assert repr(again) == repr(result)  # NaN is not NaN
    assert again.last_checkpoint.stat().st_mtime_ns == checkpoint
    assert capfd.readouterr() == ("", "")


def test_without_images_no_picture_of_a_patient_is_kept(tiny: Config, tmp_path: Path) -> None:
    run = train_segmenter(tiny, {"run.images": False, "run.storage": tmp_path}, device="cpu").run
    pictures = {path.relative_to(run).as_posix() for path in run.rglob("*.png")}
    assert pictures == {"progress.png"}
    assert not (run / "pseudo_labels").exists()
    assert b"panel/target" not in b"".join(path.read_bytes() for path in (run / "tensorboard").iterdir())
    page = (run / "progress.html").read_text(encoding="utf-8")
    assert "data:image" not in page


def test_trackers_have_the_settings_and_the_scores(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("wandb")
    forget_settings(monkeypatch)
    short = {"phases.warm_up": 0, "phases.adaptation": 0, "run.loggers": ["mlflow", "wandb"], "run.storage": tmp_path}
    trained = train_segmenter(tiny, short, device="cpu")
    run = RunDirectory(trained.run)
    client, (found,) = mlflow_runs(run)
    assert found.info.status == "FINISHED"
    assert found.data.params["optim.lr"] == str(tiny.optim.lr)
    assert found.data.tags["method"] == "mpscl"
    dice = trained.scores["source_only"]["mean"]["dice"]
    assert found.data.metrics["final/source_only/dice/mean"] == dice
    losses = [(record["global_step"], record["train/loss_segmentation"]) for record in trained.history]
    history = client.get_metric_history(found.info.run_id, "train/loss_segmentation")
    assert [(one.step, one.value) for one in history] == losses
    assert wandb_history(wandb_files(run), "train/loss_segmentation") == losses
    assert not (run.path / "tensorboard").exists() or not list((run.path / "tensorboard").iterdir())


def test_the_random_state_of_the_caller_stays(tiny: Config, tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    changes = {"run.storage": tmp_path, "phases.warm_up": 0, "phases.adaptation": 0}
    load_segmenter(train_segmenter(tiny, changes, device="cpu").run, device="cpu")
    assert torch.rand(1) == expected


def test_a_run_that_ctrl_c_ends_is_resumed(tiny: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    every = {"run.log_every": 10, "run.checkpoint_every": 10, "run.validate_every": 1000}
    phases = {"phases.source_only": 100, "phases.warm_up": 0, "phases.adaptation": 0}
    changes = {"run.storage": tmp_path, **phases, **every}
    run = tmp_path / "phantom"

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while not list(run.glob("checkpoints/step-*")) and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(os.getpid(), 2)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in the background
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        train_segmenter(tiny, changes, device="cpu")
    thread.join()
    status = json.loads((run / "status.json").read_text(encoding="utf-8"))
    assert (status["state"], status["exit_code"]) == ("interrupted", 130)
    assert status["resume_command"].endswith("config.yaml")
    assert status["global_step"] < 100
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ConfigError, match=r"started with another config: optim\.lr"):
        train_segmenter(tiny, {**changes, "optim.lr": 0.5}, device="cpu")

    result = train_segmenter(tiny, changes, device="cpu", progress=True)
    assert [record["global_step"] for record in result.history] == list(range(10, 101, 10))
    assert "resuming from the checkpoint" in (run / "logs" / "warnings.log").read_text(encoding="utf-8")
    assert "source-only" in capfd.readouterr().err


def test_errors_of_training_are_exceptions(tiny: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wild = {"optim.lr": 1e30, "run.log_every": 1, "optim.max_skipped_steps": 0}
    told = r"seen at iteration 2 of the phase source_only .*, also with lower learning rates"
    with pytest.raises(TrainingError, match=told):
        train_segmenter(tiny, {"run.storage": tmp_path, **wild}, device="cpu")
    status = json.loads((tmp_path / "phantom" / "status.json").read_text(encoding="utf-8"))
    assert (status["state"], status["exit_code"]) == ("failed", TrainingError.exit_code)
    with pytest.raises(DataError, match="nowhere"):
        train_segmenter(tiny, {"run.storage": tmp_path, "run.name": "b", "data.source": "nowhere"}, device="cpu")
    with pytest.raises(ConfigError, match=r"run\.storage=s3://bucket is a URL"):
        train_segmenter(tiny, {"run.storage": "s3://bucket"})
    with pytest.raises(ConfigError, match="there is no device 'gpu'"):
        train_segmenter(tiny, {"run.storage": tmp_path}, device="gpu")
    assert capfd.readouterr() == ("", "")


def test_what_is_odd_about_the_data_is_a_warning(tmp_path: Path) -> None:
    from tests.tiny import make_dataset

    make_dataset(tmp_path / "mr", "mr", labelled=("train",))
    make_dataset(tmp_path / "ct", "ct", seed=1)
    config = tiny_config(tmp_path / "mr", tmp_path / "ct", [f"run.storage={tmp_path}", "phases.adaptation=0"])
    with pytest.warns(UserWarning, match="no labelled validation cases") as caught:
        result = train_segmenter(config, {"phases.warm_up": 0}, device="cpu")
    assert caught[0].filename == __file__
    assert result.best_checkpoint is None
