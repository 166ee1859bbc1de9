"""The networks of SIFA: image translators, a shared encoder with classifiers, and their discriminators.

Convolutions before a norm have no bias, which the norm would subtract again; the released code has one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = type[nn.BatchNorm2d | nn.InstanceNorm2d]


class SIFAOutput(NamedTuple):
    """Output of SIFA's segmenter."""

    main: Tensor
    """(B, C, H, W) logits at image resolution."""
    low: Tensor | None
    """(B, C, H, W) logits from the features before the dilated blocks; None in the first version."""
    features: Tensor
    """(B, 32 width, h, w) features, the input of the decoder."""


class GlobalDropout(nn.Module):
    """Dropout of a fraction, with a mask drawn for the images of all workers, so that their number does not matter."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.part, self.parts = 0, 1
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        shape = (self.parts * len(x), *x.shape[1:])
        drawn = torch.rand(shape, generator=self.generator, device=x.device)[self.part * len(x) :][: len(x)]
        return x * (drawn >= self.rate).to(x.dtype) / (1 - self.rate)


class _Residual(nn.Module):
    """Two 3x3 convolutions added to the input, which is padded with zero channels."""

    def __init__(
        self, in_channels: int, channels: int, norm: Norm = nn.InstanceNorm2d, dilation: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.added = channels - in_channels
        self.body = nn.Sequential(
            _conv(in_channels, channels, 3, dilation=dilation, bias=False),
            norm(channels, affine=True),
            nn.ReLU(inplace=True),
            GlobalDropout(dropout),
            _conv(channels, channels, 3, dilation=dilation, bias=False),
            norm(channels, affine=True),
            GlobalDropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2)) if self.added else x
        activated: Tensor = F.relu(shortcut + self.body(x))
        return activated


class Translator(nn.Module):
    """From an image of one domain to one of the other: tanh(x + f(x)).

    ``width`` is the channels of the first convolution; ``blocks`` are residual, at a quarter of the resolution.

    Source: generator of Chen et al. 2020, the residual network of CycleGAN with instance norms.
    """

    def __init__(self, width: int = 32, blocks: int = 9) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_block(1, width, 7, padding_mode="reflect"),
            *_block(width, 2 * width, 3, stride=2),
            *_block(2 * width, 4 * width, 3, stride=2),
            *(_Residual(4 * width, 4 * width) for _ in range(blocks)),
            *_double(4 * width, 2 * width),
            *_double(2 * width, width),
            _conv(width, 1, 7),
        )

    def forward(self, image: Tensor) -> Tensor:
        """An image (B, 1, H, W) for an image (B, 1, H, W)."""
        return _changed(image, self.body(image))


class SIFASegmenter(nn.Module):
    """The encoder that segmentation and translation share, with its classifiers.

    Args:
        num_classes: C, background included.
        width: channels of the first convolution; the features have 32 times as many.
        output_stride: image pixels per feature pixel: 8, or 4 for small images, where the third pooling is left out.
        low_level: with a second classifier on the features before the dilated blocks (second version).
        dropout: fraction of the encoder's activations that is dropped in training (first version).

    Source: encoder and pixel-wise classifier of Chen et al. 2020.
    Differs from the released code: one input channel, where the first version repeats the slice three times.
    """

    def __init__(
        self, num_classes: int, width: int = 16, output_stride: int = 8, low_level: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if output_stride not in (4, 8):
            raise ValueError(f"output_stride must be 8 or 4, got {output_stride}")
        self.num_classes = num_classes
        self.feature_channels = 32 * width
        norm = nn.BatchNorm2d

        def residual(before: int, after: int, dilation: int = 1) -> _Residual:
            return _Residual(before * width, after * width, norm, dilation, dropout)

        def pool() -> nn.Module:
            return nn.MaxPool2d(2, ceil_mode=True)

        self.shallow = nn.Sequential(
            *_block(1, width, 7, norm),
            *(residual(1, 1), pool(), residual(1, 2), pool(), residual(2, 4), residual(4, 4)),
            *([pool()] if output_stride == 8 else []),
            *(residual(4, 8), residual(8, 8), residual(8, 16), residual(16, 16), residual(16, 16), residual(16, 16)),
            *(residual(16, 32), residual(32, 32)),
        )
        self.deep = nn.Sequential(
            *(residual(32, 32, dilation=2), residual(32, 32, dilation=2)),
            *_block(32 * width, 32 * width, 3, norm),
            *_block(32 * width, 32 * width, 3, norm),
            GlobalDropout(dropout),
        )
        self.classifier = _conv(32 * width, num_classes, 1)
        self.classifier_low = _conv(32 * width, num_classes, 1) if low_level else None

    def forward(self, image: Tensor) -> SIFAOutput:
        """Segment images (B, 1, H, W)."""
        shallow = self.shallow(image)
        features = self.deep(shallow)
        low = None if self.classifier_low is None else _resize(self.classifier_low(shallow), image.shape[-2:])
        return SIFAOutput(_resize(self.classifier(features), image.shape[-2:]), low, features)

    def logits(self, images: Tensor) -> Tensor:
        """Float32 logits (B, C, H, W) of slices (B, 1, H, W) in [-1, 1]."""
        main: Tensor = self(images).main
        return main.float()


class Decoder(nn.Module):
    """From the encoder's features of a target-like image to one like the source: tanh(x + f(features)).

    ``width`` is the channels of the last convolution but one, ``output_stride`` that of the encoder.
    """

    def __init__(self, in_channels: int, width: int = 32, output_stride: int = 8, blocks: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_block(in_channels, 4 * width, 3),
            *(_Residual(4 * width, 4 * width) for _ in range(blocks)),
            *_double(4 * width, 2 * width),
            *(_double(2 * width, 2 * width) if output_stride == 8 else []),
            *_double(2 * width, width),
            _conv(width, 1, 7),
        )

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        """An image (B, 1, H, W) from features (B, d, h, w) of the image (B, 1, H, W)."""
        return _changed(image, self.body(features))


class SIFADiscriminator(nn.Sequential):
    """PatchGAN with instance norms and no sigmoid: three 4x4 convolutions of stride 2 and two of stride 1.

    It takes images (1 channel) or logits (C channels). That of the source has two outputs: the second is for its
    auxiliary task, to separate reconstructed images from real ones.
    """

    def __init__(self, in_channels: int, width: int = 64, outputs: int = 1) -> None:

        def block(before: int, after: int, stride: int) -> list[nn.Module]:
            conv = nn.Conv2d(before, after, 4, stride=stride, padding=2, bias=False)
            return [conv, nn.InstanceNorm2d(after, affine=True), nn.LeakyReLU(0.2)]

        super().__init__(
            nn.Conv2d(in_channels, width, 4, stride=2, padding=2),
            nn.LeakyReLU(0.2),
            *block(width, 2 * width, 2),
            *block(2 * width, 4 * width, 2),
            *block(4 * width, 8 * width, 1),
            nn.Conv2d(8 * width, outputs, 4, padding=2),
        )


@torch.no_grad()
def initialise_sifa(module: nn.Module, seed: int) -> None:
    """Convolutions N(0, 0.02), or N(0, sqrt(2 / fan in)) before a batch norm; biases 0; norms 1 and 0.

    Differs from the released code, which has N(0, 0.02) throughout: batch norms undo the scale, and with theirs the
    activations do not vanish with depth.
    """
    generator = torch.Generator().manual_seed(seed)
    encoder = isinstance(module, SIFASegmenter)
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            before_norm = encoder and "classifier" not in name
            std = math.sqrt(2 / layer.weight[0].numel()) if before_norm else 0.02
            layer.weight.copy_(torch.normal(0.0, std, tuple(layer.weight.shape), generator=generator))
            if layer.bias is not None:
                layer.bias.zero_()
        elif isinstance(layer, nn.BatchNorm2d | nn.InstanceNorm2d):
            assert layer.weight is not None
            layer.weight.fill_(1.0)
            layer.bias.zero_()
            if isinstance(layer, nn.BatchNorm2d):
                layer.reset_running_stats()


def _conv(before: int, after: int, kernel: int, **arguments: int | str) -> nn.Conv2d:
    dilation = int(arguments.get("dilation", 1))
    return nn.Conv2d(before, after, kernel, padding=dilation * (kernel // 2), **arguments)  # type: ignore[arg-type]


def _block(
    before: int, after: int, kernel: int, norm: Norm = nn.InstanceNorm2d, **arguments: int | str
) -> list[nn.Module]:
    return [_conv(before, after, kernel, bias=False, **arguments), norm(after, affine=True), nn.ReLU(inplace=True)]


def _double(before: int, after: int) -> list[nn.Module]:
    """Twice the resolution."""
    conv = nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=1, bias=False)
    return [conv, nn.InstanceNorm2d(after, affine=True), nn.ReLU(inplace=True)]


def _changed(image: Tensor, change: Tensor) -> Tensor:
    """tanh(image + change), the change cropped to the size of the image."""
    return torch.tanh(image + change[..., : image.shape[2], : image.shape[3]])


def _resize(logits: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
