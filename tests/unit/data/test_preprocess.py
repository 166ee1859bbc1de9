"""Crop, recorded geometry and scaling of a volume."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import numpy as np
import pytest

from mpscl_ray.data.scaling import scale
from mpscl_ray.data.volumes.geometry import Geometry
from mpscl_ray.data.volumes.preprocess import intensity_range, label_centre, label_free_centre, prepare_volume
from mpscl_ray.data.volumes.recipe import Recipe
from mpscl_ray.errors import ConfigError, DataError
from tests.stored_volumes import RECIPES, WHOLE, ball, ras_volume

# --------------------------------------------------------------------------------------------- crop


def test_the_crop_is_centred_on_the_mean_of_the_labels() -> None:
    image = np.random.default_rng(0).normal(size=(40, 50, 6)).astype(np.float32)
    label = np.zeros(image.shape, np.uint8)
    label[10:15, 30:33, 2:5] = 3
    recipe = Recipe(orientation="stored", slice_axis="2", crop=(9, 7), crop_depth=3, centre="labels")
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
    recipe = Recipe(orientation="stored", slice_axis="2", crop=(6, 6), crop_depth=7, centre="labels")
    prepared = prepare_volume(image, affine, label, recipe)
    assert prepared.image.shape == (5, 6, 6)
    assert prepared.geometry.axes[0].start == 3


def test_clipping_uses_the_crop_only() -> None:
    image, _, _ = ras_volume((30, 30, 4))
    label = np.zeros(image.shape, np.uint8)
    label[8:13, 8:13] = 1
    recipe = Recipe(orientation="stored", slice_axis="2", crop=(10, 10), centre="labels", clip_percentile=90)
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
    with pytest.raises(DataError, match="crop of case 3 has one intensity throughout, 0"):
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
        ({"spacing_mm": (0.01, 1.0, 1.0)}, "spacing_mm"),
        ({"spacing_mm": (None, None, 500.0)}, "spacing_mm"),
        ({"clip_percentile": 0.0}, "clip_percentile"),
        ({"clip_percentile": 0.98}, "clip_percentile"),
        ({"clip_percentile": 101.0}, "clip_percentile"),
        ({"clip_percentile": float("nan")}, "clip_percentile"),
    ],
)
def test_recipes_out_of_range_are_refused(values: dict[str, Any], key: str) -> None:
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


def test_the_range_of_a_volume_leaves_out_outliers() -> None:
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
