"""Random changes of training slices: position and size of the anatomy, and the mapping of tissue to intensity.

The result for a sample depends only on its key and the settings, bit for bit: not on the other samples of its batch,
and so not on how a batch is divided among workers. Therefore random numbers are hashes of the key, and pixels are
changed only by additions, multiplications and roundings, which give the same bits at any position in an array.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mpscl_ray.config import AugmentConfig
from mpscl_ray.data.appearance import change_appearance
from mpscl_ray.data.sampler import Keys, splitmix64

_CHANNELS = 2
"""Feature maps between the layers of a random intensity mapping."""

_AFFINE_DRAWS = 4
_MAPPING_DRAWS = 3
_WEIGHT_DRAWS = 64


def augment(image: Tensor, label: Tensor | None, keys: Keys, config: AugmentConfig) -> tuple[Tensor, Tensor | None]:
    """Change each sample of a batch at random, seeded by its key.

    Args:
        image: (B, 1, H, W) float32 intensities.
        label: (B, H, W) integers below 2^24, or None.
        keys: (B,) one 64-bit key per sample.
        config: ranges of the changes.

    Returns:
        Image and label of the same shapes and types; the input tensors themselves if nothing is to be changed.
    """
    image, label = move(image, label, keys, config)
    if config.random_conv_probability > 0:
        draws = _uniforms(keys, _AFFINE_DRAWS + _MAPPING_DRAWS + _WEIGHT_DRAWS)
        image = _map_intensities(image, draws[:, _AFFINE_DRAWS:], config)
    return change_appearance(image, label, keys, config), label


def move(image: Tensor, label: Tensor | None, keys: Keys, config: AugmentConfig) -> tuple[Tensor, Tensor | None]:
    """The part of :func:`augment` that moves pixels, for the same keys alike, and leaves their intensities."""
    if config.moves:
        grid = _sampling_grid(_uniforms(keys, _AFFINE_DRAWS), (image.shape[2], image.shape[3]), config)
        image = F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)
        if label is not None:
            sampled = F.grid_sample(
                label.unsqueeze(1).float(), grid, mode="nearest", padding_mode="border", align_corners=False
            )
            label = sampled.squeeze(1).to(label.dtype)
    return image, label


def _uniforms(keys: Keys, count: int) -> NDArray[np.float64]:
    """(B, count) numbers in [0, 1), each row a function of its key."""
    counters: Keys = np.add(keys[:, None], np.arange(count, dtype=np.uint64), dtype=np.uint64)
    return (splitmix64(counters, 0) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _sampling_grid(draws: NDArray[np.float64], size: tuple[int, int], config: AugmentConfig) -> Tensor:
    """(B, H, W, 2) positions in the input for every pixel of the output, as ``grid_sample`` expects them.

    A pixel at x from the centre of the output, in pixels, is taken from R(angle)^-1 (x - shift) / scale. Beyond the
    edge image and label both repeat their outermost pixels: they still match, and no new intensity appears.
    """
    height, width = size
    low, high = (math.log(bound) for bound in config.scale)
    coefficients = np.empty((len(draws), 2, 3), dtype=np.float32)
    for sample, (turn, zoom, down, right) in enumerate(draws):
        angle = math.radians(config.rotation_deg) * (2 * turn - 1)
        scale = math.exp(low + (high - low) * zoom)
        cosine, sine = math.cos(angle) / scale, math.sin(angle) / scale
        shift_x = config.translation * width * (2 * right - 1)
        shift_y = config.translation * height * (2 * down - 1)
        coefficients[sample, 0] = cosine, sine, -cosine * shift_x - sine * shift_y
        coefficients[sample, 1] = -sine, cosine, sine * shift_x - cosine * shift_y
        coefficients[sample, 0] *= 2 / width
        coefficients[sample, 1] *= 2 / height
    matrix = torch.from_numpy(coefficients)[:, :, :, None, None]
    x = (torch.arange(width, dtype=torch.float32) - (width - 1) / 2)[None, None, :]
    y = (torch.arange(height, dtype=torch.float32) - (height - 1) / 2)[None, :, None]
    grid = torch.empty(len(draws), height, width, 2)
    for axis in (0, 1):
        grid[..., axis] = (matrix[:, axis, 0] * x + matrix[:, axis, 2]) + matrix[:, axis, 1] * y
    return grid


def _map_intensities(image: Tensor, draws: NDArray[np.float64], config: AugmentConfig) -> Tensor:
    """Blend some images with the output of a random shallow convolution, keeping their mean and standard deviation.

    With the standardised image u and the standardised output v of the convolution, the result is the blend
    (1 - a) u + a v, standardised, times the standard deviation of the image, plus its mean. An image of one intensity
    is not changed.
    """
    chosen = np.flatnonzero(draws[:, 0] < config.random_conv_probability)
    layers = 1 + (draws[:, 1] * config.random_conv_layers).astype(np.int64)
    mapped = image.clone()
    for depth in np.unique(layers[chosen]):
        members = chosen[layers[chosen] == depth]
        original = image[members]
        standardised, mean, deviation = _standardise(original)
        weights = torch.from_numpy((2 * draws[members, _MAPPING_DRAWS:] - 1).astype(np.float32))
        convolved, _, _ = _standardise(_random_convolution(standardised, weights, int(depth)))
        blend = torch.from_numpy((config.random_conv_strength * draws[members, 2]).astype(np.float32))
        blend = blend[:, None, None, None]
        result, _, remaining = _standardise(standardised * (1 - blend) + convolved * blend)
        mapped[members] = torch.where((deviation > 0) & (remaining > 0), result * deviation + mean, original)
    return mapped


def _random_convolution(x: Tensor, weights: Tensor, depth: int) -> Tensor:
    """Put each image through its own small random network.

    The first layer is a 3 x 3 convolution, the others are 1 x 1. Between layers a triangle wave of period 4 folds the
    values into [-1, 1]. It is not monotone: tissues change their order of brightness.

    Args:
        x: (B, 1, H, W) standardised images.
        weights: (B, at least 30) numbers drawn evenly from [-1, 1).
        depth: number of layers, 1 to 3.

    Returns:
        (B, 1, H, W).
    """
    taken = 0
    for layer in range(depth):
        inputs = _neighbours(x) if layer == 0 else [x[:, channel : channel + 1] for channel in range(_CHANNELS)]
        channels = len(inputs)
        outputs = _CHANNELS if layer < depth - 1 else 1
        kernel = weights[:, taken : taken + outputs * channels].reshape(-1, outputs, channels, 1, 1)
        taken += outputs * channels
        kernel = kernel * math.sqrt(3 / channels)
        x = kernel[:, :, 0] * inputs[0]
        for channel in range(1, channels):
            x += kernel[:, :, channel] * inputs[channel]
        if layer < depth - 1:
            phase = 2 * weights[:, taken : taken + outputs].reshape(-1, outputs, 1, 1)
            taken += outputs
            quarter = (x + phase) * 0.25
            x = ((quarter - quarter.floor()) * 4 - 2).abs() - 1
    return x


def _neighbours(x: Tensor) -> list[Tensor]:
    """The nine (B, 1, H, W) images that make up each pixel's 3 x 3 neighbourhood, the edge repeated."""
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    return [padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)]


def _standardise(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract each image's mean and divide by its standard deviation; returns the result, the mean and the deviation.

    The sums are NumPy's: it adds up one image in the same order whatever the rest of the batch is.
    """
    flat = x.numpy().reshape(len(x), -1)
    centred = flat - flat.mean(axis=1, keepdims=True)
    deviation = np.sqrt((centred * centred).mean(axis=1, keepdims=True))
    # Rounding leaves a constant image with a deviation of about 1e-7 of its value, not zero.
    deviation[deviation <= 1e-6 * np.abs(flat).max(axis=1, keepdims=True)] = 0
    standardised = centred / np.where(deviation > 0, deviation, 1)
    shape = (-1, 1, 1, 1)
    return (
        torch.from_numpy(standardised).reshape(x.shape),
        torch.from_numpy(flat.mean(axis=1)).reshape(shape),
        torch.from_numpy(deviation).reshape(shape),
    )
