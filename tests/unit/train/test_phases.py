"""From settings to networks: start weights out of files and out of other runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mpscl_ray.config import ADAPTATION, load_config
from mpscl_ray.errors import DataError
from mpscl_ray.methods.base import TrainingSlices
from mpscl_ray.methods.mpscl import MPSCL
from mpscl_ray.runs import checkpoint
from mpscl_ray.train.phases import build_method, build_segmenter, load_pretrained_weights, prepare
from tests.tiny import SETTINGS


def stored(folder: Path, num_classes: int) -> Path:
    config = load_config("small/mpscl", [*SETTINGS, "run.seed=7"])
    weights = build_segmenter(config, num_classes).state_dict()
    return checkpoint.save(folder / "source_only", {"method": {"networks": {"segmenter": weights}}})


def test_the_checkpoint_of_a_run_is_a_start(tmp_path: Path) -> None:
    path = stored(tmp_path, 3)
    config = load_config("small/mpscl", [*SETTINGS, f"network.pretrained={path}"])
    segmenter = build_segmenter(config, 3)
    assert str(path) in (load_pretrained_weights(segmenter, config) or "")
    expected = checkpoint.load(path)["method"]["networks"]["segmenter"]
    assert all(torch.equal(value, expected[name]) for name, value in segmenter.state_dict().items())


def test_heads_for_other_classes_can_be_left_out(tmp_path: Path) -> None:
    path = stored(tmp_path, 5)
    config = load_config("small/mpscl", [*SETTINGS, f"network.pretrained={path}"])
    with pytest.raises(DataError, match="pretrained_heads=false"):
        load_pretrained_weights(build_segmenter(config, 3), config)
    config = load_config("small/mpscl", [*SETTINGS, f"network.pretrained={path}", "network.pretrained_heads=false"])
    segmenter = build_segmenter(config, 3)
    before = segmenter.layer6.conv2d_list[0].weight.clone()
    load_pretrained_weights(segmenter, config)
    assert torch.equal(segmenter.layer6.conv2d_list[0].weight, before)
    assert torch.equal(segmenter.conv1.weight, checkpoint.load(path)["method"]["networks"]["segmenter"]["conv1.weight"])


def test_a_damaged_start_is_refused(tmp_path: Path) -> None:
    path = stored(tmp_path, 3)
    tensors = path / "tensors.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    config = load_config("small/mpscl", [*SETTINGS, f"network.pretrained={path}"])
    with pytest.raises(DataError, match=r"tensors\.safetensors"):
        load_pretrained_weights(build_segmenter(config, 3), config)


def test_the_adaptation_begins_with_the_prototypes_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "centres.npy"
    config = load_config("small/mpscl", [*SETTINGS, f"network.pretrained_prototypes={file}"])
    segmenter = build_segmenter(config, 3)
    method = build_method(config, ADAPTATION, segmenter, 3, torch.device("cpu"))
    assert isinstance(method, MPSCL)
    centres = np.random.default_rng(0).normal(size=(1, 3, segmenter.feature_channels, 1)).astype(np.float32)
    np.save(file, centres)
    nothing = TrainingSlices(list, list, list, (), (32, 32), dict)
    prepare(method, config, nothing)
    assert np.array_equal(method.prototypes.numpy(), centres.reshape(3, -1))
    np.save(file, centres[:, :2])
    with pytest.raises(DataError, match="class centres"):
        prepare(method, config, nothing)
