"""Networks against outputs and state-dict keys of the released code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpscl_ray.networks.deeplab import DeepLabV2
from mpscl_ray.networks.discriminators import FCDiscriminator, PatchGANDiscriminator
from tests.golden.stored_numbers import fill_from_keys, load

NUM_CLASSES = 5


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load("networks")


@pytest.fixture(scope="module")
def keys() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(
        (Path(__file__).parent / "networks_state_dict_keys.json").read_text(encoding="utf-8")
    )
    return content


def shapes(network: nn.Module) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in network.state_dict().items()}


def assert_values(actual: Tensor | None, expected: Tensor) -> None:
    """To 1e-5 of the largest value; the golden float32 numbers are themselves up to 4e-6 off a float64 forward."""
    assert actual is not None
    difference = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert difference < 1e-5, f"relative difference {difference:.2e}"


def test_state_dict_of_the_segmenter(keys: dict[str, Any]) -> None:
    with torch.device("meta"):
        network = DeepLabV2(NUM_CLASSES)
    assert shapes(network) == keys["deeplabv2_resnet101"]
    assert list(shapes(network)) == list(keys["deeplabv2_resnet101"])
    trainable = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert sorted(trainable) == sorted(keys["deeplabv2_resnet101_trainable"])


def test_state_dict_of_the_discriminators(keys: dict[str, Any]) -> None:
    assert shapes(FCDiscriminator(NUM_CLASSES)) == keys["fc_discriminator"]
    assert shapes(PatchGANDiscriminator(NUM_CLASSES)) == keys["patchgan"]


def test_segmenter_in_evaluation_then_in_training(golden: dict[str, Tensor]) -> None:
    network = DeepLabV2(NUM_CLASSES, layers=(1, 1, 1, 1))
    fill_from_keys(network)
    with torch.no_grad():
        out = network.eval()(golden["input"])
        assert_values(out.features[:, :8], golden["eval_features_first8"])
        assert_values(out.features.mean(), golden["eval_features_mean"])
        assert_values(out.aux, golden["eval_aux"])
        assert_values(out.main, golden["eval_main"])

        out = network.train()(golden["input"])
        assert_values(out.features[:, :8], golden["train_features_first8"])
        assert_values(out.aux, golden["train_aux"])
        assert_values(out.main, golden["train_main"])
        assert_values(network.bn1.running_mean, golden["train_bn1_running_mean"])
        assert_values(network.bn1.running_var, golden["train_bn1_running_var"])


def test_discriminators(golden: dict[str, Tensor]) -> None:
    fc, patchgan = FCDiscriminator(NUM_CLASSES), PatchGANDiscriminator(NUM_CLASSES)
    fill_from_keys(fc)
    fill_from_keys(patchgan)
    with torch.no_grad():
        assert_values(fc(golden["d_input"]), golden["fc_discriminator"])
        assert_values(patchgan.train()(golden["d_input"]), golden["patchgan_train"])
        assert_values(patchgan.eval()(golden["d_input"]), golden["patchgan_eval"])
