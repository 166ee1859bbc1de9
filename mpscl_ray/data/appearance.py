"""Another appearance for a training slice, the anatomy left in place: tissues get other intensities.

The result for a sample depends only on its key and the settings, bit for bit: each slice is changed by itself, with
NumPy's elementwise operations and sums, which no number of threads changes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mpscl_ray.config import AugmentConfig
from mpscl_ray.data.degradations import Image, blur, degrade, sampled_pixels, with_moments_of
from mpscl_ray.data.label_values import is_structure
from mpscl_ray.data.sampler import Keys

Label = NDArray[np.integer[Any]]
"""(H, W) class indices of one slice, or ``NOT_ANNOTATED``."""

CURVE_KNOTS = (3, 6)
"""Fewest and most knots of a curve, evenly spaced on [-1, 1]."""
LEVEL = (-1.0, 1.0)
"""Range of a curve's knots, and of the new mean of a tissue; slices are scaled to it."""
TISSUE_GAIN = (-1.5, 1.5)
"""Range of the factor of intensities within a tissue. SLAug (Su et al. 2023) draws a curve per class instead."""
SAME_TISSUE = 0.25
"""Classes whose means in the slice are closer than this change together: else edges appear within the blood."""
SEAM_BLUR = 0.6
"""Standard deviation in pixels of the blur that softens the steps where labels meet."""

BANDS = (3, 6)
"""Fewest and most intensity bands of the background."""
BAND_GAIN = (-1.0, 1.5)
"""Range of the factor of intensities within a band."""
LIKE_A_TISSUE = 0.3
"""Probability that a band gets the level of a labelled tissue, as fat or muscle may look in another sequence."""
_LEVEL_NOISE = 0.04
"""Standard deviation of the difference between such a band and the tissue."""
_BAND_BLUR = 0.7
_BAND_EDGE = 0.25
"""Width of the transition between two bands, as a fraction of the mean distance of their centres."""
_BAND_RESIDUAL = 0.3
_LEAST_DISTANCE = 0.05
_BAND_PIXELS = 768
_BAND_ITERATIONS = 4

GIN_LAYERS, GIN_CHANNELS, GIN_SLOPE = 4, 2, 0.01
"""Layers, channels between them, and slope of the leaky ReLU below zero, of Ouyang et al. 2022."""


def change_appearance(image: Tensor, label: Tensor | None, keys: Keys, config: AugmentConfig) -> Tensor:
    """Give some samples of a batch another appearance, each seeded by its key.

    With ``mapping_probability`` one of ``mappings`` is drawn; then degradations follow.

    Args:
        image: (B, 1, H, W) float32 intensities, scaled to [-1, 1].
        label: (B, H, W) class indices or ``NOT_ANNOTATED``; None for unlabelled slices, whose tissues cannot be mapped
            one by one: there ``curves`` and ``bands`` are one curve for all intensities.
        keys: (B,) one 64-bit key per sample.
        config: mappings and probabilities.

    Returns:
        (B, 1, H, W); the input tensor itself if nothing is to be changed.
    """
    if not config.changes_appearance:
        return image
    changed = image.clone()
    pixels = changed.numpy()[:, 0]
    labels: Any = [None] * len(keys) if label is None else label.numpy()
    for sample, key in enumerate(keys.tolist()):
        pixels[sample] = _changed(pixels[sample].copy(), labels[sample], key, config)
    return changed


def _changed(image: Image, label: Label | None, key: int, config: AugmentConfig) -> Image:
    # Two generators: what is drawn for the mapping does not change which degradations follow.
    rng, degradation_rng = (np.random.Generator(np.random.PCG64([key, stream])) for stream in (0, 1))
    if rng.random() < config.mapping_probability:
        name = config.mappings[rng.integers(len(config.mappings))]
        image = MAPPINGS[name](image, label, rng)
    return degrade(image, degradation_rng, config.degradation_probability)


def map_by_curves(image: Image, label: Label | None, rng: np.random.Generator) -> Image:
    """A random curve for the background, and x' = a (x - m) + b for each tissue of mean m.

    The mean and the standard deviation of the slice are kept.

    Source: class-wise augmentation of SLAug, Su et al., AAAI 2023, with lines for its Bezier curves of the classes.
    """
    mapped = _random_curve(image, rng)
    if label is not None:
        tissues = _Tissues(image, label, rng)
        mapped = blur(tissues.paint(mapped, rng), SEAM_BLUR)
    return with_moments_of(image, mapped)


def map_by_bands(image: Image, label: Label | None, rng: np.random.Generator) -> Image:
    """Split the background into intensity bands with their own levels and gains; tissues as :func:`map_by_curves`.

    Neighbouring intensities can so become very different, and a band as bright as a tissue. The mean and the standard
    deviation of the slice are kept.
    """
    if label is None:
        return map_by_curves(image, label, rng)
    tissues = _Tissues(image, label, rng)
    outside = image[~is_structure(label)]
    centres = _band_centres(outside if len(outside) else image.ravel(), rng)
    count = len(centres)
    levels, gains = rng.uniform(*LEVEL, count), rng.uniform(*BAND_GAIN, count)
    if len(tissues.levels):
        alike = rng.choice(tissues.levels, count) + rng.normal(0, _LEVEL_NOISE, count)
        levels = np.where(rng.random(count) < LIKE_A_TISSUE, alike, levels)
    mapped = _map_bands(image, *(values.astype(np.float32) for values in (centres, levels, gains)))
    return with_moments_of(image, blur(tissues.paint(mapped, rng), SEAM_BLUR))


def map_by_gin(image: Image, label: Label | None, rng: np.random.Generator) -> Image:
    """Global intensity non-linear augmentation: the blend with a random convolutional network's output.

    Four layers with kernels of side 1 or 3 and leaky ReLUs; the Frobenius norm of the slice is kept.

    Source: GIN of Ouyang et al. 2022, "Causality-inspired single-source domain generalization for medical image
    segmentation"; at the edge pixels are repeated, where the released code pads with zeros.
    """
    maps = image[None]
    for layer in range(GIN_LAYERS):
        last = layer == GIN_LAYERS - 1
        side = 1 + 2 * int(rng.integers(2))
        weights = rng.standard_normal((1 if last else GIN_CHANNELS, len(maps), side, side))
        maps = _convolve(maps, weights, rng.standard_normal(len(weights)))
        if not last:
            np.maximum(maps, maps * GIN_SLOPE, out=maps)
    blend = rng.random()
    mixed = maps[0] * blend + image * (1 - blend)
    norm, found = (float(np.square(values).sum(dtype=np.float64)) ** 0.5 for values in (image, mixed))
    return mixed * (norm / found) if found > 0 else image


MAPPINGS = {"curves": map_by_curves, "bands": map_by_bands, "gin": map_by_gin}
"""What ``data.augmentation.mappings`` names."""


def _random_curve(image: Image, rng: np.random.Generator) -> Image:
    """Map intensities by a smooth curve through random knots; those beyond [-1, 1] as its ends."""
    knots = rng.uniform(*LEVEL, rng.integers(*CURVE_KNOTS, endpoint=True)).astype(np.float32)
    position = (np.clip(image, -1, 1) + 1) * ((len(knots) - 1) / 2)
    lower = np.minimum(position.astype(np.int64), len(knots) - 2)
    weight = position - lower.astype(np.float32)
    weight = weight * weight * (3 - 2 * weight)
    curve: Image = knots[lower] * (1 - weight) + knots[lower + 1] * weight
    return curve


class _Tissues:
    """Groups of the structures of a slice that look alike, and the new mean of each."""

    def __init__(self, image: Image, label: Label, rng: np.random.Generator) -> None:
        flat = label.ravel()
        counts, sums = np.bincount(flat), np.bincount(flat, image.ravel())
        present = np.flatnonzero(counts)
        classes = present[is_structure(present)]
        means = sums[classes] / counts[classes]
        order = np.argsort(means, kind="stable")
        apart = 1 + np.flatnonzero(np.diff(means[order]) >= SAME_TISSUE)
        self._groups = np.split(classes[order], apart) if len(classes) else []
        self._means = [sums[group].sum() / counts[group].sum() for group in self._groups]
        self._image, self._label, self._numbers = image, label, len(counts)
        self.levels = rng.uniform(*LEVEL, len(self._groups))
        """New mean of each group."""

    def paint(self, background: Image, rng: np.random.Generator) -> Image:
        """The background with each group's pixels x replaced by a (x - m) + b, b being its level."""
        if not self._groups:
            return background
        gain, offset = np.zeros((2, self._numbers), np.float32)
        for group, mean, level in zip(self._groups, self._means, self.levels, strict=True):
            gain[group] = rng.uniform(*TISSUE_GAIN)
            offset[group] = level - gain[group] * mean
        painted = self._image * gain[self._label] + offset[self._label]
        return np.where(is_structure(self._label), painted, background)


def _band_centres(values: Image, rng: np.random.Generator) -> NDArray[np.float64]:
    """(K,) ascending centres of a k-means clustering of intensities (n,), from some of them; K is drawn."""
    sample = sampled_pixels(values, _BAND_PIXELS, rng).astype(np.float64)
    count = int(rng.integers(*BANDS, endpoint=True))
    centres = sample[np.sort(rng.integers(len(sample), size=count))]
    sums = np.concatenate([[0.0], np.cumsum(sample)])
    for _ in range(_BAND_ITERATIONS):
        edges = np.searchsorted(sample, (centres[1:] + centres[:-1]) / 2)
        edges = np.concatenate([[0], edges, [len(sample)]])
        members = np.diff(edges)
        centres = np.where(members > 0, np.diff(sums[edges]) / np.maximum(members, 1), centres)
    return centres


def _map_bands(image: Image, centres: Image, levels: Image, gains: Image) -> Image:
    """Each pixel x becomes level + gain (x - centre) of its band; between bands these are blended."""
    centres, levels, gains = (values[:, None, None] for values in (centres, levels, gains))
    width = _BAND_EDGE * max(float(np.diff(centres, axis=0).mean()), _LEAST_DISTANCE)
    distance = np.square((blur(image, _BAND_BLUR) - centres) * (1 / width)) * 0.5
    weights = np.exp(distance.min(axis=0) - distance)
    values = np.clip(image - centres, -_BAND_RESIDUAL, _BAND_RESIDUAL) * gains + levels
    blended: Image = (values * weights).sum(axis=0) / weights.sum(axis=0)
    return blended


def _convolve(maps: Image, weights: NDArray[np.float64], biases: NDArray[np.float64]) -> Image:
    """Convolve (C, H, W) with weights (D, C, k, k), k being odd, and add biases (D,); the edge is repeated."""
    side = weights.shape[2]
    (height, width), reach = maps.shape[1:], side // 2
    padded = np.pad(maps, ((0, 0), (reach, reach), (reach, reach)), mode="edge") if reach else maps
    result = np.empty((len(weights), height, width), np.float32)
    result[:] = biases.astype(np.float32)[:, None, None]
    product = np.empty((height, width), np.float32)
    for output, channel, row, column in np.ndindex(*weights.shape):
        shifted = padded[channel, row : row + height, column : column + width]
        result[output] += np.multiply(shifted, float(weights[output, channel, row, column]), out=product)
    return result
