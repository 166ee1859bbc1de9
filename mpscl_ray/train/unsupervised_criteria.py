"""Unsupervised validation criteria: scores of a segmenter on a domain without labels, from its predictions alone.

Larger is better. None is Dice: how well one ranks settings by target Dice has to be measured.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = 512
"""Pixels of a volume that :func:`neighbourhood_density` compares with each other."""

NEIGHBOUR_TEMPERATURE = 0.05
"""tau of Saito et al. 2021."""


def information(mean_prediction: Tensor, mean_entropy: float) -> float:
    """Mutual information of pixel and class over log C: confident predictions, spread over the classes.

    From the mean probability (C,) of each class over all pixels, and the mean of the prediction's entropy over log C.
    In [0, 1]; 0 where every pixel has the same prediction.

    Source: Krause et al. 2010, "Discriminative clustering by regularized information maximization", Eq. (1).
    """
    marginal = float(torch.special.entr(mean_prediction).sum()) / math.log(len(mean_prediction))
    return marginal - mean_entropy


def nuclear_norm(second_moment: Tensor) -> float:
    """Nuclear norm of the matrix of all predictions (N, C) over its largest value: confident and diverse at once.

    From the mean (C, C) over pixels of p p^T, whose eigenvalues are the squared singular values over N. In (0, 1]; 1
    where the classes are certain and equally frequent; NaN where a prediction is.

    Source: Cui et al. 2020, "Towards discriminability and diversity: batch nuclear-norm maximization", Eq. (9), over
    the whole set instead of a batch.
    """
    if not bool(second_moment.isfinite().all()):  # LAPACK then fails to converge
        return math.nan
    return float(torch.linalg.eigvalsh(second_moment).clamp(min=0).sqrt().sum()) / math.sqrt(len(second_moment))


def neighbourhood_density(predictions: Tensor, temperature: float = NEIGHBOUR_TEMPERATURE) -> float:
    """Soft neighbourhood density: how many similar predictions each prediction has.

    Mean entropy of each pixel's distribution over all other pixels (softmax over cosines), over log(N - 1), in [0, 1];
    from the probabilities (N, C) of a sample of N > 2 pixels.

    Source: Saito et al. 2021, "Tune it the right way: unsupervised validation of domain adaptation via soft
    neighborhood density", Eqs. (1) to (3).
    """
    directions = F.normalize(predictions, dim=1)
    similarity = directions @ directions.T / temperature
    similarity.fill_diagonal_(-math.inf)
    shares = similarity.softmax(dim=1)
    return float(torch.special.entr(shares).sum(dim=1).mean()) / math.log(len(predictions) - 1)


def class_ratio_agreement(expected: Tensor, mean_prediction: Tensor) -> float:
    """Minus the Kullback-Leibler divergence of the classes' predicted shares of pixels from the expected ones.

    At most 0; 0 where all shares agree. ``expected`` are the shares (C,) among labelled pixels of the other domain.

    Source: Bateson et al. 2020, "Source-relaxed domain adaptation for image segmentation", Eq. (2), the class-ratio
    prior, taken over a domain instead of a slice.
    """
    floor = torch.finfo(mean_prediction.dtype).tiny
    return -float(torch.special.xlogy(expected, expected / mean_prediction.clamp(min=floor)).sum())


def neighbour_pairs(shares: Tensor) -> Tensor:
    """How often pixels of each two classes touch (C, C): sums over neighbouring pixels of p q^T, symmetric.

    Neighbours share a side, in a slice. ``shares`` are the probabilities (B, C, H, W), or labels as ones and zeros; a
    pixel that is all zero has no neighbour.
    """
    pairs = torch.einsum("bihw,bjhw->ij", shares[:, :, 1:], shares[:, :, :-1])
    pairs = pairs + torch.einsum("bihw,bjhw->ij", shares[..., 1:], shares[..., :-1])
    return (pairs + pairs.T) / 2


def adjacency_agreement(expected: Tensor, predicted: Tensor) -> float:
    """Minus the Kullback-Leibler divergence of the predicted shares of neighbouring pairs from the expected ones.

    From :func:`neighbour_pairs` of the other domain's labels and of the predictions. At most 0; 0 where all shares
    agree. It also falls where the classes have the right shares and the wrong neighbours, such as an atrium in the
    lung, or scattered pixels. No paper: the class-ratio prior, of pairs of pixels instead of pixels.
    """
    return class_ratio_agreement(expected / expected.sum(), predicted / predicted.sum())
