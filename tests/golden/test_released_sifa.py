"""SIFA's networks, gradients and three training iterations against those of the released code, both versions.

``sifa_v1.npz`` and ``sifa_v2.npz`` are numbers of https://github.com/cchen-cc/SIFA, be5b792 (v2) and cd8a232 (v1). Its
own ``model.py``, ``losses.py`` and ``SIFA.train`` of ``main.py`` ran on a CPU with TensorFlow 2.15
(``tensorflow.compat.v1``) and tf_slim 1.1, which has ``tf.contrib.layers``, with these changes:

- Python 2's ``print`` and ``xrange``; the sizes, as in ``settings``;
- double precision, for which ``batch_norm`` is not fused, and ``resize_images`` is applied as its own matrix;
- ``tf.nn.dropout`` takes its random numbers from :func:`uniform`;
- the reader of files gives the images stored here; an epoch is one iteration, so that v1 reaches the decay of its rate.

Weights follow from the names of variables, see :func:`value`. The pool has one batch and may swap twice.

A tensor is compared by two numbers, its absolute sum and its product with fixed random numbers, or whole.
"""

from __future__ import annotations

import copy
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpscl_ray.config import OptimConfig, PrecisionConfig, SIFAConfig
from mpscl_ray.methods import SIFA, Batch
from mpscl_ray.networks import build
from mpscl_ray.networks.sifa import GlobalDropout

Golden = dict[str, NDArray[Any]]

SCOPES = {
    "segmenter": ("e_B", "s_B", "s_B_ll"),
    "generator": ("g_A",),
    "decoder": ("de_B",),
    "discriminator_source": ("d_A",),
    "discriminator_target": ("d_B",),
    "discriminator_prediction": ("d_P",),
    "discriminator_low": ("d_P_ll",),
}
LOSSES = {
    "g_A_loss": ("loss_cycle", "loss_adversarial_target"),
    "d_B_loss": ("loss_discriminator_target",),
    "ce_B_loss": ("loss_cross_entropy_main",),
    "dice_B_loss": ("loss_dice_main",),
    "g_B_loss": ("loss_translation_to_source",),
    "d_A_loss": ("loss_discriminator_source",),
    "d_P_loss": ("loss_discriminator_prediction",),
    "d_P_loss_ll": ("loss_discriminator_low",),
}


def value(name: str, shape: list[int]) -> Tensor:
    """Values of a variable of the release, as torch orders them."""
    x = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("weights"):
        x = x * np.sqrt(2 / np.prod(shape[:3]))
    elif name.endswith("gamma"):
        x = 1 + 0.1 * x
    elif name.endswith("moving_variance"):
        x = 1 + 0.1 * np.abs(x)
    else:
        x = (0.1 if name.endswith("moving_mean") else 0.05) * x
    x = x.astype(np.float32)
    return torch.from_numpy(x.transpose(3, 2, 0, 1) if x.ndim == 4 else x)


def uniform(shape: tuple[int, ...]) -> Tensor:
    """The random numbers of dropout for activations (B, C, H, W)."""
    seed = zlib.crc32(repr((shape[0], shape[2], shape[3], shape[1])).encode())
    x = np.random.RandomState(seed).uniform(size=(shape[0], shape[2], shape[3], shape[1])).astype(np.float32)
    return torch.from_numpy(x.transpose(0, 3, 1, 2))


def project(x: Tensor) -> NDArray[np.float64]:
    flat = x.detach().double().numpy().ravel()
    return np.array([np.abs(flat).sum(), flat @ np.random.RandomState(flat.size).standard_normal(flat.size)])


def counterparts(golden: Golden, method: SIFA, network: str) -> list[tuple[int, str, nn.Parameter]]:
    """Number and name of the released variable, and the parameter here, in order."""
    ours: list[nn.Parameter] = []
    for layer in method.networks[network].modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            ours += [p for p in (layer.weight, layer.bias) if isinstance(p, nn.Parameter)]
        elif isinstance(layer, nn.BatchNorm2d | nn.InstanceNorm2d):
            ours += [p for p in (layer.bias, layer.weight) if isinstance(p, nn.Parameter)]
    released = [
        (number, name)
        for scope in SCOPES[network]
        for number, name in enumerate(golden["names"].tolist())
        if name.startswith(f"Model/{scope}/") and not (name.endswith("/biases") and "g_A/c6/" not in name)
    ]
    return [(number, name, p) for (number, name), p in zip(released, ours, strict=True)]


@pytest.fixture(scope="module", params=["v1", "v2"])
def golden(request: pytest.FixtureRequest) -> Golden:
    with np.load(Path(__file__).with_name(f"sifa_{request.param}.npz"), allow_pickle=False) as arrays:
        return {"version": np.array(request.param), **arrays}


@pytest.fixture
def method(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> SIFA:
    """The method as it was released, small and with the stored weights."""

    def dropout(layer: GlobalDropout, x: Tensor) -> Tensor:
        if not layer.training or layer.rate == 0:
            return x
        return x / (1 - layer.rate) * (uniform(tuple(x.shape)) >= layer.rate)

    monkeypatch.setattr(GlobalDropout, "forward", dropout)
    settings = json.loads(str(golden["settings"]))
    first: dict[str, Any] = {
        "version": "v1",
        "dropout": 1 - settings["keep_rate_value"],
        "lr_segmenter": 1e-3,
        "segmenter_decay_every": 2,
        "adversarial_prediction_ramp": (0.5, 1.0),
    }
    sizes = {name: settings[name] for name in ("generator_width", "encoder_width", "discriminator_width")}
    config = SIFAConfig(**sizes, **(first if golden["version"] == "v1" else {}))
    network = build({"num_classes": 5, **config.network_arguments()})
    method = SIFA(network.double(), config, OptimConfig(), 5, torch.device("cpu"), PrecisionConfig(), 0)
    with torch.no_grad():
        for name in method.networks:
            for number, released, parameter in counterparts(golden, method, name):
                parameter.copy_(value(released, json.loads(golden["shapes"][number])))
        norms = [name for name in golden["names"].tolist() if re.search("/e_B/.*gamma", name)]
        for layer, gamma in zip(method.norms, norms, strict=True):
            for buffer, kind in ((layer.running_mean, "moving_mean"), (layer.running_var, "moving_variance")):
                assert buffer is not None
                buffer.copy_(value(gamma.replace("gamma", kind), list(buffer.shape)))
    return method


def images(golden: Golden, domain: str, iteration: int) -> Tensor:
    return torch.from_numpy(golden[domain][iteration] / 127.5 - 1)[:, None]


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_networks(golden: Golden, method: SIFA, mode: str) -> None:
    for name, network in method.networks.items():
        network.train(name == "decoder" or mode == "train")
    a, b = images(golden, "source", 0), images(golden, "target", 0)
    with torch.no_grad():
        fake_b, on_real = method.translate(a), method.segment(b)
        d_source = method.call("discriminator_source", a)
        ours = {
            "fake_b": fake_b,
            "logits": on_real.main,
            "fake_a": method.decode(on_real.features, b),
            "cycle_a": method.decode(method.segment(fake_b).features, fake_b),
            "d_source": d_source[:, :1],
            "d_source_aux": d_source[:, 1:],
            "d_target": method.call("discriminator_target", b),
            "d_prediction": method.call("discriminator_prediction", on_real.main),
        }
        if on_real.low is not None:
            ours |= {"logits_low": on_real.low, "d_low": method.call("discriminator_low", on_real.low)}
    assert ours.keys() == {name.removeprefix(f"{mode}/") for name in golden if name.startswith(f"{mode}/")}
    for name, output in ours.items():
        expected = golden[f"{mode}/{name}"]
        scale = float(np.abs(expected).max())
        np.testing.assert_allclose(output, expected, rtol=0, atol=1e-6 * scale, err_msg=name)


def test_three_iterations(golden: Golden, method: SIFA) -> None:
    """Adam's first steps take the sign of gradients that nearly vanish, so rounding grows from step to step."""
    method.start_phase(1000)
    start = {name: copy.deepcopy(network) for name, network in method.networks.items()}
    for iteration, relative in enumerate((1e-6, 1e-4, 1e-2)):
        labels = torch.from_numpy(golden["labels"][iteration].astype(np.int64))
        part = Batch(images(golden, "source", iteration), labels, images(golden, "target", iteration))
        metrics = method.step(part, iteration)
        for released, names in LOSSES.items():
            if f"loss/{released}" in golden:
                ours = sum(float(metrics[name]) for name in names)
                assert ours == pytest.approx(golden[f"loss/{released}"][iteration], rel=relative), (released, iteration)
        for network in method.networks if iteration < 2 else ():
            before = {
                id(p): old
                for p, old in zip(method.networks[network].parameters(), start[network].parameters(), strict=True)
            }
            for number, name, p in counterparts(golden, method, network):
                if iteration == 0:
                    assert p.grad is not None
                    compare(golden, "gradient", number, name, p.grad, 1e-5)
                else:
                    compare(golden, "move", number, name, p - before[id(p)], 1e-2)


def compare(golden: Golden, kind: str, number: int, name: str, ours: Tensor, relative: float) -> None:
    """By two numbers, and whole where it is stored."""
    numbers = golden[f"{kind}s"][number]
    np.testing.assert_allclose(project(ours), numbers, rtol=0, atol=relative * numbers[0], err_msg=f"{kind} {name}")
    if (whole := golden.get(f"{kind}/{name}")) is not None:
        difference = np.abs(ours.detach().numpy() - whole).sum()
        assert difference < relative * numbers[0], f"{kind} {name}: {difference / numbers[0]:.1e}"
