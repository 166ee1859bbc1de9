"""The page of a training: what it says while it runs, after it was resumed, and that it can be left out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train.run_callback import RunCallback
from tests.tiny import CLASSES, make_pair, tiny_config
from tests.tiny_runs import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("data"))


def train_with_page(data: Path, run: Path, *overrides: str, stop_after: int | None = None) -> str:
    """Text of the page after a training; empty where there is none."""
    config = tiny_config(data / "mr", data / "ct", overrides)
    folder = RunDirectory(run)
    folder.create()
    callback = RunCallback(folder, config, CLASSES)
    train(config, run, stop_after, callback)
    callback.on_warning("the discriminator <main> wins")
    callback.close()
    return folder.progress_page.read_text(encoding="utf-8") if folder.progress_page.exists() else ""


def captions(page: str) -> list[str]:
    return re.findall(r"<figcaption>(.*?)</figcaption>", page)


def test_the_page_follows_a_training_that_is_interrupted_and_resumed(data: Path, tmp_path: Path) -> None:
    page = train_with_page(data, tmp_path / "run", stop_after=6)
    assert "warm-up, iteration 2 of 4" in page
    assert "<dd>6 of 12</dd>" in page
    assert re.search(r"<td>warm-up</td><td>4</td><td>50 %</td>", page)
    assert captions(page) == ["iteration 4"]
    assert "<li>the discriminator &lt;main&gt; wins</li>" in page
    assert 'http-equiv="refresh"' in page
    assert "validation criteria without labels of the target" in page
    page = train_with_page(data, tmp_path / "run")
    assert "All phases are trained" in page
    assert captions(page) == ["iteration 12", "iteration 8", "iteration 4"]
    assert 'http-equiv="refresh"' not in page
    assert page.count("the discriminator &lt;main&gt; wins") == 2, "what an earlier start said is kept"
    assert "best of adaptation by label_free" in page


def test_slices_beyond_the_checkpoint_that_a_run_resumes_from_are_dropped(data: Path, tmp_path: Path) -> None:
    folder = RunDirectory(tmp_path / "run")
    folder.create()
    folder.slices.mkdir()
    for step in (4, 8):
        (folder.slices / f"step-{step:07d}.png").write_bytes(b"png")
    callback = RunCallback(folder, tiny_config(data / "mr", data / "ct"), CLASSES)
    callback.on_start(4)
    callback.close()
    assert [file.name for file in folder.slices.iterdir()] == ["step-0000004.png"]


def test_a_run_may_have_no_page(data: Path, tmp_path: Path) -> None:
    assert train_with_page(data, tmp_path / "run", "run.progress_page=false", stop_after=4) == ""
    assert not (tmp_path / "run" / "slices").exists()
