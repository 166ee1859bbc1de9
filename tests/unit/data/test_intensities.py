"""Intensities that look right and are not: they are refused or said, and those of real scans are not."""

from __future__ import annotations

import re

import numpy as np
import pytest
from numpy.typing import NDArray

from mpscl_ray.data.phantom.case import make_case
from mpscl_ray.data.volumes.intensities import other_modality, unusual_intensities
from tests.heart_scans import scan

LARGE = (60, 60, 20)


def heart(kind: str) -> NDArray[np.float32]:
    return scan(0, kind, LARGE)[0].astype(np.float32)


@pytest.mark.parametrize("offset", [1000, 1024])
def test_a_ct_that_lost_its_offset(offset: int) -> None:
    """With 1000, noise takes the air below 0, down to where fat is in Hounsfield units."""
    noise = np.random.default_rng(0).normal(0, 10, LARGE).astype(np.float32)
    image = heart("ct") + noise + offset
    assert (np.percentile(image, 0.1) < -20) == (offset == 1000)
    assert "offset of -1024 was lost" in str(other_modality(image, "ct"))
    assert other_modality(image - offset, "ct") is None


@pytest.mark.parametrize("padding", [None, -3.024])
def test_a_ct_in_thousandths(padding: float | None) -> None:
    image = heart("ct") / 1000
    if padding is not None:
        image[:4] = padding
    assert "a CT that was divided by 1000" in str(other_modality(image, "ct"))
    low, high = image.min(), image.max()
    assert other_modality(2 * (image - low) / (high - low) - 1, "ct") is None
    assert other_modality((image - image.mean()) / image.std(), "ct") is None


def test_an_image_whose_sign_was_changed() -> None:
    assert "no intensity is above 0" in str(other_modality(-heart("mr"), "mr"))
    assert "no intensity is above 0" in str(other_modality(-heart("mr"), "heart"))
    assert "so that air is brightest" in str(other_modality(-heart("ct"), "ct"))
    assert other_modality(np.zeros(LARGE, np.float32), "mr") is None


@pytest.mark.parametrize("number", [1002, 1007])
def test_the_same_of_a_chest_with_fat_and_lung(number: int) -> None:
    image = make_case("ct", number, 7).image.astype(np.float32)
    assert other_modality(image, "ct") is None
    for changed, said in ((image + 1000, "was lost"), (image / 1000, "by 1000"), (-image, "air is brightest")):
        assert said in str(other_modality(changed, "ct"))


@pytest.mark.parametrize("padding", [0, 3071, 200])
def test_padding_of_a_ct_that_is_not_air(padding: float) -> None:
    image = heart("ct")
    x, y = np.ogrid[:60, :60]
    image[(x - 29.5) ** 2 + (y - 29.5) ** 2 > 29**2] = padding
    assert other_modality(image, "ct") is None
    (notice,) = unusual_intensities(image, "ct")
    assert f"have the intensity {padding:g}, as padding has" in notice
    assert re.search(r"\d\d(\.\d)? % of the border and 2\d(\.\d)? % of all voxels", notice)


@pytest.mark.parametrize("padding", [-1024, -1000])
def test_padding_of_a_ct_with_air(padding: float) -> None:
    image = heart("ct")
    image[:10] = padding
    assert unusual_intensities(image, "ct") == []


def test_a_ct_cut_to_a_window() -> None:
    (notice,) = unusual_intensities(np.clip(heart("ct"), -160, 240), "ct")
    assert "intensities were cut to -160 to 240, as by a window" in notice
    assert unusual_intensities(np.clip(heart("ct"), -1024, 240), "ct") == []
    assert unusual_intensities(heart("ct")[20:40, 20:40], "ct") == []  # no air in it


def test_a_ct_in_another_unit() -> None:
    """Stored values times a slope that was lost; attenuation by cm."""
    image = heart("ct")
    assert "or a CT in another unit" in str(other_modality(4 * (image + 1024), "ct"))
    noisy = 4 * (image + 1012)
    assert np.percentile(noisy, 0.1) < -20
    assert "or a CT in another unit" in str(other_modality(noisy, "ct"))
    attenuation = np.clip(1.93 * (1 + image / 1000), 0, None)
    assert "no Hounsfield units" in unusual_intensities(attenuation, "ct")[0]
    assert unusual_intensities(heart("ct"), "ct") == []


def test_an_mr_whose_black_and_white_were_exchanged() -> None:
    image = heart("mr")
    for modality in ("mr", "heart"):
        assert unusual_intensities(image, modality) == []
        assert "black and white were exchanged" in unusual_intensities(image.max() - image, modality)[0]
    assert unusual_intensities(image[20:40, 20:40], "mr") == []  # no air in it
