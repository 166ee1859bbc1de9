"""The networks of SIFA: image translators, a shared encoder with classifiers, and their discriminators.

Padding, resizing, norms, dropout and initial weights are those of the released code, tested against its numbers. Of its
biases only that of the translator's last convolution counts. Those of dilated convolutions are not added there; the
others stand right before a norm, which subtracts them: their gradients are rounding errors, which Adam would scale to
whole steps, different ones for each number of workers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpscl_ray.distributed.micro_batches import ImageRandom

Norm = Callable[[int], nn.Module]
InstanceNorm: Norm = functools.partial(nn.InstanceNorm2d, eps=1e-6, affine=True)
BatchNorm: Norm = functools.partial(nn.BatchNorm2d, eps=1e-3)


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
        self.random: ImageRandom | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        drawn = torch.rand(x.shape, device=x.device) if self.random is None else self.random.uniform(x)
        return x * (drawn >= self.rate).to(x.dtype) / (1 - self.rate)


class _SameConv2d(nn.Conv2d):
    """3x3 with stride 2 as TensorFlow pads it ("SAME"): an even size with one row behind and none before."""

    def forward(self, x: Tensor) -> Tensor:
        before_height, before_width = (size % 2 for size in x.shape[-2:])
        return super().forward(F.pad(x, (before_width, 1, before_height, 1)))


class _SameTranspose2d(nn.ConvTranspose2d):
    """3x3 to twice the size, as TensorFlow crops it ("SAME"): the last row and column of 2n + 1."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(x, output_size)[..., :-1, :-1]


class _Residual(nn.Module):
    """Two 3x3 convolutions added to the input, which is padded with zero channels."""

    def __init__(
        self, in_channels: int, channels: int, norm: Norm = InstanceNorm, dilation: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.added = channels - in_channels
        self.body = nn.Sequential(
            _conv(in_channels, channels, 3, dilation=dilation, bias=False),
            GlobalDropout(dropout),
            norm(channels),
            nn.ReLU(inplace=True),
            _conv(channels, channels, 3, dilation=dilation, bias=False),
            GlobalDropout(dropout),
            norm(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2)) if self.added else x
        activated: Tensor = F.relu(shortcut + self.body(x))
        return activated


class Translator(nn.Module):
    """From an image of one domain to one of the other: tanh(x + f(x)).

    ``width`` is the channels of the first convolution; ``blocks`` are residual, at a quarter of the resolution. The
    image is repeated for each of ``in_channels``.

    Source: generator of Chen et al. 2020, the residual network of CycleGAN with instance norms.
    """

    def __init__(self, width: int = 32, blocks: int = 9, in_channels: int = 1) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.body = nn.Sequential(
            *_block(_conv(in_channels, width, 7, bias=False)),
            *_block(_SameConv2d(width, 2 * width, 3, stride=2, bias=False)),
            *_block(_SameConv2d(2 * width, 4 * width, 3, stride=2, bias=False)),
            *(_Residual(4 * width, 4 * width) for _ in range(blocks)),
            *_double(4 * width, 2 * width),
            *_double(2 * width, width),
            _conv(width, 1, 7),
        )

    def forward(self, image: Tensor) -> Tensor:
        """An image (B, 1, H, W) for an image (B, 1, H, W)."""
        return _changed(image, self.body(image.expand(-1, self.in_channels, -1, -1)))


class SIFASegmenter(nn.Module):
    """The encoder that segmentation and translation share, with its classifiers.

    Args:
        num_classes: C, background included.
        width: channels of the first convolution; the features have 32 times as many.
        output_stride: image pixels per feature pixel: 8, or 4 for small images, where the third pooling is left out.
        low_level: with a second classifier on the features before the dilated blocks (second version).
        dropout: fraction that is dropped in training of the output of each convolution, before its norm, and of the
            classifiers' logits (first version).
        in_channels: how often the slice is repeated: 3 in the first version.

    Source: encoder and pixel-wise classifier of Chen et al. 2020.
    """

    def __init__(
        self,
        num_classes: int,
        width: int = 16,
        output_stride: int = 8,
        low_level: bool = True,
        dropout: float = 0.0,
        in_channels: int = 1,
    ) -> None:
        super().__init__()
        if output_stride not in (4, 8):
            raise ValueError(f"output_stride must be 8 or 4, got {output_stride}")
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.feature_channels = 32 * width

        def residual(before: int, after: int, dilation: int = 1) -> _Residual:
            return _Residual(before * width, after * width, BatchNorm, dilation, dropout)

        def block(before: int, after: int, kernel: int) -> list[nn.Module]:
            return _block(_conv(before, after, kernel, bias=False), BatchNorm, dropout)

        def classifier() -> nn.Sequential:
            return nn.Sequential(_conv(32 * width, num_classes, 1, bias=False), GlobalDropout(dropout))

        def pool() -> nn.Module:
            return nn.MaxPool2d(2, ceil_mode=True)

        self.shallow = nn.Sequential(
            *block(in_channels, width, 7),
            *(residual(1, 1), pool(), residual(1, 2), pool(), residual(2, 4), residual(4, 4)),
            *([pool()] if output_stride == 8 else []),
            *(residual(4, 8), residual(8, 8), residual(8, 16), residual(16, 16), residual(16, 16), residual(16, 16)),
            *(residual(16, 32), residual(32, 32)),
        )
        self.deep = nn.Sequential(
            *(residual(32, 32, dilation=2), residual(32, 32, dilation=2)),
            *block(32 * width, 32 * width, 3),
            *block(32 * width, 32 * width, 3),
        )
        self.classifier = classifier()
        self.classifier_low = classifier() if low_level else None

    def forward(self, image: Tensor) -> SIFAOutput:
        """Segment images (B, 1, H, W)."""
        shallow = self.shallow(image.expand(-1, self.in_channels, -1, -1))
        features = self.deep(shallow)
        low = None if self.classifier_low is None else _resize(self.classifier_low(shallow), image.shape[-2:])
        return SIFAOutput(_resize(self.classifier(features), image.shape[-2:]), low, features)

    def logits(self, images: Tensor) -> Tensor:
        """Float32 logits (B, C, H, W) of slices (B, 1, H, W) in [-1, 1]."""
        main: Tensor = self(images).main
        return main.float()


class Decoder(nn.Module):
    """From the encoder's features of a target-like image to one like the source: tanh(x + f(features)).

    ``width`` is the channels of the last convolution but one, ``output_stride`` that of the encoder. ``dropout`` is the
    fraction dropped in training of the output of each convolution of the residual ``blocks``.

    Source: decoder of Chen et al. 2020. Their text has no dropout in it; the released code of both versions has.
    """

    def __init__(
        self, in_channels: int, width: int = 32, output_stride: int = 8, blocks: int = 4, dropout: float = 0.25
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_block(_conv(in_channels, 4 * width, 3, bias=False)),
            *(_Residual(4 * width, 4 * width, dropout=dropout) for _ in range(blocks)),
            *_double(4 * width, 2 * width),
            *(_double(2 * width, 2 * width) if output_stride == 8 else []),
            *_double(2 * width, width),
            _conv(width, 1, 7, bias=False),
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
            return [conv, InstanceNorm(after), nn.LeakyReLU(0.2)]

        super().__init__(
            nn.Conv2d(in_channels, width, 4, stride=2, padding=2, bias=False),
            nn.LeakyReLU(0.2),
            *block(width, 2 * width, 2),
            *block(2 * width, 4 * width, 2),
            *block(4 * width, 8 * width, 1),
            nn.Conv2d(8 * width, outputs, 4, padding=2, bias=False),
        )


@torch.no_grad()
def initialise_sifa(module: nn.Module, seed: int) -> None:
    """Convolutions normal, cut at two standard deviations; biases 0; norms 1 and 0.

    The standard deviation is 0.01 in the encoder, the classifiers and the decoder's residual blocks, elsewhere 0.02.

    Source: the released code of Chen et al. 2020.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            # In the decoder, ".body." is in the names of a residual block's layers alone.
            small = isinstance(module, SIFASegmenter) or (isinstance(module, Decoder) and ".body." in name)
            std = 0.01 if small else 0.02
            drawn = torch.empty(layer.weight.shape)
            layer.weight.copy_(nn.init.trunc_normal_(drawn, std=std, a=-2 * std, b=2 * std, generator=generator))
            if layer.bias is not None:
                layer.bias.zero_()
        elif isinstance(layer, nn.BatchNorm2d | nn.InstanceNorm2d):
            assert layer.weight is not None
            layer.weight.fill_(1.0)
            layer.bias.zero_()
            if isinstance(layer, nn.BatchNorm2d):
                layer.reset_running_stats()


def _conv(before: int, after: int, kernel: int, dilation: int = 1, bias: bool = True) -> nn.Conv2d:
    """Of stride 1, with zeros around the image, so that it keeps its size."""
    return nn.Conv2d(before, after, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=bias)


def _block(
    convolution: nn.Conv2d | nn.ConvTranspose2d, norm: Norm = InstanceNorm, dropout: float = 0.0
) -> list[nn.Module]:
    return [convolution, GlobalDropout(dropout), norm(convolution.out_channels), nn.ReLU(inplace=True)]


def _double(before: int, after: int) -> list[nn.Module]:
    """Twice the resolution."""
    return _block(_SameTranspose2d(before, after, 3, stride=2, bias=False))


def _changed(image: Tensor, change: Tensor) -> Tensor:
    """tanh(image + change), the change cropped to the size of the image."""
    return torch.tanh(image + change[..., : image.shape[2], : image.shape[3]])


def _resize(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear as in TensorFlow 1: row i of H takes row i h/H of the h that there are, without half-pixel centres."""
    height, width = size
    padded = F.pad(logits, (0, 1, 0, 1), mode="replicate")
    resized = F.interpolate(padded, size=(height + 1, width + 1), mode="bilinear", align_corners=True)
    return resized[..., :height, :width]
