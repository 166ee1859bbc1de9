"""What the training volumes were like is kept as ranges, and volumes far from them are said with numbers."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from mpscl_ray.data.dataset import load_manifest
from mpscl_ray.data.training_range import FACTOR, TrainingRange
from mpscl_ray.data.volumes.geometry import Geometry
from mpscl_ray.data.volumes.preprocess import prepare_volume
from mpscl_ray.data.volumes.recipe import Recipe
from mpscl_ray.prepare.options import PrepareOptions
from mpscl_ray.prepare.run import prepare

RECIPE = Recipe(crop=(20, 20), clip_percentile=100)
SIZES = (1.0, 1.2, 4.0)


def heart(seed: int) -> np.ndarray:
    """A bright ball in dark surroundings, coarse noise."""
    random = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*map(np.arange, (30, 28, 20)), indexing="ij"), -1)
    ball = np.linalg.norm((grid - (15, 14, 10)) / (1, 1, 0.7), axis=-1) < 7 + random.normal(0, 0.3)
    return (100 + 200 * ball + random.normal(0, 20, ball.shape)).astype(np.float32)


def geometry(image: np.ndarray, sizes: tuple[float, ...] = SIZES) -> Geometry:
    return prepare_volume(image, np.diag([*sizes, 1.0]), None, RECIPE).geometry


@pytest.fixture(scope="module")
def trained_on(tmp_path_factory: pytest.TempPathFactory) -> TrainingRange:
    folder = tmp_path_factory.mktemp("range")
    for number in range(6):
        scan = nib.Nifti1Image(heart(number), np.diag([1.0, 1.2, 4.0 + number % 2, 1.0]))
        scan.header.set_xyzt_units("mm")
        nib.save(scan, folder / f"p{number}.nii.gz")
    (folder / "split.json").write_text(json.dumps({"train": [f"p{n}" for n in range(5)], "val": ["p5"]}))
    options = PrepareOptions(
        folder,
        folder / "out",
        "folder",
        modality="mr",
        image_pattern="{case}.nii.gz",
        split=str(folder / "split.json"),
        recipe=RECIPE,
        unlabelled=("train", "val"),
        workers=0,
    )
    prepare(options, progress=False)
    found = TrainingRange.of(load_manifest(folder / "out" / "mr"))
    assert found is not None
    return TrainingRange.from_json(json.loads(json.dumps(found.to_json())))


def test_the_ranges_are_those_of_the_training_split(trained_on: TrainingRange) -> None:
    assert trained_on.cases == 5
    rows, slices = (1.2, 28 * 1.2), (1.0, 30.0)
    low, high = zip(*trained_on.ranges["voxel_mm"], strict=True)
    assert low == pytest.approx((rows[0], 4.0, slices[0]))
    assert high == pytest.approx((rows[0], 5.0, slices[0]))
    assert trained_on.ranges["extent_mm"][0] == pytest.approx((rows[1], rows[1]))
    assert len(trained_on.ranges["percentiles"]) == 5


def test_a_volume_like_those_of_training_is_not_said(trained_on: TrainingRange) -> None:
    for seed in range(20, 30):
        for image in (heart(seed), 0.01 * heart(seed)):  # units of MR are arbitrary
            assert trained_on.unusual(geometry(image), hounsfield=False) == []


@pytest.mark.parametrize(
    ("change", "sizes", "said"),
    [
        (lambda image: image, (1.0, 1.2, 40.0), "voxels are 1.2 x 40 x 1 mm .*had 1.2 x 4 to 5 x 1$"),
        (lambda image: image[:, :, 7:13], SIZES, "extends over 33.6 x 24 x 30 mm .*had 33.6 x 80 to 100 x 30$"),
        (lambda image: 400 - image, SIZES, r"percentiles 5, 25, 50, 75, 95 of the normalised crop are -\d"),
        (lambda image: image + 1024, SIZES, r"intensity 0 lies at -\d.* standard deviations .*had -1.98 to -1.85$"),
    ],
)
def test_a_volume_unlike_those_of_training_is_said_with_the_numbers(
    trained_on: TrainingRange, change: object, sizes: tuple[float, ...], said: str
) -> None:
    warnings = trained_on.unusual(geometry(change(heart(40)), sizes), hounsfield=False)  # type: ignore[operator]
    assert any(re.search(said, warning) for warning in warnings), warnings


def test_hounsfield_units_are_compared_as_they_are(trained_on: TrainingRange) -> None:
    usual = geometry(heart(50))
    assert trained_on.unusual(usual, hounsfield=True) == []
    (said,) = trained_on.unusual(replace(usual, mean=usual.mean + 1024), hounsfield=True)
    assert "the crop has the mean 11" in said
    wide = replace(usual, standard_deviation=usual.standard_deviation * FACTOR**2)
    (said,) = trained_on.unusual(wide, hounsfield=True)
    assert "standard deviation" in said


def test_what_a_dataset_does_not_have_is_not_compared(trained_on: TrainingRange) -> None:
    older = TrainingRange(5, {name: pairs for name, pairs in trained_on.ranges.items() if name != "percentiles"})
    odd = replace(geometry(heart(40)), percentiles=(-3.0, -2.0, -1.0, 0.0, 1.0))
    (said,) = trained_on.unusual(odd, hounsfield=False)
    assert "unusual distribution" in said
    assert older.unusual(odd, hounsfield=False) == []
