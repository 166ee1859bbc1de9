"""IntraDA: unsupervised intra-domain adaptation through self-supervision, Pan et al. 2020 (CVPR)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from mpscl_ray.config import IntraDAConfig
from mpscl_ray.distributed import collectives
from mpscl_ray.errors import DataError
from mpscl_ray.methods.advent import AdvEnt
from mpscl_ray.methods.base import TargetSplit, TrainingSlices
from mpscl_ray.methods.losses import self_information
from mpscl_ray.networks import initialise

_EPS = 1e-30


class IntraDA(AdvEnt):
    """Train a new segmenter on the target alone: easy slices with pseudo-labels as the source, hard ones as the target.

    The first stage is the warm-up, AdvEnt from source to target. Before the second stage its segmenter predicts all
    slices of the target. The more confident part gets the predictions as labels, and AdvEnt trains a new segmenter and
    new discriminators, with the initial weights of the first stage, between the two parts.

    Source: Pan et al. 2020, ranking by R(x) = mean I(x) and the losses of AdvEnt in both steps (their Eqs. 1 to 6).
    Differs from the released code: equal scores are ordered by the slices' position in the data; no normaliser for
    rare classes, which is made for city scenes; the last weights of the first stage are used, not the best on labels of
    the target; the second stage starts from the weights after the source-only phase, from ImageNet's only in a run
    without that phase; both stages use the losses of AdvEnt here.
    Differs in the schedule: the second stage has the iterations of the adaptation, the first those of the warm-up;
    released stages are equally long.
    """

    config: IntraDAConfig
    fixed_state = ("split",)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.scores = torch.zeros(0, dtype=torch.float64)

    def prepare(self, slices: TrainingSlices) -> None:
        """Sort the target with the segmenter of the first stage, then reset all weights.

        Raises:
            DataError: there are too few slices or volumes to sort.
        """
        self.scores, pseudo_labels = self._predict_all(slices)
        units = list(slices.target_volumes)
        if self.config.unit == "slice":
            units = [range(row, row + 1) for volume in units for row in volume]
        easy, hard = sort_units(self.scores, units, self.config.easy_fraction)
        if not len(easy) or not len(hard):
            raise DataError(
                f"the target has {len(units)} {self.config.unit}s to train on, too few to sort "
                f"{self.config.easy_fraction:g} of them out as easy and the rest as hard; use method.unit=slice or "
                "more volumes"
            )
        self.split = TargetSplit(easy, hard, pseudo_labels[easy])
        self.networks["segmenter"].load_state_dict(slices.source_only_weights())
        for number, discriminator in enumerate(self.discriminators.values()):
            initialise(discriminator, self.seed + number)
            collectives.broadcast_parameters(discriminator)

    def _predict_all(self, slices: TrainingSlices) -> tuple[Tensor, Tensor]:
        """Score (N,) float64 and label (N, H, W) uint8 of every slice of the target, on every worker."""
        number = sum(len(volume) for volume in slices.target_volumes)
        scores = torch.zeros(number, dtype=torch.float64, device=self.device)
        labels = torch.zeros(number, *slices.size, dtype=torch.uint8, device=self.device)
        for rows, image in slices.unlabelled():
            probabilities = self.predict(image)
            rows = rows.to(scores.device)
            labels[rows] = probabilities.argmax(dim=1).to(torch.uint8)
            scores[rows] = uncertainty(probabilities, self.config.score == "foreground_entropy").double()
        return collectives.all_reduce_sum(scores).cpu(), collectives.all_reduce_sum(labels).cpu()

    def state_dict(self) -> dict[str, Any]:
        split = {} if self.split is None else {"split": {**vars(self.split), "scores": self.scores}}
        return {**super().state_dict(), **split}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if "split" in state:
            split = {name: tensor.clone() for name, tensor in state["split"].items()}
            self.scores = split.pop("scores")
            self.split = TargetSplit(**split)


def uncertainty(probabilities: Tensor, foreground: bool) -> Tensor:
    """Mean normalised self-information (B,) of each image, from probabilities (B, C, H, W).

    R = mean over pixels of sum_c -p_c log(p_c + 1e-30) / (C log C). With ``foreground`` the mean is over the pixels
    predicted as a structure, and 1 / C, the largest possible value, where there is none.

    Source: R(X_t) of Pan et al. 2020, Eq. 4; the mean over channels too, as released.
    """
    classes = probabilities.shape[1]
    entropy = self_information(probabilities.clamp(min=_EPS).log(), eps=_EPS).mean(dim=1)
    if not foreground:
        return entropy.mean(dim=(1, 2))
    mask = (probabilities.argmax(dim=1) > 0).to(entropy.dtype)
    pixels = mask.sum(dim=(1, 2))
    mean = (entropy * mask).sum(dim=(1, 2)) / pixels.clamp(min=1)
    return torch.where(pixels > 0, mean, torch.full_like(mean, 1 / classes))


def sort_units(scores: Tensor, units: Sequence[range], easy_fraction: float) -> tuple[Tensor, Tensor]:
    """Rows of the floor(easy_fraction N) units with the lowest mean score, and of the others.

    Units of equal score stay in their order. The fraction is taken as it is written: 0.29 of 100 units are 29, where
    the rounded product of the released code gives 28.

    Scores are (rows,) float64, and no unit is empty. Returns easy and hard rows, (n,) and (m,) int64, both ascending.
    """
    means = [float(scores[unit.start : unit.stop].mean()) for unit in units]
    order = sorted(range(len(units)), key=lambda index: (means[index], index))
    number = math.floor(Fraction(str(easy_fraction)) * len(units))
    easy, hard = (
        torch.tensor(sorted(row for index in chosen for row in units[index]), dtype=torch.int64)
        for chosen in (order[:number], order[number:])
    )
    return easy, hard
