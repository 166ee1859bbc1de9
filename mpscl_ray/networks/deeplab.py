"""DeepLab-v2 on a residual network, with heads on the third and the fourth stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXPANSION = 4
"""Output channels of a bottleneck over its inner channels."""

ATROUS_RATES = (6, 12, 18, 24)

CAFFE_MEANS = (104.00698793, 116.66876762, 122.67891434)
"""Channel means that the ImageNet weights of the DeepLab lineage were trained with."""


class SegmenterOutput(NamedTuple):
    """Output of the segmenter, all at feature resolution (h, w)."""

    aux: Tensor | None
    """(B, C, h, w) logits of the head on the third stage, or of the first of twin heads; None without multi_level."""
    main: Tensor
    """(B, C, h, w) logits of the head on the fourth stage."""
    features: Tensor
    """(B, 32 base_channels, h, w) output of the fourth stage, after the ReLU; for prototypes and contrast."""


def network_input(image: Tensor, in_channels: int) -> Tensor:
    """Input (B, in_channels, H, W) of the segmenter from slices (B, 1, H, W) in [-1, 1].

    With 3 channels it is the released transform: (x + 1) 127.5 in three equal channels less the caffe means; with 1
    channel it is the slices as they are.
    """
    if in_channels == 1:
        return image
    grey = (image + 1.0) * 127.5
    # Plain numbers: a tensor of means would be copied to the device at every call.
    return torch.cat([grey - mean for mean in CAFFE_MEANS], dim=1)


def upsample_logits(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Upsample logits (B, C, h, w) bilinearly (align_corners) to size (H, W); always before the softmax."""
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=True)


class Bottleneck(nn.Module):
    """Residual bottleneck of the caffe kind: the stride is on the first 1x1 convolution."""

    def __init__(self, in_channels: int, channels: int, stride: int, dilation: int) -> None:
        super().__init__()
        out_channels = EXPANSION * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        activated: Tensor = self.relu(out + shortcut)
        return activated


class AtrousHead(nn.Module):
    """Sum of four parallel 3x3 convolutions with dilations 6, 12, 18 and 24."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv2d_list = nn.ModuleList(
            nn.Conv2d(in_channels, num_classes, 3, padding=rate, dilation=rate) for rate in ATROUS_RATES
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C, h, w) of features (B, d, h, w)."""
        return self._forward_on_cpu(x) if x.device.type == "cpu" else self.convolve(x)

    def convolve(self, x: Tensor) -> Tensor:
        """The same by convolutions alone, on any device."""
        first, *others = self.conv2d_list
        out: Tensor = first(x)
        for conv in others:
            out = out + conv(x)
        return out

    def _forward_on_cpu(self, x: Tensor) -> Tensor:
        """The same sum as one matrix product over the channels, with its outputs shifted and added.

        CPU kernels for dilated convolutions with few output channels are 3 to 10 times slower, forward and backward.
        For a rate as large as the map, only the centre tap lies inside it.
        """
        size = x.shape[-2:]
        rows: list[Tensor] = []
        for conv, rate in zip(self.conv2d_list, ATROUS_RATES, strict=True):
            weight = conv.get_parameter("weight")
            if rate < max(size):
                # Flipped, because fold adds tap k at -k where a convolution reads it at +k.
                rows.append(weight.flip(2, 3).permute(0, 2, 3, 1).flatten(0, 2))
            else:
                rows.append(weight[:, :, 1, 1])
        products = torch.matmul(torch.cat(rows), x.flatten(2))
        # Added one by one: gradients of stacked biases would be one memory, which in-place changes reach four times.
        first, *others = (conv.get_parameter("bias") for conv in self.conv2d_list)
        out = sum(others, first)[:, None, None]
        taps = torch.split(products, [len(row) for row in rows], dim=1)
        for values, rate in zip(taps, ATROUS_RATES, strict=True):
            if rate < max(size):
                out = out + F.fold(values, size, 3, dilation=rate, padding=rate)
            else:
                out = out + values.reshape(*values.shape[:2], *size)
        return out


class DeepLabV2(nn.Module):
    """DeepLab-v2 with multi-level heads.

    The defaults are the paper's ResNet-101; parameter names and shapes are those of the released checkpoints.

    Args:
        num_classes: C, background included.
        layers: bottlenecks in each of the four stages.
        base_channels: channels of the stem and inner channels of the first stage (64 in a ResNet); the stages put out
            4, 8, 16 and 32 times as many.
        output_stride: image pixels per feature pixel: 8, or 4 for small images, where the second stage keeps its
            resolution (its stride is dropped, the dilations stay).
        in_channels: channels of the network's input, 1 or 3, see :func:`network_input`.
        multi_level: with the auxiliary head on the third stage.
        train_bn_affine: whether scale and shift of the batch norms are trained. The running statistics are updated
            in training mode either way.
        twin_heads: both heads on the fourth stage, as CLAN has them; the prediction is then the sum of their logits.

    Raises:
        ValueError: an argument is out of range.

    Source: Sec. IV-C, Liu et al. 2022 ("DeepLabV2 ... multi-level outputs from conv4 and conv5").
    """

    def __init__(
        self,
        num_classes: int,
        layers: Sequence[int] = (3, 4, 23, 3),
        base_channels: int = 64,
        output_stride: int = 8,
        in_channels: int = 3,
        multi_level: bool = True,
        train_bn_affine: bool = False,
        twin_heads: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"a segmenter needs background and at least one structure, got num_classes={num_classes}")
        if len(layers) != 4 or min(layers) < 1:
            raise ValueError(f"layers must be four numbers of bottlenecks, each at least 1, got {tuple(layers)}")
        if base_channels < 1:
            raise ValueError(f"base_channels must be at least 1, got {base_channels}")
        if output_stride not in (4, 8):
            raise ValueError(f"output_stride must be 8 or 4, got {output_stride}")
        if in_channels not in (1, 3):
            raise ValueError(f"in_channels must be 1 or 3, got {in_channels}")
        self.num_classes, self.in_channels = num_classes, in_channels
        self.output_stride, self.twin_heads = output_stride, twin_heads
        self.feature_channels = 8 * EXPANSION * base_channels

        self.conv1 = nn.Conv2d(in_channels, base_channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(base_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        second_stride = 2 if output_stride == 8 else 1
        self.layer1 = _stage(base_channels, base_channels, layers[0], stride=1, dilation=1)
        self.layer2 = _stage(4 * base_channels, 2 * base_channels, layers[1], stride=second_stride, dilation=1)
        self.layer3 = _stage(8 * base_channels, 4 * base_channels, layers[2], stride=1, dilation=2)
        self.layer4 = _stage(16 * base_channels, 8 * base_channels, layers[3], stride=1, dilation=4)
        self.layer5 = AtrousHead((32 if twin_heads else 16) * base_channels, num_classes) if multi_level else None
        self.layer6 = AtrousHead(32 * base_channels, num_classes)

        if not train_bn_affine:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.weight.requires_grad_(False)
                    module.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> SegmenterOutput:
        """Logits and features, at feature resolution, of an input (B, in_channels, H, W) from :func:`network_input`."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        third: Tensor = self.layer3(self.layer2(self.layer1(x)))
        aux = None if self.layer5 is None or self.twin_heads else self.layer5(third)
        features: Tensor = self.layer4(third)
        if self.layer5 is not None and self.twin_heads:
            aux = self.layer5(features)
        return SegmenterOutput(aux, self.layer6(features), features)

    def feature_size(self, size: Sequence[int]) -> tuple[int, int]:
        """Height and width of the features of an image of so many pixels."""
        halved = [(pixels + 1) // 2 for pixels in size]
        # The pooling rounds up: a kernel over the edge still gives a pixel.
        pooled = [pixels // 2 + 1 for pixels in halved]
        strided = pooled if self.output_stride == 4 else [(pixels + 1) // 2 for pixels in pooled]
        return strided[0], strided[1]

    def prediction(self, output: SegmenterOutput) -> Tensor:
        """Logits (B, C, h, w) of the prediction."""
        return output.main + output.aux if self.twin_heads and output.aux is not None else output.main

    def logits(self, images: Tensor) -> Tensor:
        """Float32 logits (B, C, H, W) of slices (B, 1, H, W) in [-1, 1]."""
        output = self(network_input(images, self.in_channels))
        return upsample_logits(self.prediction(output).float(), images.shape[-2:])


def _stage(in_channels: int, channels: int, blocks: int, stride: int, dilation: int) -> nn.Sequential:
    first = Bottleneck(in_channels, channels, stride, dilation)
    return nn.Sequential(first, *(Bottleneck(EXPANSION * channels, channels, 1, dilation) for _ in range(blocks - 1)))
