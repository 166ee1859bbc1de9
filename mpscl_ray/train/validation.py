"""Validation during training, by all workers: Dice per structure over whole volumes, loss and entropy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpscl_ray.data import TARGET_DOMAIN
from mpscl_ray.data.loader import Slices, collate
from mpscl_ray.distributed import collectives
from mpscl_ray.train import unsupervised_criteria

_SMALLEST_PROBABILITY = 1e-12
"""One pixel that is surely wrong has no infinite loss."""


@dataclass(frozen=True)
class Validation:
    """What a domain's validation volumes say of the segmenter.

    Attributes:
        dice: mean over volumes per foreground structure, in [0, 1]; empty for a domain without labels. A volume that
            has a structure neither in the label nor in the prediction does not count for it.
        entropy: mean over pixels of the prediction's entropy over log C, in [0, 1]. Needs no labels.
        predicted: (C,), mean probability of each class over all pixels, on the CPU.
        labelled: (C,), share of each class among labelled pixels; None for a domain without labels.
        criteria: by name, of :mod:`mpscl_ray.train.unsupervised_criteria`; larger is better. They need no labels.
        cross_entropy: weighted as in training, with the class counts of all validation pixels; NaN without labels.
    """

    dice: dict[str, float]
    entropy: float
    predicted: Tensor
    labelled: Tensor | None
    criteria: dict[str, float]
    cross_entropy: float = math.nan

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
    """Predict this worker's share of the validation volumes and put the shares together.

    Args:
        predict: images (B, 1, H, W) to probabilities (B, C, H, W).
        slices: the validation split of one domain; Dice is taken where they are opened with labels.
        classes: names, background first.
        batch_size: slices predicted at once.
        device: where the network is.

    Returns:
        The same values on every worker.
    """
    num_classes = len(classes)
    # Overlap, predicted and true pixels.
    sums = torch.zeros(len(slices.files.cases), num_classes, 3, dtype=torch.float64, device=device)
    totals = torch.zeros(4, dtype=torch.float64, device=device)  # entropy, pixels, density, volumes
    moments = torch.zeros(num_classes, num_classes, dtype=torch.float64, device=device)
    information = torch.zeros(num_classes, 2, dtype=torch.float64, device=device)  # sum of -log p_y, pixels, by class y
    rank, world_size = collectives.rank(), collectives.world_size()
    own = range(rank, len(slices.files.cases), world_size)
    for index, (_, arrays) in zip(own, slices.volumes(rank, world_size), strict=True):
        volume = collate(arrays)
        stride = math.ceil(volume["image"].numel() / unsupervised_criteria.NEIGHBOURS)
        neighbours = []
        for start in range(0, len(volume["image"]), batch_size):
            images = volume["image"][start : start + batch_size].to(device)
            probabilities = predict(images).double()
            totals[0] += torch.special.entr(probabilities).sum() / math.log(num_classes)
            totals[1] += images.numel()
            pixels = probabilities.movedim(1, -1).reshape(-1, num_classes)
            moments += pixels.T @ pixels
            # Every stride-th pixel of the volume, however it is cut into batches.
            neighbours.append(pixels[-(start * images[0].numel()) % stride :: stride])
            if "label" in volume:
                labels = volume["label"][start : start + batch_size].to(device)
                pairs = (labels * num_classes + probabilities.argmax(1)).flatten()
                confusion = torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
                sums[index] += torch.stack([confusion.diag(), confusion.sum(0), confusion.sum(1)], dim=1)
                information += _information(probabilities, labels)
        totals[2] += unsupervised_criteria.neighbourhood_density(torch.cat(neighbours))
        totals[3] += 1
    sums, totals, moments, information = collectives.all_reduce_sums(sums, totals, moments, information)
    moments = moments.cpu() / float(totals[1])
    dice: dict[str, float] = {}
    cross_entropy = math.nan
    if slices.files.labels:
        per_case = 2 * sums[..., 0] / (sums[..., 1] + sums[..., 2])  # 0/0 = NaN where a structure is nowhere
        dice = dict(zip(classes[1:], torch.nanmean(per_case, dim=0)[1:].tolist(), strict=True))
        cross_entropy = weighted_mean(information)
    entropy = float(totals[0] / totals[1])
    predicted = moments.sum(dim=1)  # Probabilities of a pixel sum to one, so rows of p p^T sum to p.
    pixels_of_class = sums[..., 2].sum(dim=0).cpu()
    return Validation(
        dice,
        entropy,
        predicted,
        pixels_of_class / pixels_of_class.sum() if slices.files.labels else None,
        {
            "information": unsupervised_criteria.information(predicted, entropy),
            "nuclear_norm": unsupervised_criteria.nuclear_norm(moments),
            "neighbourhood_density": float(totals[2] / totals[3]),
        },
        cross_entropy,
    )


def _information(probabilities: Tensor, labels: Tensor) -> Tensor:
    """For each class of the labels, the sum of -log p of its pixels and their number: (C, 2)."""
    losses = -probabilities.gather(1, labels[:, None])[:, 0].clamp_min(_SMALLEST_PROBABILITY).log()
    number = probabilities.shape[1]
    pixels = torch.bincount(labels.flatten(), minlength=number)
    return torch.stack([torch.bincount(labels.flatten(), losses.flatten(), number), pixels], dim=1)


def weighted_mean(information: Tensor) -> float:
    """Cross-entropy in which a class weighs the less the more pixels it has.

    Args:
        information: (C, 2), the sum of -log p of the pixels of each class, and their number.

    Returns:
        As :func:`mpscl_ray.methods.losses.weighted_cross_entropy` of all these pixels at once.
    """
    loss, pixels = information.unbind(1)
    weights = 1.0 - pixels / pixels.sum()
    if (pixels * weights).sum() == 0:
        weights = torch.ones_like(weights)
    return float((weights * loss).sum() / (weights * pixels).sum())


def target_criteria(results: Mapping[str, Validation], labelled: str) -> dict[str, float]:
    """Label-free criteria of the target's validation volumes; larger is better.

    Args:
        results: by domain.
        labelled: domain whose labels are trained on; only its labels are looked at.

    Returns:
        By name; {} where the target has no validation volumes.
    """
    target, own = results.get(TARGET_DOMAIN), results.get(labelled)
    if target is None:
        return {}
    criteria = {"confidence": 1 - target.entropy, **target.criteria}
    if own is not None and own.labelled is not None:
        criteria["class_ratio_agreement"] = unsupervised_criteria.class_ratio_agreement(own.labelled, target.predicted)
    return criteria


def selection_score(results: Mapping[str, Validation], select: str, labelled: str) -> float | None:
    """What decides which checkpoint is `best`; larger is better, None where it cannot be told.

    - label_free: mean Dice on validation volumes of the labelled domain, less the entropy on those of the target where
      there are any. Uses no label that training has not.
    - oracle: mean Dice on validation volumes of the target, which an unlabelled target does not have.

    Args:
        results: by domain.
        select: label_free or oracle.
        labelled: domain whose labels are trained on.
    """
    own, target = results.get(labelled), results.get(TARGET_DOMAIN)
    if select == "oracle":
        score = target.mean_dice if target else math.nan
    else:
        score = (own.mean_dice if own else math.nan) - (target.entropy if target else 0.0)
    return None if math.isnan(score) else score
