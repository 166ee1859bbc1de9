"""Checkpoints are written beside the training: they hold the moment of saving, and failures reach the training."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mpscl_ray.config import load_config
from mpscl_ray.errors import StorageError
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train.checkpointing import Checkpointer, TrainerState
from tests.tiny import SETTINGS
from tests.tiny_methods import CLASSES, CPU, make_segmentation

NAMES = tuple("abc"[:CLASSES])


@pytest.fixture
def folder(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.create()
    return run


@pytest.fixture
def checkpointer(folder: RunDirectory) -> Iterator[Checkpointer]:
    config = load_config("small/source_only", [*SETTINGS[:5], "run.keep_checkpoints=2", "run.select=label_free"])
    found = Checkpointer(config, NAMES, folder, CPU)
    yield found
    found.close()


def save(checkpointer: Checkpointer, method: Any, step: int, *directories: Path) -> None:
    for directory in directories:
        checkpointer.save(directory, method, "source_only", TrainerState(0, step, step))


def test_what_is_written_is_the_moment_of_saving(
    checkpointer: Checkpointer, folder: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = make_segmentation()
    method.start_phase(10)
    expected = {name: tensor.clone() for name, tensor in method.networks["segmenter"].state_dict().items()}
    released = threading.Event()
    write = checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *a, **k: (released.wait(30), write(*a, **k))[1])
    directory = folder.checkpoints / "step-0000001"
    save(checkpointer, method, 1, directory)
    with torch.no_grad():
        for tensor in method.networks["segmenter"].state_dict().values():
            tensor.add_(1)
    assert not checkpointer.poll(), "training goes on while the checkpoint is written"
    assert not directory.exists()
    released.set()
    assert checkpointer.finish()
    found = checkpoint.load(directory)["method"]["networks"]["segmenter"]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_checkpoints_of_one_step_share_the_file_of_tensors(checkpointer: Checkpointer, folder: RunDirectory) -> None:
    method = make_segmentation()
    method.start_phase(10)
    names = (folder.best, folder.checkpoints / "step-0000004", folder.phases / "source_only")
    save(checkpointer, method, 4, *names)
    assert checkpointer.finish()
    assert len({os.stat(name / checkpoint.TENSORS).st_ino for name in names}) == 1
    assert [checkpoint.load(name)["selected_by"] for name in names] == ["label_free", None, None]
    for step in (5, 6, 7):
        save(checkpointer, method, step, folder.checkpoints / f"step-000000{step}")
        assert checkpointer.finish()
    assert [path.name for path in checkpoint.list_checkpoints(folder.checkpoints)] == ["step-0000006", "step-0000007"]
    for name in (folder.best, folder.phases / "source_only"):
        assert checkpoint.load(name)["position"]["step"] == 4, "pruning one leaves the others"


def test_without_hard_links_the_tensors_are_written_again(
    checkpointer: Checkpointer, folder: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", refuse)
    method = make_segmentation()
    method.start_phase(10)
    save(checkpointer, method, 4, folder.best, folder.checkpoints / "step-0000004")
    assert checkpointer.finish()
    for name in (folder.best, folder.checkpoints / "step-0000004"):
        checkpoint.verify(name)
        assert os.stat(name / checkpoint.TENSORS).st_nlink == 1


def test_a_checkpoint_that_cannot_be_written_ends_the_training(
    checkpointer: Checkpointer, folder: RunDirectory
) -> None:
    method = make_segmentation()
    method.start_phase(10)
    (folder.checkpoints / "step-0000001").write_text("in the way")
    save(checkpointer, method, 1, folder.checkpoints / "step-0000001")
    with pytest.raises(StorageError, match="a file of that name is in the way"):
        checkpointer.finish()


def test_only_a_checkpoint_to_resume_from_counts_as_progress(checkpointer: Checkpointer, folder: RunDirectory) -> None:
    method = make_segmentation()
    method.start_phase(10)
    save(checkpointer, method, 1, folder.best)
    assert not checkpointer.finish()
    save(checkpointer, method, 2, folder.checkpoints / "step-0000002")
    assert checkpointer.finish()
    assert not checkpointer.poll(), "it is said once"
