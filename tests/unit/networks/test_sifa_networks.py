"""SIFA's networks where the small networks of the golden numbers do not reach: initial weights, sizes, dropout."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

from mpscl_ray.networks.sifa import (
    Decoder,
    GlobalDropout,
    SIFADiscriminator,
    SIFASegmenter,
    Translator,
    initialise_sifa,
)


@pytest.mark.parametrize(
    ("network", "small"),
    [
        (SIFASegmenter(5, 2, dropout=0.25, in_channels=3), r"."),
        (Decoder(64, 8, blocks=2), r"\.body\."),
        (Translator(8, 2), r"$^"),
        (SIFADiscriminator(1, 8), r"$^"),
    ],
    ids=["segmenter", "decoder", "translator", "discriminator"],
)
def test_initial_weights_are_normal_and_cut_at_two_standard_deviations(network: nn.Module, small: str) -> None:
    initialise_sifa(network, seed=1)
    checked = 0
    for name, parameter in network.named_parameters():
        values = parameter.detach()
        if values.ndim == 4:
            std = 0.01 if re.search(small, name) else 0.02
            assert float(values.abs().max()) <= 2 * std, name
            if values.numel() > 500:
                # What is left of a normal distribution between -2 and 2 has a standard deviation of 0.8796.
                assert float(values.std()) == pytest.approx(0.8796 * std, rel=0.1), name
                checked += 1
        elif name.endswith("weight"):
            assert (values == 1).all(), name
        else:
            assert not values.any(), name
    assert checked >= 2
    again = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    initialise_sifa(network, seed=1)
    assert all(torch.equal(parameter, again[name]) for name, parameter in network.named_parameters())
    initialise_sifa(network, seed=2)
    assert not all(torch.equal(parameter, again[name]) for name, parameter in network.named_parameters())


@pytest.mark.parametrize(("size", "pixels"), [(32, 4), (37, 5), (50, 7)])
def test_logits_are_resized_without_half_pixel_centres(size: int, pixels: int) -> None:
    segmenter = SIFASegmenter(2, 1, low_level=False).eval()
    before: list[torch.Tensor] = []
    segmenter.classifier.register_forward_hook(lambda *arguments: before.append(arguments[2]))
    torch.manual_seed(0)
    for layer in segmenter.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    with torch.no_grad():
        logits = segmenter(torch.randn(1, 1, size, size)).main[0, 1].numpy()
    coarse = before[0][0, 1].numpy()
    assert coarse.shape == (pixels, pixels)
    expected = np.zeros((size, size))
    for row, column in np.ndindex(size, size):
        y, x = row * pixels / size, column * pixels / size
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            part = (y % 1 if i else 1 - y % 1) * (x % 1 if j else 1 - x % 1)
            expected[row, column] += part * coarse[min(int(y) + i, pixels - 1), min(int(x) + j, pixels - 1)]
    assert np.ptp(coarse) > 0.1
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(coarse).max())


def test_dropout_stands_between_each_convolution_and_its_norm() -> None:
    """In the encoder and its classifiers, and in the residual blocks of the decoder."""

    def dropped(network: nn.Module) -> list[bool]:
        layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | GlobalDropout)]
        follows = [*layers[1:], None]
        return [
            isinstance(after, GlobalDropout) and after.rate > 0
            for layer, after in zip(layers, follows, strict=True)
            if not isinstance(layer, GlobalDropout)
        ]

    assert all(dropped(SIFASegmenter(2, 1, dropout=0.25)))
    assert not any(dropped(SIFASegmenter(2, 1)))
    assert dropped(Decoder(32, 1, blocks=2)) == [False, *4 * [True], *4 * [False]]
    assert not any(dropped(Decoder(32, 1, blocks=2, dropout=0.0)))


def test_only_biases_that_count_are_there() -> None:
    def biases(network: nn.Module) -> list[str]:
        layers = network.named_modules()
        return [name for name, m in layers if isinstance(m, nn.Conv2d | nn.ConvTranspose2d) and m.bias is not None]

    assert len(biases(Translator(1, 1))) == 1
    for network in (SIFASegmenter(2, 1, dropout=0.25), Decoder(32, 1), SIFADiscriminator(1, 1)):
        assert not biases(network)
