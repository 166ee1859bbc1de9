"""CAG-UDA against its formulas in plain loops: anchors, pseudo-labels, distances, absent classes."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mpscl_ray.config import load_config
from mpscl_ray.methods import Batch
from mpscl_ray.methods.base import TrainingSlices
from mpscl_ray.methods.cag import IGNORE, class_features, power_of_ten_scale
from mpscl_ray.networks.deeplab import DeepLabV2
from tests.tiny_methods import CLASSES, SIZE, assert_equal_states, batch, make

SMALL = 9
"""Height and width of the features."""


def nearest_label(label: Tensor) -> Tensor:
    places = [k * SIZE // SMALL for k in range(SMALL)]
    return label[:, places][:, :, places]


def trained(**settings: Any) -> tuple[Any, Batch]:
    """A student after a little training, and the slices of its next round."""
    method = make("cag", **settings)
    method.start_phase(40)
    for step in range(12):
        method.step(batch(step, 8), step)
    return method, batch(50, 6)


def slices_of(part: Batch) -> TrainingSlices:
    assert part.target_image is not None
    target = part.target_image
    return TrainingSlices(
        labelled=lambda: [
            (part.source_image[:4], part.source_label[:4]),
            (part.source_image[4:], part.source_label[4:]),
        ],
        synchronised_source_batches=lambda: [
            part.source_image[[3, 0, 5]],
            part.source_image[[1, 4, 2]],
            part.source_image[:3],
        ],
        synchronised_target_batches=list,
        unlabelled=lambda: [(torch.arange(4), target[:4]), (torch.arange(4, 6), target[4:])],
        target_volumes=(range(2), range(2, 6)),
        size=(SIZE, SIZE),
        source_only_weights=dict,
    )


def test_anchors_are_means_over_images_and_classes_of_agreeing_pixels() -> None:
    method, part = trained()
    method.prepare(slices_of(part))
    teacher = copy.deepcopy(method.segmenter).eval()
    with torch.no_grad():
        output = teacher(part.source_image)
    labels = nearest_label(part.source_label)
    vectors: dict[int, list[Any]] = {number: [] for number in range(CLASSES)}
    for image in range(6):
        for number in range(CLASSES):
            own = [
                output.features[image, :, row, column].double().numpy()
                for row, column in np.ndindex(SMALL, SMALL)
                if labels[image, row, column] == number == output.main[image, :, row, column].argmax()
            ]
            if len(own) >= 2:
                vectors[number].append(np.mean(own, axis=0))
    assert sum(map(len, vectors.values())) > 6
    assert method.anchor_counts.tolist() == [len(vectors[number]) for number in range(CLASSES)]
    for number, own in vectors.items():
        expected = np.mean(own, axis=0) if own else np.zeros(method.anchors.shape[1])
        np.testing.assert_allclose(method.anchors[number], expected, rtol=1e-4, atol=1e-6)
    assert_equal_states(teacher.state_dict(), method.teacher.state_dict())


def test_with_target_statistics_anchors_use_those_of_the_source() -> None:
    """Three passes in training mode, averaged by torch's own cumulative average; the same pseudo-labels as before."""
    method, part = trained(bn_running_stats="target")
    slices = slices_of(part)
    method.prepare(slices)
    reference = copy.deepcopy(method.segmenter)
    for layer in reference.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None
    with torch.no_grad():
        for images in slices.synchronised_source_batches():
            reference(images)
        output = reference.eval()(part.source_image)
        vectors, pixels = class_features(output.features.double(), output.main, nearest_label(part.source_label))
    valid = (pixels >= 2).double()
    assert method.anchor_counts.tolist() == valid.sum(0).tolist()
    assert (method.anchor_counts > 0).sum() >= 2
    expected = (vectors * valid[..., None]).sum(0) / valid.sum(0).clamp(min=1)[:, None]
    torch.testing.assert_close(method.anchors, expected.float(), rtol=1e-4, atol=1e-6)
    assert_equal_states(method.teacher.state_dict(), method.segmenter.state_dict())
    assert not method.teacher.training


@pytest.mark.parametrize("quantile", [0.5, None])
def test_pseudo_labels_of_the_teacher(quantile: float | None) -> None:
    method, part = trained(distance_quantile=quantile, distance_threshold=0.05, probability_threshold=0.6)
    method.prepare(slices_of(part))
    assert int((method.anchor_counts > 0).sum()) >= 2
    with torch.no_grad():
        output = method.teacher(part.target_image)
    gaps = np.empty((6, SMALL, SMALL))
    nearest = np.empty(gaps.shape, int)
    likely = np.empty(gaps.shape, int)
    for place in np.ndindex(*gaps.shape):
        image, row, column = place
        feature = output.features[image, :, row, column].double()
        far = [
            float((feature - anchor.double()).norm()) if count else math.inf
            for anchor, count in zip(method.anchors, method.anchor_counts, strict=True)
        ]
        first, second = sorted(far)[:2]
        gaps[place], nearest[place] = second - first, int(np.argmin(far))
        p = output.main[image, :, row, column].double().softmax(0)
        likely[place] = int(p.argmax()) if float(p.max()) > 0.6 else IGNORE
    threshold = float(method.threshold)
    median = np.sort(gaps.ravel())[round(0.5 * (gaps.size - 1))]
    assert threshold == pytest.approx(0.05 if quantile is None else median, abs=1e-5)
    by_anchor, by_probability = method.pseudo_labels(part.target_image)
    clear = np.abs(gaps - threshold) > 1e-5
    expected = np.where(gaps >= threshold, nearest, IGNORE)
    assert np.array_equal(by_anchor.numpy()[clear], expected[clear])
    assert np.array_equal(by_probability.numpy(), likely)
    if quantile is not None:
        assert (by_anchor != IGNORE).double().mean().item() == pytest.approx(0.5, abs=0.01)
    assert not method.teacher.training


@pytest.mark.parametrize("far", [0.0, 8.0, 90.0])
def test_class_features_and_their_distance(far: float) -> None:
    """D = 10 / K sum smooth L1, each divided by ten until it is at most 5; the gradient of a feature is scaled by twice
    its part of the image."""
    method = make("cag")
    generator = torch.Generator().manual_seed(1)
    channels = method.anchors.shape[1]
    features = torch.randn(2, channels, 4, 4, generator=generator, requires_grad=True)
    logits = torch.randn(2, CLASSES, 4, 4, generator=generator)
    labels = torch.randint(CLASSES, (2, 4, 4), generator=generator)
    logits += 2 * F.one_hot(labels, CLASSES).permute(0, 3, 1, 2)
    labels[0, 0] = IGNORE
    method.anchors = torch.randn(CLASSES, channels, generator=generator)
    method.anchors[2] += far
    method.anchor_counts = torch.tensor([3.0, 0.0, 5.0], dtype=torch.float64)

    total, number, gradient = 0.0, 0, np.zeros(features.shape)
    array = features.detach().double().numpy()
    for image in range(2):
        for kind in (0, 2):
            own = [
                (row, column)
                for row, column in np.ndindex(4, 4)
                if labels[image, row, column] == kind == logits[image, :, row, column].argmax()
            ]
            if len(own) < 2:
                continue
            number += 1
            mean = np.mean([array[image, :, row, column] for row, column in own], axis=0)
            difference = mean - method.anchors[kind].double().numpy()
            smooth = np.where(np.abs(difference) < 1, difference**2 / 2, np.abs(difference) - 0.5)
            share, distance = 1.0, float(smooth.mean())
            while distance > 5:
                share, distance = share / 10, distance / 10
            total += 10 * distance
            for row, column in own:
                slope = np.clip(difference, -1, 1) / channels / len(own)
                gradient[image, :, row, column] = 10 * share * slope * 2 * len(own) / 16
    assert number >= 2
    output = type(method.segmenter(batch(0).source_image))(None, logits, features)
    numerator, count = method._distance(output, labels)
    assert (numerator.item(), int(count)) == (pytest.approx(total, rel=1e-5), number)
    numerator.backward()
    np.testing.assert_allclose(features.grad, gradient, rtol=1e-4, atol=1e-7)
    means, pixels = class_features(features, logits, torch.full_like(labels, IGNORE))
    assert not means.any()
    assert not pixels.any()


def test_a_large_distance_is_divided_by_ten_until_it_is_not() -> None:
    values = torch.tensor([[0.0, 4.9, 5.0], [5.1, 50.0, 700.0]])
    torch.testing.assert_close(power_of_ten_scale(values), torch.tensor([[1, 1, 1], [0.1, 0.1, 0.001]]))


def test_no_feature_no_anchor_and_no_pseudo_label_are_no_loss() -> None:
    """K = 0 in both domains, and not one pixel selected."""
    for settings in ({"min_pixels": SIZE * SIZE}, {"distance_quantile": None, "distance_threshold": 1e5}):
        method, part = trained(probability_threshold=1.0, **settings)
        method.prepare(slices_of(part))
        metrics = method.step(batch(0), 0)
        assert float(metrics["non_finite"]) == 0
        assert float(metrics["loss_pseudo_probability"]) == float(metrics["loss_pseudo_anchor"]) == 0
        assert float(metrics["loss_distance_target"]) == 0
        assert float(metrics["pseudo_label_fraction_anchor"]) == 0


def test_a_step_adds_up_its_terms() -> None:
    method, part = trained(segmentation_loss="ce", segmentation_aux_weight=0.0, probability_threshold=0.5)
    method.prepare(slices_of(part))
    method.start_phase(40)
    student: DeepLabV2 = copy.deepcopy(method.segmenter)
    assert part.target_image is not None
    by_anchor, by_probability = method.pseudo_labels(part.target_image)
    metrics = method.step(part, 0)
    source, target = student(part.source_image), student(part.target_image)
    up = F.interpolate(source.main, size=(SIZE, SIZE), mode="bilinear", align_corners=True)
    loss = F.cross_entropy(up, part.source_label)
    for labels in (by_anchor, by_probability):
        assert (labels != IGNORE).any()
        loss = loss + 0.5 * F.cross_entropy(target.main, labels, ignore_index=IGNORE)
    for output, labels in ((source, nearest_label(part.source_label)), (target, by_anchor)):
        numerator, count = method._distance(output, labels)
        assert count > 0
        loss = loss + 0.7 * numerator / count
    (expected,) = torch.autograd.grad(loss, [student.conv1.weight])
    found = method.segmenter.conv1.weight.grad
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
    assert float(metrics["loss_distance_source"]) > 0


def test_rounds_share_the_iterations_of_the_adaptation() -> None:
    config = load_config("small/cag", ["phases.adaptation=250"])
    assert config.schedule[-3:] == [("adaptation_1", 83), ("adaptation_2", 83), ("adaptation_3", 84)]
    assert load_config("small/cag", ["method.rounds=1"]).schedule[-1] == ("adaptation", 170)
