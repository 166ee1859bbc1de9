"""What scanners do to a slice: contrast, uneven coils, coarse resolution, noise; and the image operations they need.

Every function takes and returns one slice (H, W) float32 and is a function of it and of the draws of the generator, bit
for bit: only NumPy's elementwise operations and sums are used, which no number of threads changes.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]
"""(H, W) intensities of one slice."""

LOG_GAMMA = (-0.7, 0.7)
"""Logarithm of the exponent: 0.5 to 2. nnU-Net (Isensee et al. 2021) draws 0.7 to 1.5."""
BIAS_FIELD = (0.15, 0.7)
"""Largest logarithm of the field, which multiplies the slice by exp(+-this): up to twice or half."""
_FIELD_WAVES = 3
"""Cosines per side of which the field is made: constant, half a period, a whole one."""
DOWNSAMPLING = (1.2, 2.2)
"""Factor between the pixels of a coarse slice and ours; nnU-Net draws 1 to 2."""
BLUR = (0.4, 1.2)
"""Standard deviation in pixels; nnU-Net draws 0.5 to 1."""
NOISE = (0.02, 0.1)
"""Standard deviation as a fraction of the slice's range."""
_SAMPLED_PIXELS = 1024
_LARGEST_MAGNITUDE = 1.3
"""Brighter pixels are cut to this, the 99 % quantile being 1."""


def degrade(image: Image, rng: np.random.Generator, probability: float) -> Image:
    """Apply gamma, bias field, low resolution or blur, and noise, each with a probability.

    They act on magnitudes: the range between the 1 % and the 99 % quantile is mapped to [0, 1] first. Mean and
    standard deviation are restored at the end. The input itself is returned if nothing is drawn or it is constant.
    """
    chosen = rng.random(4) < probability
    if not chosen.any():
        return image
    sample = sampled_pixels(image.ravel(), _SAMPLED_PIXELS, rng)
    low, high = float(sample[len(sample) // 100]), float(sample[-1 - len(sample) // 100])
    if high <= low:
        return image
    magnitude = np.clip((image - low) * (1 / (high - low)), 0, _LARGEST_MAGNITUDE)
    for on, change in zip(chosen, (_gamma, _bias_field, _low_resolution, _noise), strict=True):
        if on:
            magnitude = change(magnitude, rng)
    return with_moments_of(image, magnitude)


def sampled_pixels(values: Image, count: int, rng: np.random.Generator) -> Image:
    """(count,) values drawn from (n,) values, in ascending order."""
    return np.sort(values[rng.integers(len(values), size=count)])


def with_moments_of(original: Image, changed: Image) -> Image:
    """The changed slice with the mean and standard deviation of the original; the original if either is constant."""
    deviation, found = (float(image.std(dtype=np.float64)) for image in (original, changed))
    if min(deviation, found) <= 1e-6:
        return original
    scale = deviation / found
    shift = float(original.mean(dtype=np.float64)) - scale * float(changed.mean(dtype=np.float64))
    return changed * scale + shift


def blur(image: Image, sigma: float) -> Image:
    """Convolve with a Gaussian of a standard deviation in pixels, the edge repeated."""
    reach = math.ceil(3 * sigma)
    taps = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    taps /= taps.sum()
    for axis in (0, 1):
        padded = np.pad(image, [(reach, reach) if side == axis else (0, 0) for side in (0, 1)], mode="edge")
        image = np.zeros_like(image)
        for shift, tap in enumerate(taps.tolist()):
            stop = shift + image.shape[axis]
            image += tap * (padded[shift:stop] if axis == 0 else padded[:, shift:stop])
    return image


def _gamma(magnitude: Image, rng: np.random.Generator) -> Image:
    mapped: Image = np.power(np.maximum(magnitude, 1e-4), math.exp(rng.uniform(*LOG_GAMMA)))
    return mapped


def _bias_field(magnitude: Image, rng: np.random.Generator) -> Image:
    """Multiply by exp(s f), f being a random sum of slow cosines with the largest magnitude 1."""
    rows, columns = (
        np.cos(np.pi * np.arange(_FIELD_WAVES) * ((np.arange(side) + 0.5) / side)[:, None]).astype(np.float32)
        for side in magnitude.shape
    )
    waves = rng.standard_normal((_FIELD_WAVES, _FIELD_WAVES)).astype(np.float32)
    field = np.einsum("hi,iw->hw", rows, np.einsum("ij,wj->iw", waves, columns))
    strength = rng.uniform(*BIAS_FIELD) / float(np.abs(field).max())
    uneven: Image = magnitude * np.exp(field * strength)
    return uneven


def _low_resolution(magnitude: Image, rng: np.random.Generator) -> Image:
    """Either sample coarsely and interpolate back, or blur."""
    if rng.random() < 0.5:
        return blur(magnitude, rng.uniform(*BLUR))
    factor = rng.uniform(*DOWNSAMPLING)
    # The blur of a coarse pixel against a fine one, so that sampling does not alias.
    coarse = blur(magnitude, 0.5 * math.sqrt(factor**2 - 1))
    for axis, side in enumerate(magnitude.shape):
        fewer = max(2, int(side / factor))
        coarse = _interpolate(_interpolate(coarse, fewer, axis), side, axis)
    return coarse


def _interpolate(image: Image, count: int, axis: int) -> Image:
    """Linear interpolation at so many evenly spaced positions along an axis, its ends included."""
    positions = np.linspace(0, image.shape[axis] - 1, count)
    lower = np.minimum(positions.astype(np.int64), image.shape[axis] - 2)
    weight = (positions - lower).astype(np.float32)
    weight = weight[:, None] if axis == 0 else weight
    between: Image = image.take(lower, axis) * (1 - weight) + image.take(lower + 1, axis) * weight
    return between


def _noise(magnitude: Image, rng: np.random.Generator) -> Image:
    """Gaussian noise, or the Rician noise of magnitude images: Gaussian in the real and in the imaginary part."""
    scale = rng.uniform(*NOISE)
    noisy: Image = magnitude + scale * rng.standard_normal(magnitude.shape, dtype=np.float32)
    if rng.random() < 0.5:
        noisy = np.hypot(noisy, scale * rng.standard_normal(magnitude.shape, dtype=np.float32))
    return noisy
