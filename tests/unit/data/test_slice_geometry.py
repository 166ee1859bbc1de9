"""Volumes to slices and back: every orientation, every sample against a slow reference; nothing in the crop is lost."""

from __future__ import annotations

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpscl_ray.data.volumes.geometry import (
    Axis,
    Geometry,
    closest_world_axes,
    interpolation_matrix,
    orientation_letters,
    restore_labels,
    restore_most_probable,
    voxel_sizes,
)
from mpscl_ray.data.volumes.preprocess import prepare_volume
from mpscl_ray.data.volumes.recipe import Recipe
from mpscl_ray.errors import DataError
from tests.stored_volumes import RECIPES, SIGNED_PERMUTATIONS, SPACING, WHOLE, Array, ball, ras_volume, stored_as

# --------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("plane", ["coronal", "axial", "sagittal"])
def test_a_volume_gives_the_same_slices_however_it_is_stored(plane: str) -> None:
    image, label, affine = ras_volume()
    recipe = Recipe(slice_axis=plane, crop=(6, 6), spacing_mm=(None, 2.5, 2.5))
    expected = prepare_volume(image, affine, label, recipe)
    assert expected.label is not None
    for order, signs in SIGNED_PERMUTATIONS:
        turned_image, turned_affine = stored_as(image, affine, order, signs)
        turned_label, _ = stored_as(label, affine, order, signs)
        found = prepare_volume(turned_image, turned_affine, turned_label, recipe)
        stored = orientation_letters(turned_affine)
        np.testing.assert_allclose(found.image, expected.image, atol=1e-5, err_msg=stored)
        assert found.label is not None
        np.testing.assert_array_equal(found.label, expected.label, err_msg=stored)
        assert found.geometry.spacing_mm == pytest.approx(expected.geometry.spacing_mm), stored


@pytest.mark.parametrize("crop", [None, (4, 5), (20, 30)], ids=["whole", "smaller", "larger"])
@pytest.mark.parametrize("layout", ["coronal", "axial", "sagittal", "0", "1", "2"])
def test_labels_go_back_bit_by_bit(layout: str, crop: tuple[int, int] | None) -> None:
    """From all orientations. Stored axes have six orders and no direction that could be wrong."""
    whole_image, whole_label, affine = ras_volume((6, 7, 5))
    stored_axis = layout.isdigit()
    recipe = Recipe(orientation="stored" if stored_axis else "canonical", slice_axis=layout, crop=crop)
    for order, signs in SIGNED_PERMUTATIONS[:: 8 if stored_axis else 1]:
        image, turned_affine = stored_as(whole_image, affine, order, signs)
        label, _ = stored_as(whole_label, affine, order, signs)
        stored = orientation_letters(turned_affine)
        prepared = prepare_volume(image, turned_affine, label, recipe)
        assert prepared.label is not None
        restored = restore_labels(prepared.label, prepared.geometry)
        assert restored.shape == label.shape, stored
        assert restored.dtype == np.uint8
        if crop != (4, 5):
            np.testing.assert_array_equal(restored, label, err_msg=stored)
            continue
        inside = restore_labels(np.ones_like(prepared.label), prepared.geometry) == 1
        np.testing.assert_array_equal(restored[inside], label[inside], err_msg=stored)
        assert not restored[~inside].any(), stored
        assert np.count_nonzero(inside) == prepared.label.size, stored


WORLD = ["right", "anterior", "superior"]


@pytest.mark.parametrize(
    ("plane", "increasing"),
    [
        ("coronal", ("anterior", "-superior", "-right")),
        ("axial", ("superior", "-anterior", "-right")),
        ("sagittal", ("right", "-superior", "-anterior")),
    ],
)
@pytest.mark.parametrize(("order", "signs"), SIGNED_PERMUTATIONS[::5])
def test_slices_are_oriented_as_documented(
    plane: str, increasing: tuple[str, ...], order: tuple[int, ...], signs: tuple[int, ...]
) -> None:
    _, _, affine = ras_volume()
    for world_axis, name in enumerate(WORLD):
        millimetres = np.broadcast_to(
            np.arange(8.0).reshape([8 if a == world_axis else 1 for a in range(3)]), (8, 8, 8)
        )
        image, turned = stored_as(millimetres.astype(np.float32), affine, order, signs)
        prepared = prepare_volume(image, turned, None, Recipe(slice_axis=plane, **WHOLE)).image
        for axis, direction in enumerate(increasing):
            if direction.removeprefix("-") == name:
                change = np.diff(prepared, axis=axis)
                assert (change < 0).all() if direction.startswith("-") else (change > 0).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_stored_slices_are_the_arrays_own(axis: int) -> None:
    image, _, affine = ras_volume()
    _, crooked = stored_as(image, affine, (2, 0, 1), (-1, 1, -1))
    prepared = prepare_volume(image, crooked, None, Recipe(orientation="stored", slice_axis=str(axis), **WHOLE))
    expected = np.moveaxis(image, axis, 0)
    np.testing.assert_allclose(prepared.image, (expected - image.mean()) / image.std(), atol=1e-4)


def test_orientation_is_named_as_viewers_name_it() -> None:
    random = np.random.default_rng(5)
    for _ in range(500):
        turn, _ = np.linalg.qr(random.normal(size=(3, 3)))
        affine = np.eye(4)
        affine[:3, :3] = turn * random.uniform(0.3, 9, 3) + random.normal(0, 0.02, (3, 3))
        assert orientation_letters(affine) == "".join(nib.aff2axcodes(affine))
        assert sorted(axis for axis, _ in closest_world_axes(affine)) == [0, 1, 2]
        np.testing.assert_allclose(voxel_sizes(affine), nib.affines.voxel_sizes(affine))


# --------------------------------------------------------------------------------------------- interpolation


def slow_image(image: Array, axes: tuple[Axis, Axis, Axis]) -> Array:
    """Every sample as a weighted sum over the whole volume, written out; NaN outside."""
    out = np.full([axis.samples for axis in axes], np.nan)
    view = np.transpose(image, [axis.array_axis for axis in axes]).astype(np.float64)
    for number, axis in enumerate(axes):
        if axis.reverse:
            view = np.flip(view, number)
    for index in np.ndindex(out.shape):
        weights = []
        for axis, i in zip(axes, index, strict=True):
            x = axis.start + i * axis.step
            if not -0.5 <= x < axis.length - 0.5:
                break
            triangle = [max(0.0, 1 - abs(j - x) / max(1.0, axis.step)) for j in range(axis.length)]
            weights.append(np.array(triangle) / sum(triangle))
        else:
            out[index] = np.einsum("abc,a,b,c->", view, *weights)
    return out


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_sample_is_where_the_geometry_says(recipe: Recipe) -> None:
    image, label, affine = ras_volume()
    image, turned = stored_as(image, affine, (1, 2, 0), (-1, 1, -1))
    label, _ = stored_as(label, affine, (1, 2, 0), (-1, 1, -1))
    prepared = prepare_volume(image, turned, label, recipe)
    geometry = prepared.geometry
    expected = slow_image(image, geometry.axes)
    outside = np.isnan(expected)
    expected = (expected - np.nanmean(expected)) / np.nanstd(expected)
    np.testing.assert_allclose(prepared.image[~outside], expected[~outside], atol=2e-4)
    assert (prepared.image[outside] == geometry.pad_value).all()
    assert prepared.label is not None
    for index in np.ndindex(prepared.label.shape):
        if outside[index]:
            assert prepared.label[index] == 0
            continue
        voxel = [0, 0, 0]
        for axis, i in zip(geometry.axes, index, strict=True):
            position = int(np.floor(axis.start + i * axis.step + 0.5))
            voxel[axis.array_axis] = axis.length - 1 - position if axis.reverse else position
        assert prepared.label[index] == label[tuple(voxel)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_prepared_voxels_are_as_far_apart_as_their_spacing_says(recipe: Recipe) -> None:
    """An image that holds a world coordinate still holds it after interpolation, away from the borders."""
    shape, affine = (24, 26, 22), ras_volume()[2]
    recipe = Recipe.from_json({**recipe.to_json(), "orientation": "canonical", "slice_axis": "coronal"})
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    world = voxels @ affine[:3, :3].T + affine[:3, 3]
    for world_axis, prepared_axis, sense in ((1, 0, 1), (2, 1, -1), (0, 2, -1)):
        image, turned = stored_as(world[..., world_axis].astype(np.float32), affine, (2, 0, 1), (1, -1, -1))
        prepared = prepare_volume(image, turned, None, recipe)
        values = prepared.image * prepared.geometry.standard_deviation + prepared.geometry.mean
        line = np.moveaxis(values, prepared_axis, 0)[:, 1, 1]
        middle = line[line.size // 2 - 1 : line.size // 2 + 1]
        # A widened triangle is not exact on a slope: the error is a few hundredths of a voxel.
        np.testing.assert_allclose(np.diff(middle), sense * prepared.geometry.spacing_mm[prepared_axis], rtol=0.05)


@pytest.mark.parametrize(("length", "samples"), [(144, 80), (80, 144), (9, 9), (10, 3), (3, 10), (256, 64)])
def test_resizing_agrees_with_an_independent_implementation(length: int, samples: int) -> None:
    random = np.random.default_rng(length)
    signal = random.normal(size=length).astype(np.float32)
    step = length / samples
    matrix = interpolation_matrix(np.arange(samples) * step + (step - 1) / 2, step, length)
    plane = torch.from_numpy(signal)[None, None, :, None].repeat(1, 1, 1, 4)
    expected = torch.nn.functional.interpolate(plane, (samples, 4), mode="bilinear", antialias=True)
    np.testing.assert_allclose(matrix @ signal, expected[0, 0, :, 0].numpy(), atol=5e-5)


def test_detail_too_fine_for_the_new_grid_is_averaged() -> None:
    image = np.indices((64, 64, 3)).sum(0).astype(np.float32) % 2
    image[:4] += 3
    recipe = Recipe(orientation="stored", slice_axis="2", crop=None, size=(20, 20), clip_percentile=100)
    prepared = prepare_volume(image, np.eye(4), None, recipe)
    values = prepared.image * prepared.geometry.standard_deviation + prepared.geometry.mean
    np.testing.assert_allclose(values[:, 4:-1, 1:-1], 0.5, atol=0.08)


def test_spacings_that_differ_by_rounding_are_the_same() -> None:
    image, _, _ = ras_volume()
    affine = np.diag([1.25, 1.25, 8.0, 1.0]).astype(np.float32).astype(np.float64) * (1 + 1e-7)
    recipe = Recipe(orientation="stored", slice_axis="2", spacing_mm=(8.0, 1.25, 1.25), **WHOLE)
    prepared = prepare_volume(image, affine, None, recipe)
    assert all(axis.is_plain_crop() for axis in prepared.geometry.axes)


@pytest.mark.parametrize(("crop", "size"), [(8, 4), (8, 20), (7, 3), (40, 16)])
def test_resizing_covers_the_crop_from_edge_to_edge(crop: int, size: int) -> None:
    image, label, affine = ras_volume((30, 30, 6))
    recipe = Recipe(orientation="stored", slice_axis="2", crop=(crop, crop), spacing_mm=(None, 2.4, 1.0))
    plain = prepare_volume(image, affine, label, recipe).geometry.axes
    resized = prepare_volume(image, affine, label, replace(recipe, size=(size, size))).geometry.axes
    for before, after in zip(plain[1:], resized[1:], strict=True):
        assert (before.samples, after.samples) == (crop, size)
        assert after.start - after.step / 2 == pytest.approx(before.start - before.step / 2)
        assert after.step * size == pytest.approx(before.step * crop)


def test_resampling_keeps_the_size_in_mm() -> None:
    image, _, affine = ras_volume((40, 30, 20))
    prepared = prepare_volume(image, affine, None, Recipe(spacing_mm=(1.0, 1.0, 1.0), **WHOLE))
    assert prepared.image.shape == (60, 60, 60)
    for axis in prepare_volume(image, affine, None, Recipe(spacing_mm=(2.6, 1.7, 2.2), **WHOLE)).geometry.axes:
        assert axis.positions()[0] == pytest.approx(axis.length - 1 - axis.positions()[-1])
    assert prepared.geometry.spacing_mm == pytest.approx((1.0, 1.0, 1.0))


def dice(first: Array, second: Array) -> float:
    return float(2 * np.count_nonzero(first & second) / (np.count_nonzero(first) + np.count_nonzero(second)))


def test_labels_survive_resampling_and_probabilities_do_better() -> None:
    label = ball((60, 50, 30), 30.0, SPACING)
    recipe = Recipe(spacing_mm=(3.0, 3.0, 3.0), crop=(30, 30), size=(16, 16), clip_percentile=100)
    prepared = prepare_volume(label.astype(np.float32), np.diag([*SPACING, 1.0]), label, recipe)
    assert prepared.label is not None
    nearest = restore_labels(prepared.label, prepared.geometry)
    filled = prepared.image * prepared.geometry.standard_deviation + prepared.geometry.mean
    smooth = restore_most_probable(np.stack([1 - filled, filled]), prepared.geometry)
    assert dice(nearest, label) > 0.85
    assert dice(smooth, label) > dice(nearest, label) + 0.02


@pytest.mark.parametrize("recipe", [RECIPES[0], Recipe(crop=(20, 4), orientation="stored", slice_axis="0")])
def test_most_probable_equals_nearest_without_resampling(recipe: Recipe) -> None:
    image, label, affine = ras_volume()
    image, turned = stored_as(image, affine, (2, 1, 0), (1, -1, 1))
    label, _ = stored_as(label, affine, (2, 1, 0), (1, -1, 1))
    prepared = prepare_volume(image, turned, label, recipe)
    probabilities = np.random.default_rng(0).random((4, *prepared.image.shape)).astype(np.float32)
    expected = restore_labels(probabilities.argmax(0).astype(np.uint8), prepared.geometry)
    np.testing.assert_array_equal(restore_most_probable(probabilities, prepared.geometry), expected)


def test_equal_probabilities_go_to_the_lower_class() -> None:
    image, _, affine = ras_volume()
    prepared = prepare_volume(image, affine, None, Recipe(spacing_mm=(2.0, 2.0, 2.0), **WHOLE))
    assert not restore_most_probable(np.full((3, *prepared.image.shape), 1 / 3, np.float32), prepared.geometry).any()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_each_original_voxel_takes_the_nearest_sample(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(*[st.integers(2, 9)] * 3))
    order, signs = data.draw(st.sampled_from(SIGNED_PERMUTATIONS))
    millimetres = st.one_of(st.none(), st.floats(0.7, 6.0))
    pair = st.one_of(st.none(), st.tuples(st.integers(2, 12), st.integers(2, 12)))
    recipe = Recipe(
        slice_axis=data.draw(st.sampled_from(["coronal", "axial", "sagittal"])),
        spacing_mm=data.draw(st.one_of(st.none(), st.tuples(millimetres, millimetres, millimetres))),
        crop=data.draw(pair),
        crop_depth=data.draw(st.one_of(st.none(), st.integers(1, 6))),
        size=data.draw(pair),
    )
    image, label, affine = ras_volume(shape, seed=data.draw(st.integers(0, 99)))
    image, turned = stored_as(image, affine, order, signs)
    label, _ = stored_as(label, affine, order, signs)
    try:
        prepared = prepare_volume(image, turned, label, recipe)
    except DataError:
        return  # a crop of a voxel or two without contrast
    geometry = Geometry.from_json(json.loads(json.dumps(prepared.geometry.to_json())))
    assert geometry == prepared.geometry
    assert prepared.label is not None
    assert geometry.prepared_shape == prepared.image.shape == prepared.label.shape
    if recipe.size or recipe.crop:
        assert prepared.image.shape[1:] == (recipe.size or recipe.crop)
    restored = restore_labels(prepared.label, geometry)
    for voxel in np.ndindex(label.shape):
        index = []
        for axis in geometry.axes:
            position = voxel[axis.array_axis]
            position = axis.length - 1 - position if axis.reverse else position
            index.append(int(np.floor((position - axis.start) / axis.step + 0.5)))
        inside = all(0 <= i < n for i, n in zip(index, geometry.prepared_shape, strict=True))
        assert restored[voxel] == (prepared.label[tuple(index)] if inside else 0)
    if all(axis.is_plain_crop() for axis in geometry.axes):
        inside = restore_labels(np.ones_like(prepared.label), geometry) == 1
        np.testing.assert_array_equal(restored[inside], label[inside])


def test_a_prediction_of_another_shape_is_refused() -> None:
    image, _, affine = ras_volume()
    prepared = prepare_volume(image, affine, None, Recipe(crop=(5, 5)))
    with pytest.raises(DataError, match=r"\(8, 5, 5\).*\(9, 5, 5\)"):
        restore_labels(np.zeros((8, 5, 5), np.uint8), prepared.geometry)
    with pytest.raises(DataError, match=r"\(8, 5, 5\).*\(9, 5, 5\)"):
        restore_most_probable(np.zeros((2, 8, 5, 5), np.float32), prepared.geometry)
