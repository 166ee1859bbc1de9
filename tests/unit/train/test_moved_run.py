"""A run that was moved, with its data or alone, and the commands that a finished run prints."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest

from mpscl_ray import train_segmenter
from mpscl_ray.errors import DataError
from mpscl_ray.evaluate import command as evaluate
from mpscl_ray.predict import command as predict
from mpscl_ray.report import command as report
from mpscl_ray.report import run as report_run
from mpscl_ray.runs import next_steps
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train.display import print_next_steps
from tests.tiny import make_dataset, tiny_settings

COMMANDS: dict[str, ModuleType] = {"evaluate": evaluate, "predict": predict, "report": report}
pytestmark = pytest.mark.filterwarnings("ignore:7 patients in source and target")
RUN = Path("it's runs") / "one"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the datasets ``data/a`` and ``data/b`` of one modality, no test case labelled, and a run."""
    folder = tmp_path_factory.mktemp("projects") / "old"
    for seed, name in enumerate("ab"):
        make_dataset(folder / "data" / name, "mr", seed=seed, labelled=("train", "val"))
    train_segmenter("small/mpscl", [*tiny_settings("small/mpscl"), *places(folder)], device="cpu")
    return folder


def places(folder: Path) -> list[str]:
    names = {"data.source": folder / "data/a", "data.target": folder / "data/b", "run.storage": (folder / RUN).parent}
    return [*(f"{key}={path}" for key, path in names.items()), "run.name=one"]


@pytest.fixture
def moved(project: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of it elsewhere, and nothing where it was."""
    elsewhere = Path(shutil.copytree(project, tmp_path / "far" / "new"))
    away = project.rename(project.with_name("away"))
    yield elsewhere
    shutil.rmtree(project, ignore_errors=True)
    away.rename(project)


def save_scan(file: Path) -> Path:
    voxels = np.random.default_rng(0).normal(100, 20, (40, 40, 3)).astype(np.float32)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), file)
    return file


def evaluated(run: Path, *words: str) -> dict[str, str]:
    """What the newest evaluation of the validation cases says of its dataset."""
    assert evaluate.main([str(run), "--split", "val", "--workers", "0", *words]) == 0
    newest = max(run.glob("results/last*/summary.json"), key=lambda file: file.stat().st_mtime_ns)
    return {"name": newest.parent.name, **json.loads(newest.read_text(encoding="utf-8"))["dataset"]}


def test_the_printed_commands_work(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    print_next_steps(RunDirectory(project / RUN), ["tensorboard"])
    lines = [shlex.split(line, comments=True) for line in capsys.readouterr().out.split("Next:")[1].splitlines()[1:]]
    assert [line[2] for line in lines[:-1]] == ["mpscl_ray.evaluate", "mpscl_ray.predict", "mpscl_ray.report"]
    assert lines[-1] == ["tensorboard", "--logdir", str(project / RUN / "tensorboard")]
    save_scan(tmp_path / "IMAGE.nii.gz")
    for _, _, module, *words in lines[:-1]:
        assert COMMANDS[module.partition(".")[2]].main(words) == 0


def test_tensorboard_is_named_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    events = Path("my runs/tensorboard")
    monkeypatch.setattr("shutil.which", lambda name: None)
    (line,) = next_steps.tensorboard_lines(events)
    assert line == "tensorboard --logdir 'my runs/tensorboard'  # first: pip install \"mpscl_ray[tensorboard]\""
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert next_steps.tensorboard_lines(events) == ["tensorboard --logdir 'my runs/tensorboard'"]


def test_a_run_that_was_moved_with_its_data(moved: Path, tmp_path: Path) -> None:
    run = moved / RUN
    assert evaluated(run)["path"] == str(moved / "data/b")
    (tmp_path / "link").symlink_to(run)
    assert evaluated(tmp_path / "link")["path"] == str(moved / "data/b")
    scan = save_scan(tmp_path / "scan.nii.gz")
    assert predict.main([str(run), str(scan), "--out", str(tmp_path / "predictions"), "--workers", "0"]) == 0
    report_run.report([run], tmp_path / "report", dpi=20)
    assert "does not exist any more" not in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")

    shutil.rmtree(run / "checkpoints" / "step-0000012")
    shutil.rmtree(run / "phases" / "adaptation")
    RunDirectory(run).write_status("interrupted", exit_code=130)
    result = train_segmenter(run / "config.yaml", places(moved), device="cpu")
    assert result.last_checkpoint == run / "checkpoints" / "step-0000012"
    assert "resuming from the checkpoint step-0000010" in (run / "logs" / "warnings.log").read_text(encoding="utf-8")
    assert RunDirectory(run).read_model()["target"]["dataset"] == str(moved / "data/b")


def test_a_run_that_was_moved_alone(moved: Path, tmp_path: Path) -> None:
    run = Path((moved / RUN).rename(tmp_path / "alone"))
    with pytest.raises(DataError, match=r"old/data/b, no longer exists; give its folder with --data"):
        evaluate.main([str(run), "--split", "val"])
    # Both have one modality: it is the fingerprint that tells the source from the target.
    assert evaluated(run, "--data", str(moved / "data/b"))["name"].startswith("last_val")
    assert evaluated(run, "--data", str(moved / "data/a"))["name"].startswith("last_mr_val")


def test_the_path_that_the_run_was_started_with_comes_first(moved: Path, project: Path) -> None:
    shutil.copytree(moved / "data", project / "data")
    assert evaluated(moved / RUN)["path"] == str(project / "data/b")
