"""CAG-UDA against its released code: anchors, pseudo-labels, the distance term, and four of its training steps.

All agree to 1e-9 in float64. The released code is fixed to 19 classes and 256 channels, so the network has as many.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mpscl_ray.config import CAGConfig, OptimConfig, PrecisionConfig
from mpscl_ray.methods import CAG, Batch
from mpscl_ray.methods.base import TrainingSlices
from mpscl_ray.methods.cag import IGNORE, power_of_ten_scale
from mpscl_ray.networks.deeplab import DeepLabV2, SegmenterOutput
from tests.golden.released_comparison import Numbers, assert_equal, assert_same_training, part, released
from tests.golden.released_inputs import (
    ANCHORED_CLASSES,
    ANCHORED_SEGMENTER,
    ANCHORED_SIZE,
    FAR_ANCHORS,
    OTHER_ANCHORS,
    STEPS,
    anchored_batches,
    class_vectors,
    digest,
    fill,
)

RELEASED_IGNORE = 250


@pytest.fixture(scope="module")
def numbers() -> Numbers:
    return released("cag")


def slices_of(batches: list[tuple[Tensor, Tensor, Tensor]]) -> TrainingSlices:
    """The source slice by slice, so that anchors are of the images and not of batches of them."""
    return TrainingSlices(
        labelled=lambda: [(image, label) for image, label, _ in batches],
        synchronised_source_batches=list,
        synchronised_target_batches=list,
        unlabelled=list,
        target_volumes=(),
        size=(ANCHORED_SIZE, ANCHORED_SIZE),
        source_only_weights=dict,
    )


def at_the_start() -> tuple[CAG, list[tuple[Tensor, Tensor, Tensor]]]:
    """The method in its first step, with the anchors of the released run before one of them is moved."""
    segmenter = DeepLabV2(ANCHORED_CLASSES, **ANCHORED_SEGMENTER).double()
    segmenter.in_channels = 1  # The images are network inputs already, which are left as they are.
    fill(segmenter, 2)
    config = CAGConfig(
        segmentation_loss="ce", probability_threshold=0.5, distance_quantile=None, distance_threshold=0.5
    )
    optim = OptimConfig(lr=1e-3, head_lr_factor=1, weight_decay=2e-4)
    method = CAG(segmenter, config, optim, ANCHORED_CLASSES, torch.device("cpu"), PrecisionConfig(), 0)
    method.start_phase(STEPS)
    batches = list(anchored_batches(lambda image: method.teacher(image).main))
    method.prepare(slices_of(batches))
    return method, batches


def know_all_classes(method: CAG) -> None:
    """Give anchors to classes that occur nowhere, as in the released run.

    The released code leaves them at zero, where they can be the nearest; here such a class takes no part.
    """
    unknown = method.anchor_counts == 0
    method.anchors[unknown] = OTHER_ANCHORS
    method.anchor_counts[unknown] = 1


def test_distance(numbers: Numbers) -> None:
    """Distances to anchors from .1 to 60: two of five are above the cap, each of which is capped on its own."""
    ids, vectors, anchors = class_vectors()
    vectors.requires_grad_()
    smooth = F.smooth_l1_loss(vectors, anchors[ids], reduction="none").mean(dim=1)
    assert (smooth > 5).sum() == 2
    assert_equal(10 * (smooth * power_of_ten_scale(smooth.detach())).mean(), numbers["distance"])

    # The same through the method: each vector is the feature of a class that covers half of an image.
    method, _ = at_the_start()
    method.anchors, method.anchor_counts = anchors, torch.ones(ANCHORED_CLASSES, dtype=torch.float64)
    labels = torch.full((len(ids), 4, 8), IGNORE)
    labels[:, :2] = torch.tensor(ids)[:, None, None]
    features = vectors[:, :, None, None].expand(-1, -1, 4, 8)
    logits = F.one_hot(labels.clamp(min=0), ANCHORED_CLASSES).permute(0, 3, 1, 2).double()
    total, number = method._distance(SegmenterOutput(None, logits, features), labels)
    assert int(number) == len(ids)
    assert_equal(total / number, numbers["distance"])
    (gradient,) = torch.autograd.grad(total / number, [vectors])
    assert_equal(digest(gradient), numbers["distance_gradient"])


def test_anchors_and_pseudo_labels(numbers: Numbers) -> None:
    method, batches = at_the_start()
    assert method.anchor_counts.tolist() == numbers["counts"].tolist()
    assert_equal(digest(method.anchors), numbers["anchors"])
    know_all_classes(method)
    by_anchor, by_probability = method.pseudo_labels(batches[0][2])
    for found, name in ((by_anchor, "by_anchor"), (by_probability, "by_probability")):
        expected = numbers[name]
        assert len(expected.unique()) >= 5
        assert torch.equal(torch.where(found == IGNORE, RELEASED_IGNORE, found), expected)


def test_four_steps(numbers: Numbers) -> None:
    """The released scheduler is one iteration ahead: it lowers the rate before the first step.

    Two classes have anchors so far from their features that the cap is in force.
    """
    numbers = part(numbers, "train_")
    method, batches = at_the_start()
    know_all_classes(method)
    for number, offset in FAR_ANCHORS.items():
        method.anchors[number] += offset
    released_losses = {name: numbers.pop(name) for name in ("loss", "distance", "pseudo")}
    metrics = assert_same_training(method, [Batch(*batch) for batch in batches], numbers, first_iteration=1)
    found = {name: np.array(values) for name, values in metrics.items()}
    pseudo = 0.5 * (found["loss_pseudo_anchor"] + found["loss_pseudo_probability"])
    distance = 0.7 * (found["loss_distance_source"] + found["loss_distance_target"])
    assert_equal(pseudo, released_losses["pseudo"])
    # In the first step the target has no class feature: the released loss is NaN, without a gradient, and 0 here.
    assert released_losses["distance"].isnan().tolist() == [True, False, False, False]
    assert found["loss_distance_target"][0] == 0 < found["loss_distance_target"][1]
    assert_equal(distance[1:], released_losses["distance"][1:])
    assert_equal((found["loss_segmentation"] + pseudo + distance)[1:], released_losses["loss"][1:])
