"""From z-scored intensities to [-1, 1], and back."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mpscl_ray.errors import ConfigError


def scale(image: npt.NDArray[np.float32], low: float, high: float) -> npt.NDArray[np.float32]:
    """Intensities mapped so that low becomes -1 and high becomes 1: 2 (x - low) / (high - low) - 1, not clipped.

    Raises:
        ConfigError: The range is empty or not finite.
    """
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise ConfigError(
            f"the intensity range is {low:g} to {high:g}; expected two finite numbers, the lower one first"
        )
    return ((image - np.float32(low)) * np.float32(2.0 / (high - low)) - np.float32(1.0)).astype(np.float32, copy=False)


def unscale(image: npt.NDArray[np.float32], low: float, high: float) -> npt.NDArray[np.float32]:
    """Inverse of `scale`."""
    return (image + np.float32(1)) * np.float32((high - low) / 2) + np.float32(low)
