"""From settings to networks: pretrained weights from files and from other runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mpscl_ray.config import load_config
from mpscl_ray.errors import DataError
from mpscl_ray.runs import checkpoint
from mpscl_ray.train.phases import build_segmenter, load_pretrained_weights, transfer_weights
from tests.tiny import SETTINGS
from tests.tiny_methods import segmenter


def stored(folder: Path, num_classes: int) -> Path:
    config = load_config("small/mpscl", [*SETTINGS, "run.seed=7"])
    weights = build_segmenter(config, num_classes).state_dict()
    return checkpoint.save(folder / "source_only", {"method": {"networks": {"segmenter": weights}}})


def test_the_checkpoint_of_a_run_gives_pretrained_weights(tmp_path: Path) -> None:
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


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = stored(tmp_path, 3)
    tensors = path / "tensors.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    config = load_config("small/mpscl", [*SETTINGS, f"network.pretrained={path}"])
    with pytest.raises(DataError, match=r"tensors\.safetensors"):
        load_pretrained_weights(build_segmenter(config, 3), config)


def test_a_head_that_moved_keeps_its_weights_and_its_biases() -> None:
    """CLAN has its second head on another stage than the phase before it."""
    before, own, moved = segmenter(1), segmenter(2, twin_heads=True), segmenter(2, twin_heads=True)
    transfer_weights({"segmenter": moved}, {"segmenter": before.state_dict()})
    for name, tensor in moved.state_dict().items():
        expected = own if name.startswith("layer5.") else before
        assert torch.equal(tensor, expected.state_dict()[name]), name
