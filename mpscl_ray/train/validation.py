"""Validation during training, by all workers: Dice per structure over whole volumes, loss and entropy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpscl_ray.data import NOT_ANNOTATED, TARGET_DOMAIN
from mpscl_ray.data.loader import collate
from mpscl_ray.data.slices import Slices
from mpscl_ray.distributed import collectives
from mpscl_ray.methods.losses import class_weights
from mpscl_ray.train import unsupervised_criteria

_SMALLEST_PROBABILITY = 1e-12
"""Keeps the loss of a certain but wrong prediction finite."""


@dataclass(frozen=True)
class Validation:
    """Results of the segmenter on the validation volumes of one domain."""

    dice: dict[str, float]
    """Mean over volumes per foreground structure, in [0, 1]; empty for a domain without labels. A volume that has a
    structure neither in the label nor in the prediction does not count for it, nor do pixels that are not
    annotated."""
    entropy: float
    """Mean over pixels of the prediction's entropy over log C, in [0, 1]. Needs no labels."""
    predicted: Tensor
    """(C,), mean probability of each class over all pixels, on the CPU."""
    labelled: Tensor | None
    """(C,), share of each class among labelled pixels; None for a domain without labels."""
    predicted_pairs: Tensor
    """(C, C), :func:`~mpscl_ray.train.unsupervised_criteria.neighbour_pairs` of the predictions, on the CPU."""
    labelled_pairs: Tensor | None
    """(C, C), the same of the labels; None for a domain without labels."""
    criteria: dict[str, float]
    """By name, of :mod:`mpscl_ray.train.unsupervised_criteria`; larger is better. They need no labels."""
    cross_entropy: float = math.nan
    """Weighted as in training, with the class counts of all validation pixels; NaN without labels."""

    @property
    def mean_dice(self) -> float:
        """Mean over the structures; NaN without labels."""
        values = [value for value in self.dice.values() if not math.isnan(value)]
        return sum(values) / len(values) if values else math.nan


def validate(
    predict: Callable[[Tensor], Tensor],
    slices: Slices,
    classes: Sequence[str],
    batch_size: int,
    device: torch.device,
) -> Validation:
    """Predict this worker's share of the validation volumes, and reduce the results over all workers.

    ``predict`` maps images (B, 1, H, W) to probabilities (B, C, H, W), ``batch_size`` of them at once; ``slices`` are
    the validation split of one domain. Dice is computed where they are opened with labels.
    """
    totals = _Totals(len(slices.files.cases), len(classes), device)
    rank, world_size = collectives.rank(), collectives.world_size()
    own = range(rank, len(slices.files.cases), world_size)
    for index, (_, arrays) in zip(own, slices.volumes(rank, world_size), strict=True):
        totals.add(index, collate(arrays), predict, batch_size)
    return totals.reduce(classes[1:], slices.files.labels)


class _Totals:
    """Sums over the volumes of this worker."""

    def __init__(self, volumes: int, num_classes: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.num_classes, self.device = num_classes, device
        self.overlap = zeros(volumes, num_classes, 3)  # overlap, predicted and true pixels
        self.unlabelled = zeros(4)  # entropy, pixels, density, volumes
        self.moments = zeros(num_classes, num_classes)  # p p^T
        self.pairs = zeros(2, num_classes, num_classes)  # neighbours: predicted, labelled
        self.information = zeros(num_classes, 2)  # sum of -log p_y, pixels, by class y

    def add(self, index: int, volume: dict[str, Tensor], predict: Callable[[Tensor], Tensor], batch_size: int) -> None:
        number = self.num_classes
        stride = math.ceil(volume["image"].numel() / unsupervised_criteria.NEIGHBOURS)
        neighbours = []
        for start in range(0, len(volume["image"]), batch_size):
            images = volume["image"][start : start + batch_size].to(self.device)
            probabilities = predict(images).double()
            self.unlabelled[0] += torch.special.entr(probabilities).sum() / math.log(number)
            self.unlabelled[1] += images.numel()
            pixels = probabilities.movedim(1, -1).reshape(-1, number)
            self.moments += pixels.T @ pixels
            self.pairs[0] += unsupervised_criteria.neighbour_pairs(probabilities)
            # Every stride-th pixel of the volume, independent of the batches.
            neighbours.append(pixels[-(start * images[0].numel()) % stride :: stride])
            if "label" in volume:
                labels = volume["label"][start : start + batch_size].to(self.device)
                annotated = labels != NOT_ANNOTATED
                one_hot = torch.stack([labels == value for value in range(number)], dim=1).double()
                self.pairs[1] += unsupervised_criteria.neighbour_pairs(one_hot)
                labels, predicted = labels[annotated], probabilities.argmax(1)[annotated]
                pairs = labels * number + predicted
                confusion = torch.bincount(pairs, minlength=number**2).view(number, number)
                self.overlap[index] += torch.stack([confusion.diag(), confusion.sum(0), confusion.sum(1)], dim=1)
                self.information += _information(probabilities.movedim(1, -1)[annotated], labels)
        self.unlabelled[2] += unsupervised_criteria.neighbourhood_density(torch.cat(neighbours))
        self.unlabelled[3] += 1

    def reduce(self, structures: Sequence[str], labelled: bool) -> Validation:
        overlap, totals, moments, pairs, information = collectives.all_reduce_sums(
            self.overlap, self.unlabelled, self.moments, self.pairs, self.information
        )
        moments = moments.cpu() / float(totals[1])
        entropy = float(totals[0] / totals[1])
        predicted_pairs, labelled_pairs = pairs.cpu()
        predicted = moments.sum(dim=1)  # probabilities of a pixel sum to one, so rows of p p^T sum to p
        criteria = {
            "information": unsupervised_criteria.information(predicted, entropy),
            "nuclear_norm": unsupervised_criteria.nuclear_norm(moments),
            "neighbourhood_density": float(totals[2] / totals[3]),
        }
        if not labelled:
            return Validation({}, entropy, predicted, None, predicted_pairs, None, criteria)
        per_case = 2 * overlap[..., 0] / (overlap[..., 1] + overlap[..., 2])  # 0/0 = NaN where a structure is absent
        dice = dict(zip(structures, torch.nanmean(per_case, dim=0)[1:].tolist(), strict=True))
        pixels = overlap[..., 2].sum(dim=0).cpu()
        shares, loss = pixels / pixels.sum(), weighted_mean(information)
        return Validation(dice, entropy, predicted, shares, predicted_pairs, labelled_pairs, criteria, loss)


def validation_metrics(results: Mapping[str, Validation], labelled: str) -> dict[str, float]:
    """Metrics of a validation as they are logged, from the results by domain and the domain trained with labels."""
    record: dict[str, float] = {}
    for domain, result in results.items():
        prefix = "val" if domain == TARGET_DOMAIN else f"val/{domain}"
        record |= {f"{prefix}/dice/{structure}": value for structure, value in result.dice.items()}
        if result.dice:
            record[f"{prefix}/dice/mean"] = result.mean_dice
            record[f"{prefix}/loss_cross_entropy"] = result.cross_entropy
        record[f"{prefix}/entropy"] = result.entropy
    return record | {f"val/unsupervised/{name}": value for name, value in target_criteria(results, labelled).items()}


def _information(probabilities: Tensor, labels: Tensor) -> Tensor:
    """For each class, the sum of -log p of its pixels and their number (C, 2), of probabilities (N, C), labels (N,)."""
    losses = -probabilities.gather(1, labels[:, None])[:, 0].clamp_min(_SMALLEST_PROBABILITY).log()
    number = probabilities.shape[1]
    return torch.stack([torch.bincount(labels, losses, number), torch.bincount(labels, minlength=number)], dim=1)


def weighted_mean(information: Tensor) -> float:
    """Cross-entropy in which frequent classes weigh less, from sum of -log p and number of each class's pixels (C, 2).

    It equals :func:`mpscl_ray.methods.losses.weighted_cross_entropy` of all these pixels at once.
    """
    loss, pixels = information.unbind(1)
    weights = class_weights(pixels)
    return float((weights * loss).sum() / (weights * pixels).sum())


def target_criteria(results: Mapping[str, Validation], labelled: str) -> dict[str, float]:
    """Label-free criteria of the target's validation volumes by name; {} where it has none. Larger is better.

    The only labels they use are those of ``labelled``, the domain that is trained with labels.
    """
    target, own = results.get(TARGET_DOMAIN), results.get(labelled)
    if target is None:
        return {}
    criteria = {"confidence": 1 - target.entropy, **target.criteria}
    if own is not None and own.labelled is not None and own.labelled_pairs is not None:
        ratio = unsupervised_criteria.class_ratio_agreement(own.labelled, target.predicted)
        criteria["class_ratio_agreement"] = ratio
        # Divided by the entropy of the shares, the divergence hardly depends on how much of a slice is background. A
        # mean of ranks needs no such unit, but it changes with every candidate that is added: of two checkpoints a
        # third one could decide which is better, and training has deleted all but one.
        unit = float(torch.special.entr(own.labelled).sum())
        if unit > 0:
            criteria["source_dice_and_class_ratio"] = own.mean_dice - target.entropy + ratio / unit
        criteria["adjacency_agreement"] = unsupervised_criteria.adjacency_agreement(
            own.labelled_pairs, target.predicted_pairs
        )
    return criteria


def selection_score(results: Mapping[str, Validation], select: str, labelled: str) -> float | None:
    """Score of a checkpoint; the one with the largest is kept as `best`. None where it cannot be computed.

    - label_free: mean Dice on validation volumes of ``labelled``, the domain that is trained with labels, minus the
      entropy on those of the target if there are any. No other labels are used.
    - oracle: mean Dice on validation volumes of the target; needs their labels.
    - any other: the criterion of that name, of :func:`target_criteria`; needs validation volumes of the target.
    """
    own, target = results.get(labelled), results.get(TARGET_DOMAIN)
    if select == "oracle":
        score = target.mean_dice if target else math.nan
    elif select != "label_free":
        score = target_criteria(results, labelled).get(select, math.nan)
    else:
        score = (own.mean_dice if own else math.nan) - (target.entropy if target else 0.0)
    return None if math.isnan(score) else score
