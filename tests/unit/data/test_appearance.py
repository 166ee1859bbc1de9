"""Another appearance for training slices: mappings of intensities and degradations."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from mpscl_ray.config import AugmentConfig
from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.data.appearance import BANDS, MAPPINGS, _band_centres, change_appearance
from mpscl_ray.data.augment import augment
from mpscl_ray.data.loader import collate
from mpscl_ray.data.sampler import sample_keys

KEYS = sample_keys(0, "source", 0, 64)
SIZE = (37, 53)
EVERYTHING = AugmentConfig(
    rotation_deg=30, random_conv_probability=0.3, mapping_probability=0.8, degradation_probability=0.5
)


def only(name: str) -> AugmentConfig:
    return AugmentConfig(mapping_probability=1, mappings=(name,))  # type: ignore[arg-type]


def scenes(count: int, noise: float = 0.03) -> tuple[Tensor, Tensor]:
    """A dark ground with a bright strip, a ventricle of 0.6 in a wall of -0.1, and an atrium about as bright as it."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    distance = np.hypot(rows - 18, columns - 22)
    label = np.zeros(SIZE, np.uint8)
    label[distance < 14] = 2
    label[distance < 9] = 1
    label[5:12, 40:50] = 3
    levels = np.array([-0.7, 0.6, -0.1, 0.7])
    image = levels[label]
    image[30:] = 0.3
    image = image + np.random.default_rng(0).normal(0, noise, (count, *SIZE))
    label[30:] = 0
    return torch.from_numpy(image.astype(np.float32))[:, None], torch.from_numpy(label).repeat(count, 1, 1)


def levels(image: Tensor, label: Tensor) -> np.ndarray:
    """(B, 4) means of each class, its outermost pixels left out, where classes are blended."""
    inner = torch.stack([torch.roll(label, shift, (1, 2)) for shift in itertools.product((-2, 0, 2), repeat=2)])
    inside = (inner == label).all(dim=0)
    return np.array(
        [[float(x[0][(y == k) & m].mean()) for k in range(4)] for x, y, m in zip(image, label, inside, strict=True)]
    )


def test_the_defaults_change_nothing() -> None:
    image, label = scenes(2)
    assert change_appearance(image, label, KEYS[:2], AugmentConfig()) is image


def test_a_sample_depends_on_its_key_alone_for_any_division_of_the_batch() -> None:
    """Bit for bit, image and label; the labels as the files have them and as an integer tensor."""
    image, label = scenes(9)
    together = augment(image, label, KEYS[:9], EVERYTHING)
    for parts in ([range(4), range(4, 9)], [[i] for i in range(9)], [[8, 2], [5]]):
        for part in map(list, parts):
            alone = augment(image[part], label[part].long(), KEYS[part], EVERYTHING)
            assert torch.equal(alone[0], together[0][part])
    assert not torch.equal(augment(image, label, KEYS[9:18], EVERYTHING)[0], together[0])


@pytest.mark.parametrize("name", [*MAPPINGS, "degradations"])
def test_the_number_of_threads_changes_no_bit(name: str) -> None:
    image, label = scenes(6)
    image, label = image.repeat(1, 1, 4, 4), label.repeat(1, 4, 4)
    config = AugmentConfig(degradation_probability=1) if name == "degradations" else only(name)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            results.append(change_appearance(image, label, KEYS[:6], config))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("labelled", [True, False])
def test_inputs_are_left_alone_and_results_are_finite_single_precision(labelled: bool) -> None:
    image, label = scenes(64)
    kept = image.clone(), label.clone()
    for config in (*map(only, MAPPINGS), AugmentConfig(degradation_probability=1)):
        changed = change_appearance(image, label if labelled else None, KEYS, config)
        assert changed.dtype == torch.float32
        assert changed.shape == image.shape
        assert torch.isfinite(changed).all()
        assert all(not torch.equal(one, other) for one, other in zip(changed, image, strict=True))
    assert torch.equal(image, kept[0])
    assert torch.equal(label, kept[1])


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("config", [only("curves"), only("bands"), AugmentConfig(degradation_probability=1)])
def test_mean_and_deviation_are_kept(config: AugmentConfig, labelled: bool) -> None:
    image, label = scenes(32)
    changed = change_appearance(image, label if labelled else None, KEYS[:32], config).double()
    torch.testing.assert_close(changed.mean((1, 2, 3)), image.double().mean((1, 2, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(changed.std((1, 2, 3)), image.double().std((1, 2, 3)), atol=1e-5, rtol=1e-5)


def test_gin_keeps_the_frobenius_norm() -> None:
    image, _ = scenes(32)
    changed = change_appearance(image, None, KEYS[:32], only("gin")).double()
    torch.testing.assert_close(changed.flatten(1).norm(dim=1), image.double().flatten(1).norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["curves", "bands"])
def test_tissues_change_their_order_of_brightness(name: str) -> None:
    """The wall gets as often brighter as darker than the ventricle; the atrium stays as bright as this."""
    image, label = scenes(64)
    means = levels(change_appearance(image, label, KEYS, only(name)), label)
    assert 16 < (means[:, 2] > means[:, 1]).sum() < 48
    scale = np.ptp(means, axis=1)
    assert np.median(np.abs(means[:, 1] - means[:, 3]) / scale) < 0.15, "classes that look alike stay alike"
    assert np.median(np.abs(means[:, 1] - means[:, 2]) / scale) > 0.25
    ratios = np.abs(means[:, 1] - means[:, 2]) / np.abs(means[:, 1] - means[:, 3])
    assert np.quantile(ratios, 0.75) > 3 * np.quantile(ratios, 0.25), "each tissue has a line of its own"


def test_edges_stay_where_they_are() -> None:
    """Mapped by curves, the steepest places of the image are at the outlines of the structures or the strip."""
    image, label = scenes(16, noise=0)
    changed = change_appearance(image, label, KEYS[:16], only("curves"))[:, 0]
    regions = label.long() + 4 * (image[:, 0] == 0.3)
    steep = (changed[:, :, 1:] - changed[:, :, :-1]).abs() > 0.2
    border = regions[:, :, 1:] != regions[:, :, :-1]
    near = torch.nn.functional.max_pool2d(border[:, None].float(), 3, 1, 1)[:, 0] > 0
    assert not (steep & ~near).any()
    assert (steep & border).sum() > 0.3 * border.sum()


def test_bands_give_parts_of_the_background_levels_of_their_own() -> None:
    """Ground and strip, 0.9 and 1 apart, also change their order; either is at times as bright as a tissue."""
    image, label = scenes(64)
    changed = change_appearance(image, label, KEYS, only("bands"))[:, 0].numpy()
    ground, strip = changed[:, 2:5, 2:30].mean((1, 2)), changed[:, 32:35, 3:].mean((1, 2))
    assert 12 < (ground > strip).sum() < 52
    means = levels(torch.from_numpy(changed)[:, None], label)
    alike = np.minimum(np.abs(strip - means[:, 2]), np.abs(strip - means[:, 1])) < 0.1
    assert alike.sum() > 12


def test_pixels_that_nobody_annotated_are_mapped_as_background() -> None:
    image, label = scenes(8)
    hidden = torch.where(label == 0, NOT_ANNOTATED, label)
    for name in ("curves", "bands"):
        assert torch.equal(*(change_appearance(image, y, KEYS[:8], only(name)) for y in (label, hidden)))


@pytest.mark.parametrize("config", [*map(only, MAPPINGS), AugmentConfig(degradation_probability=1)])
def test_slices_of_one_intensity_or_one_class_stay_finite(config: AugmentConfig) -> None:
    flat = torch.full((4, 1, 16, 16), -1.0)
    assert torch.isfinite(change_appearance(flat, torch.zeros(4, 16, 16, dtype=torch.uint8), KEYS[:4], config)).all()
    image, _ = scenes(4)
    everywhere = torch.ones(4, *SIZE, dtype=torch.uint8)
    assert torch.isfinite(change_appearance(image, everywhere, KEYS[:4], config)).all()


def test_each_mapping_is_drawn_as_often() -> None:
    """A sample equals one of the single mappings, whose draws are the same; with probability 0.8 there is one."""
    keys = sample_keys(1, "source", 0, 300)
    image = scenes(1)[0][:, :, ::2, ::2].expand(300, -1, -1, -1).contiguous()
    mapped = change_appearance(image, None, keys, AugmentConfig(mapping_probability=0.8, mappings=("curves", "gin")))
    changed = (mapped != image).flatten(1).any(dim=1)
    assert 0.72 < changed.float().mean() < 0.88
    norm = mapped.double().flatten(1).norm(dim=1) - image.double().flatten(1).norm(dim=1)
    mean = mapped.double().mean((1, 2, 3)) - image.double().mean((1, 2, 3))
    assert ((norm.abs() < 1e-4) | (mean.abs() < 1e-5)).all()
    assert 0.4 < (mean.abs() > 1e-5)[changed].float().mean() < 0.6, "the mean is changed by GIN alone"


def test_a_second_view_is_the_same_place_in_another_appearance() -> None:
    """A bright mark is, in each view, where it is in the image, which keeps its own intensities."""
    rows, columns = np.mgrid[:64, :64]
    mark = np.hypot(rows - 20, columns - 40) < 8
    image = np.where(mark, 0.8, -0.5).astype(np.float32)[None].repeat(8, 0)
    moved = AugmentConfig(rotation_deg=40, translation=0.1)
    plain = collate({"image": image.copy()}, KEYS[:8], moved)
    batch = collate({"image": image.copy()}, KEYS[:8], moved, view=only("curves"))
    assert torch.equal(plain["image"], batch["image"])
    remapped = dataclasses.replace(moved, mapping_probability=1.0, random_conv_probability=1.0)
    changed = collate({"image": image.copy()}, KEYS[:8], remapped, original=True)
    assert torch.equal(changed["original"], plain["image"])
    assert not torch.equal(changed["original"], changed["image"])
    for seen, view in zip(batch["image"][:, 0], batch["view"][:, 0], strict=True):
        inside, outside = view[seen > 0.79], view[seen < -0.49]
        assert inside.std() < 0.05
        assert outside.std() < 0.05
        assert (seen[seen > 0.79].mean() - inside.mean()).abs() + (inside.mean() - outside.mean()).abs() > 0.1
    pairs = list(zip(batch["image"], batch["view"], strict=True))
    assert any(view[seen > 0.79].mean() < view[seen < -0.49].mean() for seen, view in pairs)


def test_the_number_of_bands_is_in_its_range() -> None:
    values = np.random.default_rng(0).uniform(-1, 1, 5000).astype(np.float32)
    centres = [_band_centres(values, np.random.default_rng(seed)) for seed in range(60)]
    assert {len(each) for each in centres} == set(range(BANDS[0], BANDS[1] + 1))
    assert all((np.diff(each) >= 0).all() for each in centres)
    clusters = np.repeat([-0.8, 0.0, 0.9], 1000).astype(np.float32)
    found = [_band_centres(clusters, np.random.default_rng(seed)) for seed in range(20)]
    assert sum({-0.8, 0.0, 0.9} == {round(float(c), 1) for c in each} for each in found) > 10


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"mappings": []}, "at least 1 item"),
        ({"mappings": ["curve"]}, "'curves', 'bands' or 'gin'"),
        ({"mapping_probability": 1.5}, "less than or equal to 1"),
        ({"degradation_probability": -0.1}, "greater than or equal to 0"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        TypeAdapter(AugmentConfig).validate_python(values)
