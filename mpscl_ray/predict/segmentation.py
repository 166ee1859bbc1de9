"""From the slices of a volume to its label map on the grid of its file: for prediction and for evaluation alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mpscl_ray.data.volumes.geometry import Geometry, restore_labels, restore_most_probable
from mpscl_ray.predict.model import Slices
from mpscl_ray.predict.postprocessing import NO_POSTPROCESSING, Labels, Postprocessing
from mpscl_ray.predict.predictor import Predictor
from mpscl_ray.predict.quality import SliceMaps


@dataclass(frozen=True)
class Segmentation:
    """The segmentation of one volume."""

    labels: Labels
    """Class indices in the shape of the file's array; background outside the crop."""
    slices: Labels
    """(D, H, W) class indices of the prepared slices."""
    probabilities: npt.NDArray[np.float32] | None
    """(C, D, H, W) of the prepared slices, where they were asked for or needed."""
    maps: SliceMaps
    """Of the prepared slices, before any postprocessing; with the disagreement where it was asked for, and of
    ensembles."""


def segment(
    predictor: Predictor,
    slices: Slices,
    geometry: Geometry,
    *,
    postprocessing: Postprocessing = NO_POSTPROCESSING,
    probabilities: bool = False,
    disagreement: bool = False,
) -> Segmentation:
    """Segment the slices of a volume and put the labels back on the grid of its file.

    Where the slices were resampled, their probabilities are interpolated and the most probable class is taken: this is
    smoother than the nearest label if slices are coarser than the file.

    Args:
        predictor: segmenter.
        slices: (D, H, W), scaled to [-1, 1].
        geometry: how they were made from the array of the file.
        postprocessing: rules for both label maps; probabilities stay those of the network.
        probabilities: whether the probabilities are to be returned; they take C times the memory of the slices.
        disagreement: whether that of several passes is to be returned
            (:meth:`mpscl_ray.predict.predictor.Predictor.predict_disagreement`).

    Raises:
        DataError: the weights give values that are not finite.
    """
    found: npt.NDArray[np.float32] | None = None
    resampled = any(axis.step != 1.0 for axis in geometry.axes)
    if resampled or probabilities or disagreement:
        if disagreement or predictor.several:
            found, spread = predictor.predict_disagreement(slices)
            maps = SliceMaps.of(found, spread)
        else:
            found = predictor.predict_probabilities(slices)
            maps = SliceMaps.of(found)
    else:
        maps = predictor.predict_maps(slices)
    labels = maps.labels
    if found is not None and resampled:
        restored = restore_most_probable(found, geometry)
    else:
        restored = restore_labels(labels, geometry)
    labels = postprocessing(labels, predictor.classes, millilitres(geometry.spacing_mm))
    restored = postprocessing(restored, predictor.classes, millilitres(geometry.voxel_mm))
    return Segmentation(restored, labels, found, maps)


def millilitres(voxel_mm: Sequence[float]) -> float:
    """Volume of a voxel in ml, from its size in mm along each axis."""
    return math.prod(voxel_mm) / 1000.0
