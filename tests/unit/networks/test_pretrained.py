"""Released weights: what loads, what is skipped, and what is refused."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mpscl_ray.errors import DataError
from mpscl_ray.networks import initialise
from mpscl_ray.networks.deeplab import DeepLabV2
from mpscl_ray.networks.discriminators import PatchGANDiscriminator
from mpscl_ray.networks.pretrained import load_pretrained, load_prototypes


def segmenter(
    num_classes: int = 4, seed: int = 0, base_channels: int = 2, layers: tuple[int, ...] = (1, 1, 1, 1)
) -> DeepLabV2:
    network = DeepLabV2(num_classes, layers=layers, base_channels=base_channels)
    initialise(network, seed)
    return network


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in network.state_dict().items()}


def is_head(key: str) -> bool:
    return key.startswith(("layer5.", "layer6."))


@pytest.fixture
def released() -> dict[str, Tensor]:
    weights = weights_of(segmenter(seed=1))
    for key, tensor in weights.items():
        if key.endswith("running_mean"):
            tensor.fill_(0.5)
    return weights


@pytest.mark.parametrize("kind", ["zip", "legacy", "nested", "wrapped", "safetensors", "without counters"])
def test_weights_of_the_same_network_load(tmp_path: Path, released: dict[str, Tensor], kind: str) -> None:
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.save, about its old format
        if kind == "zip":
            torch.save(released, path)
        elif kind == "legacy":
            torch.save(released, path, _use_new_zipfile_serialization=False)
        elif kind == "nested":
            torch.save({"epoch": 3, "state_dict": released}, path)
        elif kind == "wrapped":
            torch.save({f"module.{key}": tensor for key, tensor in released.items()}, path)
        elif kind == "safetensors":
            save_file(released, path)
        else:
            torch.save({k: t for k, t in released.items() if not k.endswith("num_batches_tracked")}, path)
    network = segmenter()
    report = load_pretrained(network, path)
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, released[key]), key
    if kind != "without counters":
        assert set(report.loaded) == set(released)
        assert report.untouched == ()
    else:
        assert all(key.endswith("num_batches_tracked") for key in report.untouched)
        assert set(report.loaded) | set(report.untouched) == set(released)
    assert report.skipped == ()


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_caffe_prefix_is_dropped_and_its_classifier_left_out(
    tmp_path: Path, released: dict[str, Tensor], wrapper: str
) -> None:
    # As in the ImageNet file: the classifier is called layer5 and is for other classes; there is no layer6.
    file = {f"{wrapper}Scale.{key}": t for key, t in released.items() if not is_head(key)}
    file[f"{wrapper}Scale.layer5.conv2d_list.0.weight"] = torch.ones(1000, 64, 3, 3)
    file[f"{wrapper}Scale.layer5.conv2d_list.0.bias"] = torch.ones(1000)
    torch.save(file, tmp_path / "imagenet.pth")
    network = segmenter()
    before = weights_of(network)
    report = load_pretrained(network, tmp_path / "imagenet.pth")
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[key] if is_head(key) else released[key]), key
    assert report.skipped == tuple(f"{wrapper}Scale.layer5.conv2d_list.0.{name}" for name in ("weight", "bias"))
    assert report.untouched == tuple(key for key in before if is_head(key))


def test_other_number_of_classes_names_the_shapes_and_changes_nothing(tmp_path: Path) -> None:
    torch.save(weights_of(segmenter(19, seed=1)), tmp_path / "cityscapes.pth")
    network = segmenter(4)
    before = weights_of(network)
    with pytest.raises(DataError, match=r"layer5.conv2d_list.0.weight \[19, 32, 3, 3\] \(network: \[4, 32, 3, 3\]\)"):
        load_pretrained(network, tmp_path / "cityscapes.pth")
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[key]), key

    report = load_pretrained(network, tmp_path / "cityscapes.pth", heads=False)
    assert all(is_head(key) for key in (*report.skipped, *report.untouched))
    assert len(report.skipped) == len(report.untouched) == 16
    assert not torch.equal(network.conv1.weight, before["conv1.weight"])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (segmenter(base_channels=3), r"shape of conv1.weight \[3, 3, 7, 7\] \(network: \[2, 3, 7, 7\]\)"),
        (segmenter(layers=(2, 1, 1, 1)), r"holds layer1.1.conv1.weight.* and 14 more, which the network does not have"),
        (PatchGANDiscriminator(4, width=2), r"lacks conv1.weight.* and holds model.0.weight"),
    ],
)
def test_another_network_is_refused(tmp_path: Path, other: nn.Module, message: str) -> None:
    torch.save(weights_of(other), tmp_path / "other.pth")
    with pytest.raises(DataError, match=message):
        load_pretrained(segmenter(), tmp_path / "other.pth")


def test_missing_keys_are_named(tmp_path: Path, released: dict[str, Tensor]) -> None:
    del released["layer3.0.conv2.weight"]
    torch.save(released, tmp_path / "cut.pth")
    with pytest.raises(DataError, match=r"lacks layer3.0.conv2.weight"):
        load_pretrained(segmenter(), tmp_path / "cut.pth")


def test_discriminator_weights_load(tmp_path: Path) -> None:
    source, target = PatchGANDiscriminator(4, width=2), PatchGANDiscriminator(4, width=2)
    initialise(source, 1)
    torch.save(source.state_dict(), tmp_path / "discriminator.pth")
    load_pretrained(target, tmp_path / "discriminator.pth")
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


class Bomb:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("kind", ["pickle", "torch.save", "beside weights"])
def test_a_file_that_would_run_code_is_refused(tmp_path: Path, released: dict[str, Tensor], kind: str) -> None:
    path, trace = tmp_path / "bomb.pth", tmp_path / "it-ran"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(trace)))
    else:
        torch.save(Bomb(trace) if kind == "torch.save" else {**released, "extra": Bomb(trace)}, path)
    with pytest.raises(DataError, match=r"bomb.pth .*refused"):
        load_pretrained(segmenter(), path)
    assert not trace.exists()


def test_a_whole_pickled_network_is_refused(tmp_path: Path) -> None:
    torch.save(segmenter(), tmp_path / "network.pth")
    with pytest.raises(DataError, match=r"network.pth .*save its state dict alone"):
        load_pretrained(segmenter(), tmp_path / "network.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "overwritten"])
def test_a_damaged_file_is_named(tmp_path: Path, released: dict[str, Tensor], suffix: str, damage: str) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(released, path)
    else:
        save_file(released, path)
    content = path.read_bytes()
    damaged = {
        "cut": content[: len(content) // 2],
        "empty": b"",
        "text": b"<html>404: not found</html>\n" * 100,
        "overwritten": b"\x00" * 64 + content[64:],
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(DataError, match=rf"weights\{suffix}"):
        load_pretrained(segmenter(), path)


@pytest.mark.parametrize(
    ("content", "message"),
    [([1, 2], "holds a list"), ({}, "state dict"), ({"conv1.weight": 3}, "of type int"), ({3: torch.ones(1)}, "3")],
)
def test_anything_but_named_tensors_is_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(DataError, match=message):
        load_pretrained(segmenter(), tmp_path / "weights.pth")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.pth", tmp_path):
        with pytest.raises(DataError, match="no weights file at"):
            load_pretrained(segmenter(), path)


def test_non_finite_weights_are_refused(tmp_path: Path, released: dict[str, Tensor]) -> None:
    released["layer2.0.bn1.running_var"][0] = torch.nan
    torch.save(released, tmp_path / "weights.pth")
    with pytest.raises(DataError, match=r"NaN or infinite values in layer2.0.bn1.running_var"):
        load_pretrained(segmenter(), tmp_path / "weights.pth")


def test_a_key_with_and_without_prefix_is_refused(tmp_path: Path, released: dict[str, Tensor]) -> None:
    released["module.conv1.weight"] = released["conv1.weight"]
    torch.save(released, tmp_path / "weights.pth")
    with pytest.raises(DataError, match=r"'conv1.weight' twice"):
        load_pretrained(segmenter(), tmp_path / "weights.pth")


@pytest.mark.parametrize("shape", [(5, 64), (5, 64, 1, 1), (1, 5, 64)])
def test_prototypes_load(tmp_path: Path, shape: tuple[int, ...]) -> None:
    centres = np.arange(320, dtype=np.float64).reshape(shape)
    np.save(tmp_path / "centres.npy", centres)
    loaded = load_prototypes(tmp_path / "centres.npy", 5, 64)
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, torch.arange(320, dtype=torch.float32).reshape(5, 64))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((4, 64)), r"shape \[4, 64\].* 5 classes with 64"),
        (np.full((5, 64), np.nan), "NaN"),
        (np.zeros((5, 64), dtype=np.int64), "floating-point"),
        (np.array([{"a": 1}], dtype=object), "cannot be read"),
    ],
)
def test_prototypes_that_do_not_fit_are_refused(tmp_path: Path, content: np.ndarray, message: str) -> None:
    np.save(tmp_path / "centres.npy", content, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        load_prototypes(tmp_path / "centres.npy", 5, 64)


def test_prototypes_missing_or_damaged(tmp_path: Path) -> None:
    (tmp_path / "centres.npy").write_bytes(b"no numbers")
    for name in ("centres.npy", "nowhere.npy"):
        with pytest.raises(DataError, match=name):
            load_prototypes(tmp_path / name, 5, 64)
