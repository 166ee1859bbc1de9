"""Random changes of training slices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.data.augment import AugmentConfig, augment
from mpscl_ray.data.sampler import sample_keys

KEYS = sample_keys(0, "source", 0, 64)
MAPPING = AugmentConfig(random_conv_probability=1)
EVERYTHING = AugmentConfig(rotation_deg=30, scale=(0.7, 1.4), translation=0.2, random_conv_probability=0.5)


def slices(count: int, size: tuple[int, int] = (37, 53), seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, *size, generator=generator), torch.randint(
        0, 5, (count, *size), generator=generator, dtype=torch.uint8
    )


def blob(size: tuple[int, int], row: float, column: float, radius: float) -> torch.Tensor:
    rows, columns = torch.arange(size[0])[:, None], torch.arange(size[1])[None, :]
    return (((rows - row) ** 2 + (columns - column) ** 2) < radius**2).to(torch.uint8)[None]


def centre(label: torch.Tensor) -> tuple[float, float]:
    rows, columns = torch.nonzero(label[0], as_tuple=True)
    return float(rows.double().mean()), float(columns.double().mean())


def test_the_defaults_change_nothing() -> None:
    image, label = slices(3)
    changed = augment(image, label, KEYS[:3], AugmentConfig())
    assert changed[0] is image
    assert changed[1] is label


def test_a_sample_does_not_depend_on_its_batch() -> None:
    """Bit for bit, for sizes that are no multiple of a vector register."""
    image, label = slices(9)
    together = augment(image, label, KEYS[:9], EVERYTHING)
    for i in range(9):
        alone = augment(image[i : i + 1], label[i : i + 1], KEYS[i : i + 1], EVERYTHING)
        assert torch.equal(alone[0][0], together[0][i])
        assert torch.equal(alone[1][0], together[1][i])
    order = np.array([4, 0, 7])
    some = augment(image[order], label[order], KEYS[order], EVERYTHING)
    assert torch.equal(some[0], together[0][order])
    assert torch.equal(some[1], together[1][order])


def test_the_key_decides_and_the_input_is_left_alone() -> None:
    image, label = slices(1)
    kept = image.clone(), label.clone()
    first, again, other = (augment(image, label, KEYS[[k]], EVERYTHING) for k in (0, 0, 1))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(image, kept[0])
    assert torch.equal(label, kept[1])


def test_image_and_label_move_together() -> None:
    """An image that equals its label stays equal to it, up to interpolation at the outline."""
    label = blob((64, 96), 30, 50, 14).repeat(16, 1, 1)
    config = AugmentConfig(rotation_deg=90, scale=(0.6, 1.6), translation=0.2)
    image, moved = augment(label[:, None].float(), label, KEYS[:16], config)
    assert moved.dtype == torch.uint8
    # The nearest of four pixels has at least a quarter of the weight.
    assert image[:, 0][moved == 1].min() >= 0.25 - 1e-3
    assert image[:, 0][moved == 0].max() <= 0.75 + 1e-3
    assert len({int(area) for area in moved.sum(dim=(1, 2))}) > 8


def test_translation_shifts_by_at_most_its_fraction_of_each_side() -> None:
    size = (80, 120)
    label = blob(size, 40, 60, 8)
    shifts = []
    for key in KEYS:
        _, moved = augment(label[:, None].float(), label, np.array([key]), AugmentConfig(translation=0.25))
        row, column = centre(moved)
        shifts.append(((row - 40) / size[0], (column - 60) / size[1]))
    span = np.abs(shifts).max(axis=0)
    assert (span <= 0.25 + 0.01).all()
    assert (span > 0.2).all()
    assert np.abs(np.mean(shifts, axis=0)).max() < 0.06


def test_scale_is_the_magnification() -> None:
    label = blob((96, 96), 47.5, 47.5, 16)
    scales = []
    for key in KEYS:
        _, moved = augment(label[:, None].float(), label, np.array([key]), AugmentConfig(scale=(0.5, 2)))
        scales.append(float(moved.sum() / label.sum()) ** 0.5)
    assert min(scales) == pytest.approx(0.5, abs=0.06)
    assert max(scales) == pytest.approx(2.0, abs=0.15)
    assert np.median(scales) == pytest.approx(1.0, abs=0.25)


def test_rotation_turns_about_the_centre_of_any_slice() -> None:
    size = (81, 121)
    label = blob(size, 40, 80, 6)
    angles = []
    for key in KEYS:
        _, moved = augment(label[:, None].float(), label, np.array([key]), AugmentConfig(rotation_deg=60))
        row, column = centre(moved)
        assert np.hypot(row - 40, column - 60) == pytest.approx(20, abs=0.7)
        angles.append(np.degrees(np.arctan2(row - 40, column - 60)))
    assert np.abs(angles).max() <= 61
    assert max(angles) > 45
    assert min(angles) < -45


def test_labels_keep_their_values_and_edges_repeat() -> None:
    label = torch.full((8, 40, 40), NOT_ANNOTATED, dtype=torch.uint8)
    image, moved = augment(torch.full((8, 1, 40, 40), 0.25), label, KEYS[:8], AugmentConfig(45, (0.5, 2), 0.5))
    assert torch.equal(moved, label)
    torch.testing.assert_close(image, torch.full_like(image, 0.25))


def test_intensity_mapping_keeps_mean_and_deviation_and_the_label() -> None:
    image, label = slices(32, (40, 40))
    image = image * torch.linspace(0.1, 2, 32)[:, None, None, None] - 0.7
    mapped, same = augment(image, label, KEYS[:32], MAPPING)
    assert same is label
    assert mapped.isfinite().all()
    torch.testing.assert_close(mapped.mean(dim=(1, 2, 3)), image.mean(dim=(1, 2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mapped.std(dim=(1, 2, 3)), image.std(dim=(1, 2, 3)), atol=1e-5, rtol=1e-4)
    assert ((mapped - image).abs().amax(dim=(1, 2, 3)) > 1e-3).all()


def test_intensity_mapping_reorders_tissues() -> None:
    """Four tissues in four quadrants: among 64 mappings their order of brightness takes many forms."""
    image = torch.tensor([[-1.0, -0.3], [0.3, 1.0]]).repeat_interleave(16, 0).repeat_interleave(16, 1)
    mapped, _ = augment(image.expand(64, 1, 32, 32), None, KEYS, MAPPING)
    tissues = mapped.reshape(64, 2, 16, 2, 16)[:, :, 4:12, :, 4:12].mean(dim=(2, 4)).reshape(64, 4)
    orders = {tuple(order.tolist()) for order in tissues.argsort(dim=1)}
    assert (0, 1, 2, 3) in orders
    assert len(orders) >= 8


def test_intensity_mapping_happens_with_its_probability() -> None:
    image, _ = slices(1, (16, 16))
    keys = sample_keys(1, "source", 0, 600)
    mapped, _ = augment(image.expand(600, 1, 16, 16), None, keys, AugmentConfig(random_conv_probability=0.3))
    changed = (mapped != image).flatten(1).any(dim=1)
    assert 0.22 < changed.double().mean() < 0.38


def test_weak_mapping_stays_close_to_the_image() -> None:
    image, _ = slices(16)
    weak, _ = augment(image, None, KEYS[:16], AugmentConfig(random_conv_probability=1, random_conv_strength=0.02))
    assert (weak - image).abs().max() < 0.2


def test_image_of_one_intensity_is_not_blown_up() -> None:
    image = torch.full((8, 1, 24, 24), -0.731)
    mapped, _ = augment(image, None, KEYS[:8], MAPPING)
    assert torch.equal(mapped, image)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rotation_deg", -1),
        ("rotation_deg", 181),
        ("scale", (0, 1)),
        ("scale", (1.2, 0.8)),
        ("translation", 0.6),
        ("random_conv_probability", 1.5),
        ("random_conv_strength", -0.1),
        ("random_conv_layers", 4),
        ("rotation_deg", float("nan")),
    ],
)
def test_settings_out_of_range_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field if field != "scale" else "scale|largest"):
        TypeAdapter(AugmentConfig).validate_python({field: value})
