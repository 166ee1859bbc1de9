"""From a volume to slices for the network: turn, resample, crop, resize, clip, normalise, scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.ndimage

from mpscl_ray.data.label_values import is_structure
from mpscl_ray.data.volumes.geometry import (
    PERCENTILES,
    Axis,
    FloatArray,
    Geometry,
    LabelArray,
    orientation_letters,
    plane_axes,
    sample_image,
    sample_labels,
    voxel_sizes,
)
from mpscl_ray.data.volumes.recipe import AIR_HU, LOWEST_HU, Recipe
from mpscl_ray.errors import DataError

_SAME_SPACING = 1e-4
"""Relative difference of spacings that counts as rounding in a header, not as a reason to interpolate."""

_MOST_VOXELS = 2**31
_LEAST_CONTRAST = 0.05
"""Smallest spread of all but a few voxels of a crop, in standard deviations."""

_CENTRE_GRID_MM = 4.0
"""Spacing of the coarse grid on which the heart is searched."""

_PRESENTATION = {
    "coronal": "coronal slices from posterior to anterior, superior up, patient's left on the right",
    "axial": "axial slices from inferior to superior, anterior up, patient's left on the right",
    "sagittal": "sagittal slices from left to right, superior up, anterior on the left",
}


@dataclass
class PreparedVolume:
    """Slices of one volume, normalised but not yet scaled to [-1, 1]."""

    image: npt.NDArray[np.float32]
    """(D, H, W), mean 0 and standard deviation 1 over the samples inside the volume."""
    label: npt.NDArray[np.uint8] | None
    """(D, H, W) class indices, if labels were given."""
    geometry: Geometry


def label_centre(label: LabelArray) -> tuple[float, float, float] | None:
    """Mean voxel coordinate of all structures; None if there is none."""
    mask = is_structure(label)
    voxels = int(np.count_nonzero(mask))
    if voxels == 0:
        return None
    planes = mask.sum(axis=2)
    profiles = (planes.sum(axis=1), planes.sum(axis=0), mask.sum(axis=(0, 1)))
    x, y, z = (float(profile @ np.arange(profile.size) / voxels) for profile in profiles)
    return x, y, z


def label_free_centre(image: FloatArray, spacing_mm: tuple[float, float, float]) -> tuple[float, float, float]:
    """Voxel coordinate of the heart's centre, without labels.

    Cardiac scans are framed on the heart, and it is the large bright structure near the middle: blood is bright in
    angiography and in most cardiac MR, lung is dark. The centre is the centroid of blurred brightness between the
    median and the 98th percentile, weighted by a Gaussian of a fifth of the field of view around the middle.

    Limits: no anatomy is recognised. On 40 real short-axis stacks of 192 x 192 voxels it was 7 voxels from the centre
    of the labels on average and 17 at most; the middle of the image was 9 and 24. In a scan from neck to pelvis, or
    with the heart at the edge, it is wrong: choose a large crop, or cut the scan to the heart first.

    Args:
        image: Array order of the file.
        spacing_mm: Voxel size along each array axis.

    Returns:
        Coordinate along each array axis; the middle if the image has no contrast.
    """
    stride = [
        max(1, min(round(_CENTRE_GRID_MM / mm), length // 8))
        for mm, length in zip(spacing_mm, image.shape, strict=True)
    ]
    coarse = np.asarray(image[tuple(slice(step // 2, None, step) for step in stride)], dtype=np.float64)
    low, high = np.percentile(coarse, (50.0, 98.0))
    weight = scipy.ndimage.gaussian_filter(np.clip(coarse, low, high) - low, 1.5)
    positions = [
        np.arange(size) * step + step // 2 - (length - 1) / 2
        for size, step, length in zip(coarse.shape, stride, image.shape, strict=True)
    ]
    for along, length in zip(np.ix_(*positions), image.shape, strict=True):
        weight *= np.exp(-0.5 * (along / (0.2 * length)) ** 2)
    total = float(weight.sum())
    shifts = [float((weight * along).sum()) / total if total > 0 else 0.0 for along in np.ix_(*positions)]
    x, y, z = ((length - 1) / 2 + shift for length, shift in zip(image.shape, shifts, strict=True))
    return x, y, z


def prepare_volume(
    image: npt.NDArray[np.float32],
    affine: FloatArray,
    label: LabelArray | None,
    recipe: Recipe,
    case: str = "the volume",
) -> PreparedVolume:
    """Slices of a volume: turned, resampled, cropped, resized, clipped at a percentile, z-scored.

    Resampling, crop and resize are one linear interpolation along each axis (labels: nearest voxel), and none if the
    volume is only turned and cropped. Statistics are those of the crop without samples beyond the volume's borders;
    these become 0, the mean, as in the published MM-WHS slices. Padding of CT becomes air before all this.

    Args:
        image: Intensities in the order of the file.
        affine: (4, 4), voxel index to RAS+ millimetres.
        label: Class indices on the same grid, background 0, or None.
        recipe: What to do.
        case: Name used in messages.

    Returns:
        The slices, and the geometry that puts a prediction back.

    Raises:
        DataError: No labels although the recipe takes the centre from them, or a crop without contrast.

    Source: the preparation published with PnP-AdaNet and SIFA, where it is documented.
    """
    assert label is None or label.shape == image.shape
    image = _without_padding(image) if recipe.hounsfield else image
    layout, presentation = _lay_out(affine, recipe)
    voxel_mm = voxel_sizes(affine)
    from_labels = label_centre(label) if label is not None and recipe.centre != "image" else None
    if from_labels is None and recipe.centre == "labels":
        found = "no label map" if label is None else "a label map without a labelled voxel"
        raise DataError(
            f"{case} has {found}, but its crop is to be centred on labels; use centre auto or image, which need none"
        )
    centre = from_labels or label_free_centre(image, voxel_mm)
    axes = _place_axes(image, layout, voxel_mm, centre, recipe, case)
    block = sample_image(image, axes)
    clip_value, mean, deviation = _normalise(block, recipe.clip_percentile, case)
    prepared = np.zeros([axis.samples for axis in axes], dtype=np.float32)
    prepared[tuple(axis.inside() for axis in axes)] = block
    d_mm, h_mm, w_mm = (voxel_mm[axis.array_axis] * axis.step for axis in axes)
    geometry = Geometry(
        shape=image.shape,
        axes=axes,
        spacing_mm=(d_mm, h_mm, w_mm),
        presentation=presentation,
        centre=centre,
        centre_from="labels" if from_labels else "image",
        clip_value=clip_value,
        mean=mean,
        standard_deviation=deviation,
        pad_value=0.0,
        steps=_steps(recipe, affine, presentation, axes, bool(from_labels), clip_value, mean, deviation),
        percentiles=tuple(np.percentile(_sample(block), PERCENTILES).tolist()),
    )
    return PreparedVolume(prepared, None if label is None else sample_labels(label, axes), geometry)


def _without_padding(image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The image with air in place of what is below all Hounsfield units; the same array if there is none."""
    return np.where(image < LOWEST_HU, np.float32(AIR_HU), image) if image.min() < LOWEST_HU else image


def _lay_out(affine: FloatArray, recipe: Recipe) -> tuple[tuple[tuple[int, bool], ...], str]:
    """Array axis and direction for D, H and W, and the presentation in words."""
    if recipe.orientation == "canonical":
        return plane_axes(affine, recipe.slice_axis), _PRESENTATION[recipe.slice_axis]
    depth = int(recipe.slice_axis)
    rows, columns = (axis for axis in range(3) if axis != depth)
    text = f"slices as stored, stacked along array axis {depth}, rows along axis {rows}, columns along axis {columns}"
    return ((depth, False), (rows, False), (columns, False)), text


def _place_axes(
    image: npt.NDArray[np.float32],
    layout: tuple[tuple[int, bool], ...],
    voxel_mm: tuple[float, float, float],
    centre: tuple[float, float, float],
    recipe: Recipe,
    case: str,
) -> tuple[Axis, Axis, Axis]:
    crop = (recipe.crop_depth, *(recipe.crop or (None, None)))
    size = (None, *(recipe.size or (None, None)))
    spacing = recipe.spacing_mm or (None, None, None)
    depth, height, width = (
        _place_axis(
            array_axis,
            reverse,
            image.shape[array_axis],
            voxel_mm[array_axis],
            centre[array_axis],
            spacing[number],
            crop[number],
            size[number],
            keep_inside=number == 0,
        )
        for number, (array_axis, reverse) in enumerate(layout)
    )
    if depth.samples * height.samples * width.samples > _MOST_VOXELS:
        raise DataError(
            f"{case} would become {depth.samples} slices of {height.samples} x {width.samples}, more than "
            f"{_MOST_VOXELS} voxels; choose a larger spacing, a smaller crop or a smaller size"
        )
    return depth, height, width


def _place_axis(
    array_axis: int,
    reverse: bool,
    length: int,
    voxel_mm: float,
    centre: float,
    spacing_mm: float | None,
    crop: int | None,
    size: int | None,
    keep_inside: bool,
) -> Axis:
    """The samples along one axis: resample about the middle of the volume, crop about the centre, resize the crop."""
    step = 1.0 if spacing_mm is None else spacing_mm / voxel_mm
    if abs(step - 1.0) < _SAME_SPACING:
        step = 1.0
    samples = max(1, int(np.floor(length / step + 0.5)))
    # Middle on middle: if the new spacing does not divide the extent, both ends share the difference.
    start = (length - 1) / 2 - step * (samples - 1) / 2
    if crop is not None:
        position = ((length - 1 - centre if reverse else centre) - start) / step
        # Half the crop before the centre (crop // 2 if the centre is a voxel), independent of rounding errors.
        first = int(np.ceil(round(position - crop / 2, 6)))
        last = first + crop
        if keep_inside:
            first, last = max(first, 0), min(last, samples)
        start += step * first
        samples = last - first
    if size is not None and size != samples:
        start += step * ((samples / size - 1) / 2)
        step *= samples / size
        samples = size
    return Axis(array_axis, reverse, length, samples, start, step)


def _normalise(block: npt.NDArray[np.float32], clip_percentile: float, case: str) -> tuple[float, float, float]:
    """Clip and z-score a crop in place; returns the clip value, the mean and the standard deviation."""
    clip_value = float(np.percentile(block, clip_percentile))
    np.minimum(block, np.float32(clip_value), out=block)
    mean = float(block.mean(dtype=np.float64))
    # Slice by slice, so that no double-precision copy of the volume is made.
    squares = sum(float(np.square(plane - mean, dtype=np.float64).sum()) for plane in block)
    deviation = float(np.sqrt(squares / block.size))
    if not deviation > 1e-6 * max(abs(mean), 1e-30):
        raise DataError(
            f"the crop of {case} has one intensity throughout, {mean:g}, and cannot be normalised; check the image, "
            f"or choose another crop"
        )
    block -= np.float32(mean)
    block /= np.float32(deviation)
    # A sample first: sorting all voxels is only worth it for a crop whose sample has no contrast.
    if _contrast(_sample(block)) < _LEAST_CONTRAST and _contrast(block) < _LEAST_CONTRAST:
        raise DataError(
            f"nearly all of the crop of {case} lies within {_LEAST_CONTRAST} standard deviations because of a few "
            f"voxels down to {float(block.min()) * deviation + mean:g}; set these to the intensity of the background"
        )
    return clip_value, mean, deviation


def _sample(block: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return block.reshape(-1)[:: block.size // 100_000 + 1]


def _contrast(image: npt.NDArray[np.float32]) -> float:
    low, high = np.percentile(image, (1.0, 99.0))
    return float(high - low)


def _steps(
    recipe: Recipe,
    affine: FloatArray,
    presentation: str,
    axes: tuple[Axis, Axis, Axis],
    from_labels: bool,
    clip_value: float,
    mean: float,
    deviation: float,
) -> tuple[str, ...]:
    done = [f"orientation {orientation_letters(affine)}: {presentation}"]
    if recipe.spacing_mm is not None:
        sizes = ", ".join("kept" if s is None else f"{s:g} mm" for s in recipe.spacing_mm)
        done.append(f"resampled (slice, row, column): {sizes}; image linear, labels nearest")
    if recipe.crop is not None or recipe.crop_depth is not None:
        where = "the mean coordinate of the labels" if from_labels else "a centre found without labels"
        rows, columns = recipe.crop or ("all", "all")
        done.append(f"crop of {rows} x {columns} voxels, {axes[0].samples} slices, around {where}")
    if recipe.size is not None and recipe.size != recipe.crop:
        done.append(f"crop resized to {recipe.size[0]} x {recipe.size[1]}; image linear, labels nearest")
    done.append(f"clipped at percentile {recipe.clip_percentile:g} of the crop, {clip_value:g}")
    done.append(f"z-score of the crop: mean {mean:g}, standard deviation {deviation:g}; outside the volume 0")
    return tuple(done)


def intensity_range(image: npt.NDArray[np.float32]) -> tuple[float, float]:
    """The 0.1th and 99.9th percentile of one prepared volume, so that a few outliers do not set the range.

    The range of a modality covers those of its training volumes. About 0.1 % of the voxels at either end may be
    slightly outside [-1, 1] after `scale`; nothing is clipped.
    """
    low, high = np.percentile(image, (0.1, 99.9))
    return float(low), float(high)
