"""Class-wise histogram matching against NumPy's quantiles, and in the mean teacher."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.errors import DataError
from mpscl_ray.methods import Batch, MeanTeacher
from mpscl_ray.methods.histograms import LEAST_PIXELS, QUANTILES, class_quantiles, match_histograms
from mpscl_ray.methods.pseudo_labels import align, confident_labels
from tests.tiny_methods import CLASSES, batch, make
from tests.unit.methods.test_mean_teacher import some_slices

STEPS = np.linspace(0, 1, QUANTILES)


def slices(generator: torch.Generator, number: int = 3) -> tuple[Tensor, Tensor]:
    """Noise, with labels of which class 2 has too few pixels in the first slice and none in the second."""
    labels = torch.randint(0, CLASSES, (number, 12, 10), generator=generator)
    labels[0][labels[0] == 2] = 0
    labels[0, 0, : LEAST_PIXELS - 7] = 2
    labels[1][labels[1] == 2] = NOT_ANNOTATED
    images = torch.randn(number, 1, 12, 10, generator=generator)
    return images + labels[:, None].clamp(max=3), labels


def test_quantiles_are_those_of_numpy(generator: torch.Generator) -> None:
    images, labels = slices(generator)
    ours = class_quantiles(images, labels, CLASSES)
    assert ours.shape == (3, CLASSES, QUANTILES)
    for k in range(CLASSES):
        for image, label, quantiles in zip(images[:, 0], labels, ours[:, k], strict=True):
            inside = image[label == k]
            if len(inside) < LEAST_PIXELS:
                assert quantiles.isnan().all()
            else:
                torch.testing.assert_close(quantiles, torch.from_numpy(np.quantile(inside, STEPS)).float())
    assert ours[:2, 2].isnan().all()
    assert not ours[2].isnan().any()


def test_a_class_gets_the_quantiles_of_the_other_slice_in_its_own_order(generator: torch.Generator) -> None:
    images, labels = slices(generator)
    other, other_labels = 3 - 2 * images.flip(0), labels.flip(0)
    wanted = class_quantiles(other, other_labels, CLASSES)
    matched = match_histograms(images, labels, wanted)
    found = class_quantiles(images, labels, CLASSES)
    for i, k in np.ndindex(3, CLASSES):
        inside = labels[i] == k
        before, after = images[i, 0][inside], matched[i, 0][inside]
        if found[i, k].isnan().any() or wanted[i, k].isnan().any():
            assert torch.equal(after, before), "a class that is not known keeps its intensities"
            continue
        assert torch.equal(after[before.argsort()], after.sort().values)
        expected = np.interp(before.numpy(), found[i, k].numpy(), wanted[i, k].numpy())
        torch.testing.assert_close(after, torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-5)
    outside = labels == NOT_ANNOTATED
    assert outside.any()
    assert torch.equal(matched[:, 0][outside], images[:, 0][outside])
    torch.testing.assert_close(match_histograms(images, labels, found), images)


def test_a_class_of_one_intensity_stays_finite() -> None:
    images, labels = torch.full((1, 1, 8, 8), 0.25), torch.zeros(1, 8, 8, dtype=torch.int64)
    wanted = torch.linspace(-1, 1, QUANTILES).expand(1, 1, QUANTILES)
    matched = match_histograms(images, labels, wanted)
    assert matched.unique().numel() == 1
    assert float(matched.abs().max()) <= 1


def teacher(**settings: float) -> MeanTeacher:
    method: MeanTeacher = make("mean_teacher", histogram_matching=settings.pop("histogram_matching", 1.0), **settings)
    method.start_phase(10)
    return method


def with_original(step: int) -> Batch:
    """The source slices, as they are trained on, have random intensities."""
    part = batch(step)
    noise = torch.rand(part.source_image.shape, generator=torch.Generator().manual_seed(step))
    return dataclasses.replace(part, source_image=noise, source_original=part.source_image)


def test_source_slices_take_the_histograms_of_the_target_slices_beside_them() -> None:
    method, part = teacher(), with_original(0)
    assert method.original_source
    assert part.target_image is not None
    histograms = class_quantiles(part.target_image, part.source_label, CLASSES)
    matched = method._matched(part, histograms, 0)
    assert part.source_original is not None
    assert torch.equal(matched, match_histograms(part.source_original, part.source_label, histograms))
    half = teacher(histogram_matching=0.5)
    chosen = [(half._matched(part, histograms, n) == matched).flatten(1).all(dim=1).tolist() for n in range(20)]
    assert 0.3 < np.mean(chosen) < 0.7
    assert all(any(row[image] for row in chosen) for image in range(4))
    for iteration, row in enumerate(chosen):
        mixed = half._matched(part, histograms, iteration)
        assert torch.equal(mixed[~torch.tensor(row)], part.source_image[~torch.tensor(row)])


def test_a_class_that_the_target_slice_lacks_takes_the_mean_histogram() -> None:
    method, part = teacher(), with_original(0)
    lacking = torch.full((4, CLASSES, QUANTILES), torch.nan)
    method.histograms[:] = torch.arange(CLASSES)[:, None] + torch.linspace(0, 0.5, QUANTILES)
    matched = method._matched(part, lacking, 0)
    assert torch.equal(matched.floor(), part.source_label[:, None].float())


def test_mean_histograms_start_from_all_slices_of_the_target() -> None:
    """Those of the source for a class that the target does not show."""
    method = teacher()
    method.prepare(some_slices())
    (_, target), *_ = some_slices().unlabelled()
    labels = confident_labels(
        align(method.predict(target), method.source_shares, method.target_shares, 1.0), method.thresholds
    )
    of_target = class_quantiles(target, labels, CLASSES).nanmean(dim=0)
    of_source = torch.cat([class_quantiles(*part, CLASSES) for part in some_slices().labelled()]).nanmean(dim=0)
    assert 0 < of_target.isnan().any(dim=1).sum() < CLASSES
    torch.testing.assert_close(method.histograms, torch.where(of_target.isnan(), of_source, of_target))


def test_the_student_learns_from_matched_slices_and_the_histograms_follow_the_target() -> None:
    method, part = teacher(), with_original(1)
    assert part.target_image is not None
    aligned = align(method.predict(part.target_image), method.source_shares, method.target_shares, 1.0)
    found = class_quantiles(part.target_image, confident_labels(aligned, method.thresholds), CLASSES)
    expected = float(method.step(dataclasses.replace(part, source_image=part.source_original), 0)["loss_segmentation"])
    means = found.nanmean(dim=0)
    assert means.isfinite().any()
    torch.testing.assert_close(method.histograms, 0.1 * means.nan_to_num())
    again = teacher()
    assert float(again.step(part, 0)["loss_segmentation"]) == expected, "random intensities are not seen"
    plain = teacher(histogram_matching=0.0)
    assert not plain.original_source
    assert not math.isclose(float(plain.step(part, 0)["loss_segmentation"]), expected, rel_tol=1e-3)
    assert not plain.histograms.any(), "nothing is computed unless it is asked for"


def test_a_checkpoint_without_histograms_is_refused_where_they_are_needed() -> None:
    state = teacher(histogram_matching=0.0).state_dict()
    with pytest.raises(
        DataError, match=r"no histograms, which method\.histogram_matching=1 needs; resume with method\."
    ):
        teacher().load_state_dict(state)
