"""Volumes to slices and back: every orientation, every step against a slow reference, nothing lost inside the crop."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from dataclasses import replace
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpscl_ray.data.geometry import (
    Axis,
    closest_world_axes,
    interpolation_matrix,
    orientation_letters,
    voxel_sizes,
)
from mpscl_ray.data.slices import (
    Geometry,
    Recipe,
    intensity_range,
    label_centre,
    label_free_centre,
    prepare_volume,
    restore_labels,
    restore_most_probable,
    scale,
)
from mpscl_ray.errors import ConfigError, DataError

Array = npt.NDArray[Any]
SIGNED_PERMUTATIONS = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]
SPACING = np.array([1.5, 2.0, 3.0])
WHOLE: dict[str, Any] = {"crop": None, "clip_percentile": 100.0}
"""Recipe that only turns the volume."""


def ras_volume(shape: tuple[int, int, int] = (7, 9, 8), seed: int = 0) -> tuple[Array, Array, Array]:
    """Image, labels and affine of a volume stored right, anterior, superior."""
    random = np.random.default_rng(seed)
    image = random.normal(100, 20, shape).astype(np.float32)
    label = random.integers(0, 5, shape).astype(np.uint8)
    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = (-20, 5, 60)
    return image, label, affine


def stored_as(array: Array, affine: Array, order: tuple[int, ...], signs: tuple[int, ...]) -> tuple[Array, Array]:
    """The same volume with its array axes in another order and sense, and the affine that says so."""
    turned = array.transpose(order)
    change = np.zeros((4, 4))
    change[3, 3] = 1
    for new, (old, sign) in enumerate(zip(order, signs, strict=True)):
        change[old, new] = sign
        if sign < 0:
            change[old, 3] = array.shape[old] - 1
            turned = np.flip(turned, new)
    return turned.copy(), affine @ change


# --------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize(("order", "signs"), SIGNED_PERMUTATIONS)
@pytest.mark.parametrize("plane", ["coronal", "axial", "sagittal"])
def test_a_volume_gives_the_same_slices_however_it_is_stored(
    order: tuple[int, ...], signs: tuple[int, ...], plane: str
) -> None:
    image, label, affine = ras_volume()
    recipe = Recipe(slice_axis=plane, crop=(6, 6), spacing_mm=(None, 2.5, 2.5))
    expected = prepare_volume(image, affine, label, recipe)
    turned_image, turned_affine = stored_as(image, affine, order, signs)
    turned_label, _ = stored_as(label, affine, order, signs)
    found = prepare_volume(turned_image, turned_affine, turned_label, recipe)
    np.testing.assert_allclose(found.image, expected.image, atol=1e-5)
    assert found.label is not None
    assert expected.label is not None
    np.testing.assert_array_equal(found.label, expected.label)
    assert found.geometry.spacing_mm == pytest.approx(expected.geometry.spacing_mm)


@pytest.mark.parametrize(("order", "signs"), SIGNED_PERMUTATIONS)
@pytest.mark.parametrize("layout", ["coronal", "axial", "sagittal", "0", "1", "2"])
@pytest.mark.parametrize("crop", [None, (4, 5), (20, 30)])
def test_labels_go_back_bit_by_bit(
    order: tuple[int, ...], signs: tuple[int, ...], layout: str, crop: tuple[int, int] | None
) -> None:
    image, label, affine = ras_volume((6, 7, 5))
    image, turned_affine = stored_as(image, affine, order, signs)
    label, _ = stored_as(label, affine, order, signs)
    recipe = Recipe(orientation="stored" if layout.isdigit() else "canonical", slice_axis=layout, crop=crop)
    prepared = prepare_volume(image, turned_affine, label, recipe)
    assert prepared.label is not None
    restored = restore_labels(prepared.label, prepared.geometry)
    assert restored.shape == label.shape
    assert restored.dtype == np.uint8
    if crop != (4, 5):
        np.testing.assert_array_equal(restored, label)
        return
    inside = restore_labels(np.ones_like(prepared.label), prepared.geometry) == 1
    np.testing.assert_array_equal(restored[inside], label[inside])
    assert not restored[~inside].any()
    assert np.count_nonzero(inside) == prepared.label.size


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
def test_slices_stand_as_documented(
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


RECIPES = [
    Recipe(crop=(5, 6), clip_percentile=100),
    Recipe(crop=(5, 6), size=(9, 3), clip_percentile=100),
    Recipe(crop=(12, 14), crop_depth=3, size=(7, 7), clip_percentile=100, slice_axis="axial"),
    Recipe(crop=(6, 6), spacing_mm=(4.0, 1.0, 2.2), clip_percentile=100, slice_axis="sagittal"),
    Recipe(
        crop=(8, 5), spacing_mm=(None, 1.7, 5.0), size=(6, 6), orientation="stored", slice_axis="1", clip_percentile=100
    ),
]


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
        # A widened triangle is not exact on a slope; it is off by a few hundredths of a voxel.
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


def ball(shape: tuple[int, int, int], radius: float, spacing: Array) -> Array:
    grid = np.indices(shape).T.T
    offset = (grid - (np.array(shape).reshape(3, 1, 1, 1) - 1) / 2) * spacing.reshape(3, 1, 1, 1)
    return (np.sqrt((offset**2).sum(0)) < radius).astype(np.uint8)


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


# --------------------------------------------------------------------------------------------- crop


def test_the_crop_is_centred_on_the_mean_of_the_labels() -> None:
    image = np.random.default_rng(0).normal(size=(40, 50, 6)).astype(np.float32)
    label = np.zeros(image.shape, np.uint8)
    label[10:15, 30:33, 2:5] = 3
    recipe = Recipe(orientation="stored", slice_axis="2", crop=(9, 7), crop_depth=3)
    prepared = prepare_volume(image, np.eye(4), label, recipe)
    assert prepared.geometry.centre == (12.0, 31.0, 3.0)
    assert prepared.geometry.centre_from == "labels"
    assert prepared.label is not None
    np.testing.assert_array_equal(prepared.label, label[8:17, 28:35, 2:5].transpose(2, 0, 1))
    crop = image[8:17, 28:35, 2:5].transpose(2, 0, 1)
    clipped = np.minimum(crop, np.percentile(crop, 98))
    np.testing.assert_allclose(prepared.image, (clipped - clipped.mean()) / clipped.std(), atol=1e-5)


def test_beyond_the_volume_the_image_is_its_mean_and_the_label_background() -> None:
    image, label, affine = ras_volume((6, 7, 8))
    recipe = Recipe(orientation="stored", slice_axis="2", crop=(20, 7))
    prepared = prepare_volume(image, affine, np.maximum(label, 1), recipe)
    inside = prepared.geometry.axes[1].inside()
    assert inside.stop - inside.start == 6
    outside = np.ones(20, bool)
    outside[inside] = False
    assert prepared.label is not None
    assert not prepared.label[:, outside].any()
    assert prepared.label[:, inside].all()
    assert (prepared.image[:, outside] == 0).all()
    np.testing.assert_allclose(prepared.image[:, inside].mean(dtype=np.float64), 0, atol=1e-6)
    np.testing.assert_allclose(prepared.image[:, inside].std(dtype=np.float64), 1, atol=1e-5)


def test_a_depth_beyond_the_volume_gives_the_slices_there_are() -> None:
    image, label, affine = ras_volume((6, 7, 8))
    label[:] = 0
    label[2, 3, 6] = 1
    recipe = Recipe(orientation="stored", slice_axis="2", crop=(6, 6), crop_depth=7)
    prepared = prepare_volume(image, affine, label, recipe)
    assert prepared.image.shape == (5, 6, 6)
    assert prepared.geometry.axes[0].start == 3


def test_clipping_looks_at_the_crop_alone() -> None:
    image, _, _ = ras_volume((30, 30, 4))
    label = np.zeros(image.shape, np.uint8)
    label[8:13, 8:13] = 1
    recipe = Recipe(orientation="stored", slice_axis="2", crop=(10, 10), clip_percentile=90)
    before = prepare_volume(image, np.eye(4), label, recipe)
    image[25:] = 1e6
    after = prepare_volume(image, np.eye(4), label, recipe)
    np.testing.assert_array_equal(before.image, after.image)
    assert before.geometry.clip_value == pytest.approx(np.percentile(image[5:15, 5:15], 90), rel=1e-5)
    values = before.image * before.geometry.standard_deviation + before.geometry.mean
    np.testing.assert_allclose(values.max(), before.geometry.clip_value, rtol=1e-5)
    assert 0.09 < np.mean(values > before.geometry.clip_value - 1e-3) < 0.12


def test_where_the_centre_comes_from() -> None:
    image, label, affine = ras_volume((30, 30, 30))
    empty = np.zeros_like(label)
    for given_label, centre, expected in (
        (label, "auto", "labels"),
        (label, "labels", "labels"),
        (label, "image", "image"),
        (empty, "auto", "image"),
        (None, "auto", "image"),
        (None, "image", "image"),
    ):
        recipe = Recipe(crop=(9, 9), centre=centre)  # type: ignore[arg-type]
        prepared = prepare_volume(image, affine, given_label, recipe)
        assert prepared.geometry.centre_from == expected
        assert (prepared.label is None) == (given_label is None)
    for given_label, said in ((None, "no label map"), (empty, "without a labelled voxel")):
        with pytest.raises(DataError, match=f"case 7 has .*{said}"):
            prepare_volume(image, affine, given_label, Recipe(crop=(9, 9), centre="labels"), case="case 7")


def test_a_crop_without_contrast_is_refused() -> None:
    image = np.zeros((20, 20, 20), np.float32)
    image[0] = 5
    label = ball(image.shape, 3.0, np.ones(3))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="crop of case 3 has the one intensity 0"):
        prepare_volume(image, np.eye(4), label, Recipe(crop=(6, 6)), case="case 3")


def test_neither_image_nor_label_is_changed() -> None:
    image, label, affine = ras_volume()
    copies = image.copy(), label.copy()
    for recipe in (Recipe(**WHOLE), *RECIPES):
        prepare_volume(image, affine, label, recipe)
    np.testing.assert_array_equal(image, copies[0])
    np.testing.assert_array_equal(label, copies[1])


def test_mean_coordinate_of_labels() -> None:
    label = np.random.default_rng(0).integers(0, 3, (6, 7, 8)).astype(np.uint8)
    np.testing.assert_allclose(label_centre(label), np.argwhere(label > 0).mean(0))  # type: ignore[arg-type]
    assert label_centre(np.zeros((4, 4, 4), np.uint8)) is None


@pytest.mark.parametrize("offset", [(0, 0, 0), (12, -10, 4), (-15, 8, -4)])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 0.7, 5.0)])
def test_the_centre_without_labels_moves_towards_the_heart(
    offset: tuple[int, int, int], spacing: tuple[float, float, float]
) -> None:
    random = np.random.default_rng(0)
    shape = (96, 90, 30)
    heart = np.roll(ball(shape, 22.0, np.array([1.0, 1.0, 2.5])), offset, (0, 1, 2))
    image = (heart * 200 + 40 + random.normal(0, 10, shape)).astype(np.float32)
    truth = np.array(label_centre(heart))
    middle = (np.array(shape) - 1) / 2
    found = np.array(label_free_centre(image, spacing))
    assert np.linalg.norm(found - truth) <= max(1.5, 0.6 * np.linalg.norm(middle - truth))
    flipped = np.array(label_free_centre(image[::-1], spacing))
    assert abs((shape[0] - 1 - flipped[0]) - found[0]) < 0.7


def test_the_centre_of_an_image_without_contrast_is_its_middle() -> None:
    assert label_free_centre(np.zeros((9, 8, 3), np.float32), (1.0, 1.0, 1.0)) == (4.0, 3.5, 1.0)


# --------------------------------------------------------------------------------------------- records, scaling


def test_recipes_survive_json() -> None:
    for recipe in (Recipe(), *RECIPES):
        assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    with pytest.raises(ConfigError, match="slice_axes"):
        Recipe.from_json({"slice_axes": "coronal"})


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"orientation": "native"}, "orientation"),
        ({"slice_axis": "2"}, "slice_axis"),
        ({"orientation": "stored", "slice_axis": "coronal"}, "slice_axis"),
        ({"orientation": "stored", "slice_axis": "3"}, "slice_axis"),
        ({"centre": "heart"}, "centre"),
        ({"crop": (0, 10)}, "crop"),
        ({"crop": (10,)}, "crop"),
        ({"size": (10, -1)}, "size"),
        ({"crop_depth": 0}, "crop_depth"),
        ({"spacing_mm": (1.0, 1.0)}, "spacing_mm"),
        ({"spacing_mm": (1.0, 0.0, 1.0)}, "spacing_mm"),
        ({"spacing_mm": (1.0, float("nan"), 1.0)}, "spacing_mm"),
        ({"clip_percentile": 0.0}, "clip_percentile"),
        ({"clip_percentile": 101.0}, "clip_percentile"),
        ({"clip_percentile": float("nan")}, "clip_percentile"),
    ],
)
def test_recipes_that_cannot_be_carried_out_are_refused(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key} is"):
        Recipe(**values)


def test_a_geometry_of_another_version_is_refused() -> None:
    image, _, affine = ras_volume()
    stored = prepare_volume(image, affine, None, Recipe(crop=(5, 5))).geometry.to_json()
    with pytest.raises(DataError, match="run prepare again"):
        Geometry.from_json({**stored, "colour": 1})
    del stored["axes"]
    with pytest.raises(DataError, match="run prepare again"):
        Geometry.from_json(stored)


def test_each_step_is_recorded_in_order() -> None:
    image, label, affine = ras_volume()
    recipe = Recipe(spacing_mm=(None, 2.0, 2.0), crop=(6, 5), crop_depth=4, size=(8, 8))
    steps = prepare_volume(image, affine, label, recipe).geometry.steps
    for step, words in zip(
        steps,
        (["RAS", "coronal"], ["kept", "2 mm"], ["6 x 5", "4 slices", "labels"], ["8 x 8"], ["98"], ["mean"]),
        strict=True,
    ):
        assert all(word in step for word in words), step
    assert len(prepare_volume(image, affine, None, Recipe(**WHOLE)).geometry.steps) == 3


def test_scale_is_the_published_map() -> None:
    values = np.array([-1.8, 1.3, 4.4, 7.5], np.float32)
    scaled = scale(values, -1.8, 4.4)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, [-1, 0, 1, 2], atol=1e-6)
    for low, high in ((1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0), (0.0, float("inf"))):
        with pytest.raises(ConfigError, match="intensity range"):
            scale(values, low, high)


def test_the_range_of_a_volume_covers_it_but_not_odd_voxels() -> None:
    volume = np.random.default_rng(0).normal(0, 1, (20, 30, 30)).clip(-2, 2).astype(np.float32)
    low, high = intensity_range(volume)
    assert np.mean(np.abs(scale(volume, low, high)) > 1) < 0.003
    volume[3, 4, 5], volume[6, 7, 8] = 1e4, -1e4
    assert intensity_range(volume) == pytest.approx((low, high), abs=0.05)


def test_preparing_takes_little_more_memory_than_its_result() -> None:
    image = np.random.default_rng(0).random((200, 200, 120), np.float32).transpose(2, 0, 1)
    label = np.zeros(image.shape, np.uint8)
    label[50:60, 90:110, 90:110] = 1
    for recipe in (
        Recipe(crop=(100, 120)),
        Recipe(crop=(100, 100), spacing_mm=(1.0, 1.5, 1.5)),
        Recipe(crop=(120, 100), size=(60, 60)),
    ):
        tracemalloc.start()
        try:
            prepared = prepare_volume(image, np.eye(4), label, recipe)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < max(5 * prepared.image.nbytes, 3 * image.nbytes)
