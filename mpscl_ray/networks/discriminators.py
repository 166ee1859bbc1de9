"""Discriminators that classify the domain of an image from a map of its prediction."""

from __future__ import annotations

from torch import Tensor, nn


class FCDiscriminator(nn.Sequential):
    """Five 4x4 convolutions of stride 2: one logit per 32x32 pixels.

    Args:
        num_classes: C, channels of the self-information map.
        width: Channels of the first convolution; doubled by each of the next three.

    Source: the discriminator of AdaptSegNet, which section IV.B, Liu et al. 2022 takes for MR to CT.
    """

    minimum_size = 32

    def __init__(self, num_classes: int, width: int = 64) -> None:
        super().__init__(
            nn.Conv2d(num_classes, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 8 * width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(8 * width, 1, 4, stride=2, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Domain logits (B, 1, H // 32, W // 32) of self-information maps (B, C, H, W).

        Raises:
            ValueError: The maps are smaller than 32x32 pixels.
        """
        _check_size(x, self.minimum_size, "FC")
        for layer in self:
            x = layer(x)
        return x


class PatchGANDiscriminator(nn.Module):
    """Three 4x4 convolutions of stride 2 and two of stride 1, with batch norm on the inner three.

    Args:
        num_classes: C, channels of the self-information map.
        width: Channels of the first convolution; doubled by each of the next three.

    Source: PatchGAN of pix2pix, which section IV.B, Liu et al. 2022 takes for CT to MR.
    """

    minimum_size = 24

    def __init__(self, num_classes: int, width: int = 64) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(num_classes, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(4 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 8 * width, 4, stride=1, padding=1, bias=False),
            nn.BatchNorm2d(8 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(8 * width, 1, 4, stride=1, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Domain logits (B, 1, H // 8 - 2, W // 8 - 2) of self-information maps (B, C, H, W).

        Raises:
            ValueError: The maps are smaller than 24x24 pixels.
        """
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
