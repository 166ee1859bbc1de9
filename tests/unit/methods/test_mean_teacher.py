"""The mean teacher: its losses against plain loops, the moving average, what is pasted and corrected."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mpscl_ray.config import load_config
from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.distributed.batch_norm import batch_norms
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.methods import Batch, MeanTeacher
from mpscl_ray.methods.base import TrainingSlices
from mpscl_ray.methods.contrast import source_prototypes
from mpscl_ray.methods.losses import cosine_to_prototypes, margin_contrastive_loss
from mpscl_ray.methods.prototypes import downsample_labels
from mpscl_ray.methods.pseudo_labels import align, class_sums, confident_labels, jensen_shannon
from tests.tiny_methods import CLASSES, SIZE, assert_equal_states, batch, leaves, make


def some_slices(hidden: tuple[int, ...] = ()) -> TrainingSlices:
    """Labels without the classes ``hidden``, whose pixels are not annotated."""
    labelled, target = [batch(3), batch(4, 2)], batch(5).target_image
    assert target is not None
    for part in labelled:
        part.source_label[torch.isin(part.source_label, torch.tensor(hidden, dtype=torch.int64))] = NOT_ANNOTATED
    return TrainingSlices(
        labelled=lambda: [(part.source_image, part.source_label) for part in labelled],
        synchronised_source_batches=list,
        synchronised_target_batches=lambda: [target[:2], target[2:]],
        unlabelled=lambda: [(torch.arange(4), target)],
        target_volumes=(range(4),),
        size=(SIZE, SIZE),
        source_only_weights=dict,
    )


def prepared(hidden: tuple[int, ...] = (), **settings: float) -> MeanTeacher:
    method: MeanTeacher = make("mean_teacher", **({"consistency": 1.0} if settings.get("consistency") else {}))
    method.start_phase(10)
    for step in range(3):  # A teacher that says something.
        method.step(batch(step), 0)
    method.config = dataclasses.replace(method.config, **settings)
    method.start_phase(10)
    method.prepare(some_slices(hidden))
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


def test_shares_are_matched_at_the_end() -> None:
    method = prepared(share_matching=0.5)
    method.step(batch(0), 9)
    plain = copy.deepcopy(method.teacher)
    image = batch(9).target_image
    before, of_slices = method.predict(image), method.predict(batch(5).target_image)
    assert method.end_phase(some_slices())
    shares = of_slices.double().mean(dim=(0, 2, 3))
    torch.testing.assert_close(method.target_shares, shares)
    factors = (method.source_shares / shares).sqrt().to(torch.float32)[:, None, None]
    torch.testing.assert_close(method.predict(image), (before * factors) / (before * factors).sum(dim=1, keepdim=True))
    assert not math.isclose(float(factors.max()), 1, rel_tol=0.01)
    changed = {name for name, value in method.teacher.state_dict().items() if not value.equal(plain.state_dict()[name])}
    assert changed == {"layer6.conv2d_list.0.bias"}


def test_batch_statistics_of_the_target_at_the_end() -> None:
    method = prepared(adabn=True)
    expected = copy.deepcopy(method.teacher)
    for layer in batch_norms(expected):
        layer.momentum = None  # PyTorch's own cumulative average
        layer.reset_running_stats()
    expected.train()
    with torch.no_grad():
        for images in some_slices().synchronised_target_batches():
            expected(images)
    assert method.end_phase(some_slices())
    for name, value in expected.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(method.teacher.state_dict()[name], value, msg=name)


def test_nothing_is_corrected_unless_it_is_asked_for() -> None:
    method = prepared()
    before = copy.deepcopy(method.state_dict())
    assert not method.end_phase(some_slices())
    assert_equal_states(method.state_dict(), before)


@pytest.mark.parametrize("mixing", [0.0, 1.0])
def test_the_views_agree_where_nothing_is_pasted(mixing: float) -> None:
    part = batch(0)
    assert part.target_image is not None
    part = dataclasses.replace(part, target_view=-part.target_image)
    method = prepared(consistency=2.0, mixing=mixing)
    student, pasted = copy.deepcopy(method.segmenter), method._pasted(part.source_label, 0)
    assert pasted.any() == (mixing > 0)
    with torch.no_grad():
        seen = torch.where(pasted[:, None], part.source_image, -part.target_image)
        logits = [student.logits(images) for images in (seen, part.target_image)]
    expected = jensen_shannon(*logits)[~pasted].sum() / pasted.numel()
    assert float(method.step(part, 0)["loss_consistency"]) == pytest.approx(float(expected), rel=1e-4)


def test_without_a_second_view_there_is_nothing_to_agree_on() -> None:
    assert float(prepared(consistency=1.0).step(batch(0), 0)["loss_consistency"]) == pytest.approx(0, abs=1e-6)
    assert "loss_consistency" not in prepared().step(batch(0), 0)


def test_consistency_needs_another_appearance() -> None:
    still = ["data.augmentation.mapping_probability=0", "data.augmentation.degradation_probability=0"]
    with pytest.raises(ConfigError, match=r"method\.consistency=2 compares two appearances of a slice, and data\.augm"):
        load_config("small/mean_teacher", ["method.consistency=2", *still])
    for fine in (["method.consistency=2"], still, ["method.consistency=2", still[0]]):
        load_config("small/mean_teacher", fine)


@pytest.mark.parametrize(("consistency", "updates"), [(0.0, 1), (1.0, 2)])
def test_views_of_the_target_alone_update_the_running_statistics(consistency: float, updates: int) -> None:
    method: MeanTeacher = make("mean_teacher", bn_running_stats="target", consistency=consistency)
    method.start_phase(10)
    expected, part = copy.deepcopy(method.segmenter), batch(0)
    with torch.no_grad():
        for _ in range(updates):
            expected(part.target_image)
    method.step(part, 0)
    for (name, ours), reference in zip(method.segmenter.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(ours, reference, msg=name)


def test_contrast_takes_the_label_of_the_teacher_and_the_prototypes_as_a_veto() -> None:
    """The loss of each target pixel by loops: the label is the teacher's, and a far prototype leaves the pixel out."""
    method, part = prepared(contrast=1.0, delta_th=0.02), batch(6)
    assert part.target_image is not None
    c = method.config
    thresholds, student = method.thresholds, copy.deepcopy(method.segmenter)
    aligned = align(method.predict(part.target_image), method.source_shares, method.target_shares, 1.0)
    metrics = method.step(part, 0)
    with torch.no_grad():
        features = student(part.target_image).features
    labels = downsample_labels(confident_labels(aligned, thresholds), features.shape[2:])
    cosine = cosine_to_prototypes(features, method.prototypes)
    kept, nearest, losses = 0, cosine.argmax(dim=1), []
    for image, row, column in np.ndindex(*labels.shape):
        label, pixel = int(labels[image, row, column]), cosine[image, :, row, column].tolist()
        if label == NOT_ANNOTATED or pixel[label] - max(pixel[:label] + pixel[label + 1 :]) <= c.delta_th:
            kept += label not in (NOT_ANNOTATED, int(nearest[image, row, column]))
            continue
        one = cosine[image : image + 1, :, row : row + 1, column : column + 1]
        terms = margin_contrastive_loss(one, torch.tensor([[[label]]]), c.margin_target, c.temperature_target)
        losses.append(float(terms.numerator))
    assert kept > 0, "a pixel that is nearer to another prototype than to that of its label is left out"
    assert float(metrics["contrast_fraction"]) == pytest.approx(len(losses) / labels.numel())
    assert 0 < len(losses) < labels.numel()
    assert float(metrics["loss_contrastive_target"]) == pytest.approx(np.mean(losses), rel=1e-4)
    assert float(metrics["loss_contrastive_source"]) > 0


def test_prototypes_start_from_the_source_and_follow_it() -> None:
    method = prepared(contrast=1.0, alpha=0.25)
    expected = source_prototypes(method.features, some_slices().labelled(), method.prototypes)
    torch.testing.assert_close(method.prototypes, expected)
    assert expected.any()
    part, student = batch(6), copy.deepcopy(method.segmenter)
    method.step(part, 0)
    with torch.no_grad():
        features = student(part.source_image).features
    labels = downsample_labels(part.source_label, features.shape[2:])
    for k in range(CLASSES):
        mean = features.permute(0, 2, 3, 1)[labels == k].mean(dim=0)
        torch.testing.assert_close(method.prototypes[k], 0.25 * expected[k] + 0.75 * mean)
    plain = prepared()
    plain.step(part, 0)
    assert not plain.prototypes.any(), "nothing is computed unless it is asked for"


SWITCHES = {"histogram_matching": 0.5, "mixing": 0.5, "consistency": 1.0, "contrast": 0.5, "delta_th": 0.05}
"""All that acts in a step."""


def test_each_switch_has_its_own_weight() -> None:
    """The gradient is linear in each weight."""
    part = batch(0)
    assert part.target_image is not None
    part = dataclasses.replace(part, target_view=-part.target_image)
    for name in ("consistency", "contrast"):
        small = {"delta_th": 0.0, "ramp": 0, "consistency": 1e-30, name: 1e-30}
        without, one, two = (gradient(part, 0, **{**small, name: weight}) for weight in (1e-30, 1.0, 2.0))
        assert float((one - without).norm()) > 1e-4 * float(without.norm())
        torch.testing.assert_close(two - without, 2 * (one - without), rtol=0, atol=1e-5 * float(without.norm()))


def test_with_all_switches_five_steps_saved_and_five_more_are_ten() -> None:
    def started(seed: int) -> MeanTeacher:
        method: MeanTeacher = make("mean_teacher", seed, **SWITCHES)
        method.start_phase(10)
        return method

    def steps(method: MeanTeacher, *numbers: int) -> MeanTeacher:
        for step in numbers:
            part = batch(step)
            assert part.target_image is not None
            method.step(dataclasses.replace(part, target_view=-part.target_image), step)
        return method

    straight, first, second = started(0), started(0), started(7)
    second.seed = 0
    for method in (straight, first):
        method.prepare(some_slices())
    steps(straight, *range(10))
    saved = copy.deepcopy(steps(first, *range(5)).state_dict())
    second.load_state_dict(saved)
    assert_equal_states(second.state_dict(), saved)
    assert_equal_states(steps(second, *range(5, 10)).state_dict(), straight.state_dict())


def test_a_checkpoint_without_prototypes_is_refused_where_they_are_needed() -> None:
    state = prepared().state_dict()
    with pytest.raises(
        DataError, match=r"no prototypes, which method\.contrast=0\.5 needs; resume with method\.contra"
    ):
        make("mean_teacher", contrast=0.5).load_state_dict(state)


@pytest.mark.parametrize("hidden", [(2,), (0, 1, 2)])
def test_classes_that_are_not_annotated_leave_everything_finite(hidden: tuple[int, ...]) -> None:
    method = prepared(hidden, share_matching=1.0, **SWITCHES)
    assert all(float(method.source_shares[k]) == 0 for k in hidden)
    assert float(method.source_shares.sum()) == pytest.approx(float(len(hidden) < CLASSES))
    for step in range(3):
        part = batch(step)
        label = part.source_label.clone()
        label[torch.isin(label, torch.tensor(hidden))] = NOT_ANNOTATED
        metrics = method.step(dataclasses.replace(part, source_label=label), step)
        assert all(math.isfinite(float(value)) for value in metrics.values())
        assert float(metrics["non_finite"]) == 0
    method.end_phase(some_slices(hidden))
    tensors = [value for value in leaves(method.state_dict()).values() if isinstance(value, Tensor)]
    assert all(value.isfinite().all() for value in tensors)
    assert not method.prototypes[list(hidden)].any()
    predicted = method.predict(batch(9).target_image)
    assert predicted.isfinite().all()
