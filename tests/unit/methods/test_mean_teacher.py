"""The mean teacher: its labels against plain loops, the moving average, and what is pasted and corrected."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.methods import Batch, MeanTeacher
from mpscl_ray.methods.base import TrainingSlices
from mpscl_ray.methods.mean_teacher import align, class_sums, confident_labels
from tests.tiny_methods import CLASSES, SIZE, assert_equal_states, batch, make


def probabilities(generator: torch.Generator, number: int = 2) -> Tensor:
    return (2 * torch.randn(number, CLASSES, 5, 4, generator=generator)).softmax(dim=1)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_alignment_multiplies_by_the_quotient_of_the_shares(generator: torch.Generator, exponent: float) -> None:
    p, r, q = probabilities(generator), torch.tensor([0.7, 0.3, 0.0]), torch.tensor([0.5, 0.2, 0.3])
    ours = align(p, r, q, exponent)
    for image, row, column in np.ndindex(2, 5, 4):
        weighted = [float(p[image, k, row, column]) * float(r[k] / q[k]) ** exponent for k in range(CLASSES)]
        expected = [value / sum(weighted) for value in weighted]
        assert ours[image, :, row, column].tolist() == pytest.approx(expected, rel=1e-5)


def test_a_pixel_is_labelled_where_its_confidence_reaches_that_of_its_class(generator: torch.Generator) -> None:
    p, thresholds = probabilities(generator), [0.9, 0.5, 0.7]
    labels = confident_labels(p, torch.tensor(thresholds, dtype=torch.float64))
    posterior, confidence, number = class_sums(p)
    loops = np.zeros((3, CLASSES))
    for image, row, column in np.ndindex(2, 5, 4):
        pixel = p[image, :, row, column].tolist()
        best = int(np.argmax(pixel))
        assert labels[image, row, column] == (best if pixel[best] >= thresholds[best] else NOT_ANNOTATED)
        loops += [pixel, [pixel[best] * (k == best) for k in range(CLASSES)], np.arange(CLASSES) == best]
    assert set(labels.unique().tolist()) == {0, 1, 2, NOT_ANNOTATED}
    for ours, expected in zip((posterior, confidence, number), loops, strict=True):
        assert ours.tolist() == pytest.approx(expected)


def some_slices() -> TrainingSlices:
    labelled, target = [batch(3), batch(4, 2)], batch(5)
    assert target.target_image is not None
    return TrainingSlices(
        labelled=lambda: [(part.source_image, part.source_label) for part in labelled],
        synchronised_source_batches=list,
        unlabelled=lambda: [(torch.arange(4), target.target_image)],
        target_volumes=(range(4),),
        size=(SIZE, SIZE),
        source_only_weights=dict,
    )


def prepared(**settings: float) -> MeanTeacher:
    method: MeanTeacher = make("mean_teacher")
    method.start_phase(10)
    for step in range(3):  # A teacher that says something.
        method.step(batch(step), 0)
    method.config = dataclasses.replace(method.config, **settings)
    method.start_phase(10)
    method.prepare(some_slices())
    return method


def test_a_phase_starts_from_the_teacher_and_the_class_shares_of_all_slices() -> None:
    method = prepared()
    assert_equal_states(method.segmenter.state_dict(), method.teacher.state_dict())
    labels = torch.cat([label.flatten() for _, label in some_slices().labelled()])
    shares = torch.bincount(labels, minlength=CLASSES) / len(labels)
    torch.testing.assert_close(method.source_shares, shares.double(), rtol=1e-6, atol=0)
    predicted = method.predict(batch(5).target_image)
    torch.testing.assert_close(method.target_shares, predicted.mean(dim=(0, 2, 3)).double())
    confidence, likely = predicted.max(dim=1)
    for k in range(CLASSES):
        chosen = confidence[likely == k]
        expected = float(chosen.mean()) if len(chosen) else 1 / CLASSES
        assert float(method.thresholds[k]) == pytest.approx(expected)


def test_the_teacher_is_the_moving_average_and_predicts() -> None:
    method = prepared(ema=0.95)
    for iteration, m in ((0, 0.9), (5, 1 - 1 / 15), (100, 0.95)):
        before = copy.deepcopy(method.teacher.state_dict())
        method.step(batch(iteration), iteration)
        for name, student in method.segmenter.state_dict().items():
            ours = method.teacher.state_dict()[name]
            expected = m * before[name] + (1 - m) * student if ours.is_floating_point() else student
            torch.testing.assert_close(ours, expected, msg=name)
    image = batch(9).target_image
    network = copy.deepcopy(method.networks["segmenter"]).eval()
    torch.testing.assert_close(method.predict(image), network.logits(image).detach().softmax(dim=1))


def test_statistics_move_towards_those_of_the_step_before() -> None:
    method = prepared()
    part = batch(6)
    posterior = method.predict(part.target_image)
    aligned = align(posterior, method.source_shares, method.target_shares, 1.0)
    _, confidence, number = class_sums(aligned)
    method.thresholds = confidence / number.clamp(min=1)
    shares, thresholds = method.target_shares, method.thresholds
    fraction = (confident_labels(aligned, thresholds) != NOT_ANNOTATED).double().mean()
    metrics = method.step(part, 0)
    assert float(metrics["pseudo_label_fraction"]) == pytest.approx(float(fraction))
    assert 0 < float(fraction) < 1
    expected = 0.95 * shares + 0.05 * posterior.mean(dim=(0, 2, 3)).double()
    torch.testing.assert_close(method.target_shares, expected, rtol=1e-6, atol=0)
    for k in range(CLASSES):
        mean = float(confidence[k] / number[k]) if number[k] else float(thresholds[k])
        assert float(method.thresholds[k]) == pytest.approx(0.9 * float(thresholds[k]) + 0.1 * mean)


def test_the_student_sees_the_other_view() -> None:
    part = batch(0)
    assert part.target_image is not None
    seen = []
    for view in (None, part.target_image, -part.target_image):
        method = prepared()
        metrics = method.step(dataclasses.replace(part, target_view=view), 0)
        seen.append((float(metrics["loss_pseudo_labels"]), float(metrics["pseudo_label_fraction"])))
    assert seen[0] == seen[1]
    assert seen[2][0] != seen[0][0]
    assert seen[2][1] == seen[0][1], "labels are those of the image itself"
    assert MeanTeacher.target_views == 2


def gradient(part: Batch, iteration: int, **settings: float) -> Tensor:
    method = prepared(**settings)
    method.step(part, iteration)
    found = method.segmenter.conv1.weight.grad
    assert found is not None
    return found.double()


def test_the_weight_of_the_target_grows() -> None:
    part = batch(0)
    without = gradient(part, 0, target_weight=0.0)
    whole = gradient(part, 0, ramp=0) - without
    for iteration, share in ((0, 0.25), (1, 0.5), (3, 1.0), (8, 1.0)):
        found = gradient(part, iteration, ramp=4) - without
        torch.testing.assert_close(found, share * whole, rtol=0, atol=1e-5 * float(without.norm()))


def test_structures_are_pasted_with_their_labels() -> None:
    part = batch(0)
    labels = part.source_label.clone()
    labels[:, :3] = NOT_ANNOTATED
    whole: MeanTeacher = make("mean_teacher", mixing=1.0)
    assert torch.equal(whole._pasted(labels, 0), (labels > 0) & (labels != NOT_ANNOTATED))
    half: MeanTeacher = make("mean_teacher", mixing=0.5)
    seen = set()
    for iteration in range(20):
        pasted = half._pasted(labels, iteration)
        for image in range(len(labels)):
            kinds = [k for k in (1, 2) if pasted[image][labels[image] == k].any()]
            assert torch.equal(pasted[image], torch.isin(labels[image], torch.tensor(kinds)))
            seen.add((image, tuple(kinds)))
    assert len(seen) == 4 * 4, "every subset of the structures, in every image"
    assert torch.equal(half._pasted(labels, 7), half._pasted(labels, 7))
    # With everything pasted, the student learns at least the structures.
    method = prepared(mixing=1.0)
    fraction = float(method.step(part, 0)["pseudo_label_fraction"])
    assert fraction >= float((part.source_label > 0).double().mean())


def test_shares_are_matched_in_the_last_iteration() -> None:
    plain, matched = prepared(), prepared(share_matching=0.5)
    image = batch(9).target_image
    for iteration in (0, 9):
        torch.testing.assert_close(matched.predict(image), plain.predict(image))
        for method in (plain, matched):
            method.step(batch(iteration), iteration)
    factors = (plain.source_shares / plain.target_shares).sqrt().to(torch.float32)[:, None, None]
    expected = plain.predict(image) * factors
    torch.testing.assert_close(matched.predict(image), expected / expected.sum(dim=1, keepdim=True))
    assert not math.isclose(float(factors.max()), 1, rel_tol=0.01)
