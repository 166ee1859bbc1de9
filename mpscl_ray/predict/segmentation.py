"""From the slices of a volume to its label map on the grid of its file: for prediction and for evaluation alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mpscl_ray.data.volumes.geometry import Geometry, restore_labels, restore_most_probable
from mpscl_ray.predict.model import Slices
from mpscl_ray.predict.predictor import Labels, Predictor, keep_largest_component


@dataclass(frozen=True)
class Segmentation:
    """The segmentation of one volume."""

    labels: Labels
    """Class indices in the shape of the file's array; background outside the crop."""
    slices: Labels
    """(D, H, W) class indices of the prepared slices."""
    probabilities: npt.NDArray[np.float32] | None
    """(C, D, H, W) of the prepared slices, where they were asked for or needed."""


def segment(
    predictor: Predictor,
    slices: Slices,
    geometry: Geometry,
    *,
    largest_component: bool = False,
    probabilities: bool = False,
) -> Segmentation:
    """Segment the slices of a volume and put the labels back on the grid of its file.

    Where the slices were resampled, their probabilities are interpolated and the most probable class is taken: this is
    smoother than the nearest label if slices are coarser than the file.

    Args:
        predictor: segmenter.
        slices: (D, H, W), scaled to [-1, 1].
        geometry: how they were made from the array of the file.
        largest_component: whether only the largest connected part of each structure is kept.
        probabilities: whether the probabilities are to be returned; they take C times the memory of the slices.

    Raises:
        DataError: the weights give values that are not finite.
    """
    found: npt.NDArray[np.float32] | None = None
    resampled = any(axis.step != 1.0 for axis in geometry.axes)
    if resampled or probabilities:
        found = predictor.predict_probabilities(slices)
        labels = found.argmax(axis=0).astype(np.uint8)
    else:
        labels = predictor.predict_slices(slices)
    if found is not None and resampled:
        restored = restore_most_probable(found, geometry)
    else:
        restored = restore_labels(labels, geometry)
    if largest_component:
        labels, restored = (keep_largest_component(part, len(predictor.classes)) for part in (labels, restored))
    return Segmentation(restored, labels, found)
