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
from mpscl_ray.methods.base import TargetSplit
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train.checkpointing import Checkpointer, TrainerState
from tests.checkpoints import assert_same
from tests.tiny import SETTINGS
from tests.tiny_methods import CLASSES, CPU, make, make_segmentation

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


def easy_and_hard(label: int) -> TargetSplit:
    return TargetSplit(torch.tensor([0, 2]), torch.tensor([1]), torch.full((2, 8, 8), label, dtype=torch.uint8))


def test_what_stays_the_same_in_a_phase_is_written_once(checkpointer: Checkpointer, folder: RunDirectory) -> None:
    method = make("intrada")
    method.start_phase(10)
    method.split = easy_and_hard(1)
    names = [folder.checkpoints / f"step-000000{step}" for step in range(1, 5)]
    for step, name in enumerate(names[:3], start=1):
        save(checkpointer, method, step, folder.best, name)
        assert checkpointer.finish()
    assert not names[0].exists()
    assert len({os.stat(name / checkpoint.FIXED).st_ino for name in (folder.best, *names[1:3])}) == 1
    assert len({os.stat(name / checkpoint.TENSORS).st_ino for name in names[1:3]}) == 2

    method.split = easy_and_hard(2)
    save(checkpointer, method, 4, names[3])
    assert checkpointer.finish()
    for name, label in ((names[2], 1), (names[3], 2)):
        checkpoint.verify(name)
        resumed = make("intrada")
        checkpointer.restore(checkpoint.load(name), resumed, 10)
        assert_same(vars(resumed.split), vars(easy_and_hard(label)))

    # Another process goes on from the newest one and shares its file too.
    again = Checkpointer(checkpointer.config, NAMES, folder, CPU)
    assert again.load_newest(print)
    save(again, method, 5, folder.checkpoints / "step-0000005")
    assert again.finish()
    again.close()
    assert os.stat(folder.checkpoints / "step-0000005" / checkpoint.FIXED).st_nlink == 2


def test_a_damaged_or_missing_file_of_fixed_tensors_is_named(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "one", {"fixed": {"a": torch.arange(5)}, "fixed.a": torch.zeros(2)})
    assert_same(checkpoint.load(path), {"fixed.a": torch.zeros(2), "fixed": {"a": torch.arange(5)}})
    content = bytearray((path / checkpoint.FIXED).read_bytes())
    content[-1] ^= 1
    (path / checkpoint.FIXED).write_bytes(bytes(content))
    with pytest.raises(checkpoint.CheckpointDamaged, match=r"fixed\.safetensors has the SHA-256"):
        checkpoint.verify(path)
    (path / checkpoint.FIXED).unlink()
    with pytest.raises(checkpoint.CheckpointDamaged, match=r"fixed\.safetensors is missing"):
        checkpoint.load(path)


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
