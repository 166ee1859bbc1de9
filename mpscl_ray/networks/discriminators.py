"""Discriminators that classify the domain of an image from a map of its prediction."""

from __future__ import annotations

from torch import Tensor, nn


class FCDiscriminator(nn.Sequential):
    """Five 4x4 convolutions of stride 2: one logit per 32x32 pixels.

    The first has ``width`` channels; each of the next three doubles them.

    Source: the discriminator of AdaptSegNet, which Sec. IV-C, Liu et al. 2022 takes for MR to CT.
    """

    minimum_size = 32

    def __init__(self, num_classes: int, width: int = 64) -> None:
        def block(before: int, after: int) -> list[nn.Module]:
            return [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]

        super().__init__(
            *block(num_classes, width),
            *block(width, 2 * width),
            *block(2 * width, 4 * width),
            *block(4 * width, 8 * width),
            nn.Conv2d(8 * width, 1, 4, stride=2, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Domain logits (B, 1, H // 32, W // 32) of maps (B, C, H, W); ValueError for maps under 32x32 pixels."""
        _check_size(x, self.minimum_size, "FC")
        logits: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return logits


class PatchGANDiscriminator(nn.Module):
    """Three 4x4 convolutions of stride 2 and two of stride 1, with batch norm on the inner three.

    The first has ``width`` channels; each of the next three doubles them.

    Source: PatchGAN of pix2pix, which Sec. IV-C, Liu et al. 2022 takes for CT to MR.
    """

    minimum_size = 24

    def __init__(self, num_classes: int, width: int = 64) -> None:
        def block(before: int, after: int, stride: int) -> list[nn.Module]:
            conv = nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]

        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(num_classes, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            *block(width, 2 * width, stride=2),
            *block(2 * width, 4 * width, stride=2),
            *block(4 * width, 8 * width, stride=1),
            nn.Conv2d(8 * width, 1, 4, stride=1, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Domain logits (B, 1, H // 8 - 2, W // 8 - 2) of maps (B, C, H, W); ValueError for maps under 24x24 pixels."""
        _check_size(x, self.minimum_size, "PatchGAN")
        logits: Tensor = self.model(x)
        return logits


def _check_size(x: Tensor, minimum: int, name: str) -> None:
    height, width = x.shape[-2:]
    if min(height, width) < minimum:
        raise ValueError(
            f"the {name} discriminator needs images of at least {minimum}x{minimum} pixels, got {height}x{width}; "
            "prepare the slices at a larger size"
        )
