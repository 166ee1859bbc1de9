"""Methods with stages: what each stage is made of. No target labels."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from mpscl_ray.config import Config
from mpscl_ray.data.dataset import load_manifest
from mpscl_ray.runs import checkpoint
from tests.tiny import STAGES, local_data, make_dataset, tiny_config
from tests.tiny_runs import RecordingCallback, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target has no label."""
    base = tmp_path_factory.mktemp("stages")
    make_dataset(base / "mr", "mr")
    make_dataset(base / "ct", "ct", seed=1, labelled=())
    assert not any(case.labelled for case in load_manifest(base / "ct").cases)
    return base


def config_of(data: Path, name: str) -> Config:
    return tiny_config(data / "mr", data / "ct", STAGES[name], preset=f"small/{name}")


def test_the_second_stage_of_intrada_sees_the_target_alone(data: Path, tmp_path: Path) -> None:
    config = tiny_config(
        data / "mr",
        data / "ct",
        [*STAGES["intrada"], "phases.adaptation=10", *(f"data.augmentation.{change}" for change in NONE)],
        preset="small/intrada",
    )
    watcher = RecordingCallback()
    _, folder = train(config, tmp_path, None, watcher)
    state = checkpoint.load(folder.phases / "adaptation")["fixed"]["split"]
    slices = local_data(config).unlabelled
    assert slices is not None
    (images,) = (batch["image"] for batch in slices.shard(0, 1, 100))
    easy, hard = images[state["easy"]], images[state["hard"]]
    assert (len(easy), len(hard)) == (12, 6)
    for batch in watcher.batches[4:]:
        assert batch.target_image is not None
        for image, label in zip(batch.source_image, batch.source_label, strict=True):
            (row,) = (index for index in range(12) if torch.equal(easy[index], image))
            assert torch.equal(label.to(torch.uint8), state["pseudo_labels"][row])
        assert all(any(torch.equal(image, other) for other in hard) for image in batch.target_image)


def test_the_teacher_of_each_round_of_cag_is_the_end_of_the_round_before(data: Path, tmp_path: Path) -> None:
    _, folder = train(config_of(data, "cag"), tmp_path)
    states = [checkpoint.load(folder.phases / name)["method"] for name in ("warm_up", *ROUNDS)]
    for before, state in itertools.pairwise(states):
        assert state["teacher"].keys() == before["networks"]["segmenter"].keys()
        for key, tensor in state["teacher"].items():
            assert torch.equal(tensor, before["networks"]["segmenter"][key]), key
        assert state["anchors"]["counts"].sum() > 0
    assert not torch.equal(states[1]["anchors"]["features"], states[3]["anchors"]["features"])


NONE = ("rotation_deg=0", "scale=[1,1]", "translation=0")
ROUNDS = ("adaptation_1", "adaptation_2", "adaptation_3")
