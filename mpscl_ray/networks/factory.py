"""The segmenter that a run describes, and how networks are initialised."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mpscl_ray.networks.deeplab import DeepLabV2
from mpscl_ray.networks.discriminators import FCDiscriminator, PatchGANDiscriminator
from mpscl_ray.networks.sifa import SIFASegmenter, initialise_sifa

Segmenter = DeepLabV2 | SIFASegmenter
"""Networks that predict: both have ``num_classes`` and ``logits``."""


def build(description: Mapping[str, Any]) -> Segmenter:
    """The segmenter of a description: ``kind`` (default: deeplab) and the arguments of its class.

    Raises:
        TypeError: an argument that the class does not have.
        ValueError: an unknown kind, or an argument out of range.
    """
    arguments = dict(description)
    kind = arguments.pop("kind", "deeplab")
    kinds: dict[str, type[Segmenter]] = {"deeplab": DeepLabV2, "sifa": SIFASegmenter}
    if kind not in kinds:
        raise ValueError(f"no network is of the kind {kind!r}, only {', '.join(kinds)}")
    return kinds[kind](**arguments)


@torch.no_grad()
def initialise(module: Segmenter | FCDiscriminator | PatchGANDiscriminator, seed: int) -> None:
    """Set every parameter and running statistic to the initial value that the released code gives it.

    - SIFA's segmenter: see :func:`initialise_sifa`;
    - DeepLab: convolution weights N(0, 0.01), batch norms 1 and 0, biases of the heads uniform as torch has them;
    - FC discriminator: uniform within 1/sqrt(fan in), as torch has it;
    - PatchGAN: convolution weights N(0, 0.02), biases 0; batch norms N(1, 0.02) and 0.

    The values depend on the seed and the architecture alone: not on the global random state, device or dtype.

    Raises:
        TypeError: the module is none of these networks, or it is wrapped.
    """
    if isinstance(module, SIFASegmenter):
        initialise_sifa(module, seed)
        return
    if not isinstance(module, DeepLabV2 | FCDiscriminator | PatchGANDiscriminator):
        raise TypeError(f"no initialisation is known for {type(module).__name__}")
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: Tensor, mean: float, std: float) -> None:
        parameter.copy_(torch.normal(mean, std, tuple(parameter.shape), generator=generator))

    def uniform(parameter: Tensor, bound: float) -> None:
        parameter.copy_(torch.empty(parameter.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))

    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            bound = 1.0 / math.sqrt(layer.weight[0].numel())
            if isinstance(module, FCDiscriminator):
                uniform(layer.weight, bound)
            else:
                normal(layer.weight, 0.0, 0.01 if isinstance(module, DeepLabV2) else 0.02)
            if layer.bias is not None:
                if isinstance(module, PatchGANDiscriminator):
                    layer.bias.zero_()
                else:
                    uniform(layer.bias, bound)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.bias.zero_()
            if isinstance(module, PatchGANDiscriminator):
                normal(layer.weight, 1.0, 0.02)
            else:
                layer.weight.fill_(1.0)
