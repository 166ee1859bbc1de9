"""Scores and criteria that a validation records, and the one that chooses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.data.loader import collate
from mpscl_ray.data.slices import LocalSlices
from mpscl_ray.methods.losses import class_counts, weighted_cross_entropy
from mpscl_ray.train.validation import Validation, selection_score, target_criteria, validate
from tests.tiny import CLASSES, SIZE, make_dataset

CPU = torch.device("cpu")


@pytest.mark.parametrize("hidden", [0, 15])
def test_validation_scores_are_those_of_whole_volumes(hidden: int, tmp_path: Path) -> None:
    """Of what is annotated of them."""
    slices = LocalSlices(make_dataset(tmp_path, "mr", slices=5, hidden=hidden), "val", labels=True)

    def predict(images: Tensor) -> Tensor:
        """Thirds by brightness, with some doubt."""
        classes = (images[:, 0] > -0.2).long() + (images[:, 0] > 0.45).long()
        return torch.nn.functional.one_hot(torch.tensor([0, 2, 1])[classes], 3).permute(0, 3, 1, 2) * 0.7 + 0.1

    found = validate(predict, slices, CLASSES, 2, CPU)
    expected = []
    for _, arrays in slices.volumes():
        predicted = predict(torch.from_numpy(arrays["image"]).unsqueeze(1)).argmax(1).numpy()
        label = arrays["label"]
        predicted[:, :hidden] = 0
        expected.append(
            [
                2 * ((predicted == c) & (label == c)).sum() / ((predicted == c).sum() + (label == c).sum())
                for c in (1, 2)
            ]
        )
    means = torch.tensor(expected, dtype=torch.float64).mean(0)
    assert found.dice == pytest.approx(dict(zip(CLASSES[1:], means.tolist(), strict=True)))
    assert 0.5 < found.mean_dice < 1
    assert found.entropy == pytest.approx(-(0.8 * math.log(0.8) + 0.2 * math.log(0.1)) / math.log(3), rel=1e-6)

    touching = torch.zeros(3, 3, dtype=torch.float64)
    for _, arrays in slices.volumes():
        label = torch.from_numpy(arrays["label"]).long()
        for one, other in ((label[:, 1:], label[:, :-1]), (label[:, :, 1:], label[:, :, :-1])):
            both = (one != NOT_ANNOTATED) & (other != NOT_ANNOTATED)
            counts = torch.bincount(3 * one[both] + other[both], minlength=9).view(3, 3)
            touching += (counts + counts.T) / 2
    assert found.labelled_pairs is not None
    assert found.labelled_pairs.equal(touching)
    rows, columns = SIZE
    neighbours = 2 * 5 * ((rows - 1) * columns + rows * (columns - 1))
    assert float(found.predicted_pairs.sum()) == pytest.approx(neighbours, rel=1e-6)

    volumes = [collate(arrays) for _, arrays in slices.volumes()]
    images, labels = (torch.cat([volume[name] for volume in volumes]) for name in ("image", "label"))
    sums = weighted_cross_entropy(predict(images).log(), labels, class_counts(labels, 3))
    assert found.cross_entropy == pytest.approx(float(sums.numerator / sums.denominator), rel=1e-6)


def test_an_absent_structure_does_not_count(tmp_path: Path) -> None:
    slices = LocalSlices(make_dataset(tmp_path, "mr", shown=(1,)), "val", labels=True)
    background = torch.tensor([1.0, 0.0, 0.0])
    found = validate(lambda images: background.view(1, 3, 1, 1).expand(len(images), 3, *SIZE), slices, CLASSES, 4, CPU)
    assert found.dice["ventricle"] == 0
    assert math.isnan(found.dice["wall"])
    assert found.mean_dice == 0
    assert found.entropy == 0
    assert math.isfinite(found.cross_entropy)
    assert found.predicted.tolist() == [1, 0, 0]
    assert found.labelled is not None
    assert found.labelled.sum() == 1
    assert found.criteria == pytest.approx({"information": 0, "nuclear_norm": 3**-0.5, "neighbourhood_density": 1})


def test_criteria_of_the_target_use_no_label_of_it() -> None:
    labels = [SCORES[key] for key in ("target", "unlabelled")]
    one, other = (target_criteria({"source": SCORES["source"], "target": target}, "source") for target in labels)
    assert one == other
    divergence = 0.5 * math.log(2) - 0.25 * math.log(2)  # [.5 .25 .25] from [.25 .25 .5]
    entropy = 0.5 * math.log(2) + 0.5 * math.log(4)
    expected = {"confidence": 0.9, "information": 0.5}
    expected |= {"class_ratio_agreement": -divergence, "adjacency_agreement": -divergence}
    assert one == pytest.approx(expected | {"source_dice_and_class_ratio": 0.7 - 0.1 - divergence / entropy})
    assert target_criteria({"source": SCORES["source"]}, "source") == {}


def test_criteria_do_not_depend_on_how_volumes_are_cut_into_batches(tmp_path: Path) -> None:
    slices = LocalSlices(make_dataset(tmp_path, "mr", slices=7), "val", labels=True)

    def predict(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([images, -images, images**2], dim=1).double().softmax(dim=1)

    one, other = (validate(predict, slices, CLASSES, size, CPU) for size in (2, 7))
    assert one.criteria == pytest.approx(other.criteria, rel=1e-9)
    torch.testing.assert_close(one.predicted_pairs, other.predicted_pairs, rtol=1e-12, atol=0)
    assert 0 < one.criteria["information"] < one.criteria["neighbourhood_density"] < 1


SHARES = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
INFORMATION = {"information": 0.5}
PAIRS = torch.diag(SHARES)
FLIPPED = SHARES.flip(0), PAIRS.flip(0, 1)
SCORES: dict[str, Validation] = {
    "source": Validation({"ventricle": 0.6, "wall": 0.8}, 0.3, SHARES, SHARES, PAIRS, PAIRS, {}),
    "target": Validation({"ventricle": 0.2, "wall": 0.4}, 0.1, FLIPPED[0], SHARES, FLIPPED[1], PAIRS, INFORMATION),
    "unlabelled": Validation({}, 0.1, FLIPPED[0], None, FLIPPED[1], None, INFORMATION),
}


@pytest.mark.parametrize(
    ("source", "target", "select", "labelled", "expected"),
    [
        ("source", "target", "label_free", "source", 0.7 - 0.1),
        ("source", "unlabelled", "label_free", "source", 0.7 - 0.1),
        ("source", None, "label_free", "source", 0.7),
        (None, "target", "label_free", "source", None),
        ("source", "target", "label_free", "target", 0.3 - 0.1),
        ("source", "unlabelled", "source_dice_and_class_ratio", "source", 0.7 - 0.1 - 1 / 6),
        ("source", "unlabelled", "adjacency_agreement", "source", -0.25 * math.log(2)),
        ("source", None, "adjacency_agreement", "source", None),
        (None, "target", "adjacency_agreement", "source", None),
        ("source", "target", "oracle", "source", 0.3),
        ("source", "unlabelled", "oracle", "source", None),
        ("source", None, "oracle", "source", None),
    ],
)
def test_selection_score(
    source: str | None, target: str | None, select: str, labelled: str, expected: float | None
) -> None:
    results = {domain: SCORES[key] for domain, key in (("source", source), ("target", target)) if key}
    assert selection_score(results, select, labelled) == (None if expected is None else pytest.approx(expected))
