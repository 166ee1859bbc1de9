"""Losses of MPSCL as pure functions of tensors.

A loss that is divided by a quantity of the whole global batch is returned as :class:`RatioTerms`: the caller adds
numerator and denominator over all workers before it divides. Everything is computed in at least float32 (float64 stays
float64), and nothing here waits for the device. Pixels with the label ``NOT_ANNOTATED`` count in no loss of labels; one
of them alone is 0.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mpscl_ray.data import NOT_ANNOTATED

SOURCE_LABEL, TARGET_LABEL = 0, 1
"""Labels of the domains for discriminators."""

MASK_EPS = 1e-4
"""Added once to the global number of selected target pixels: a batch without any has loss 0."""

MarginForm = Literal["released", "paper"]

_DICE_EPS = 1e-5
_LOG_EPS = 1e-4
_RELEASED_SQUARED_SINE_FLOOR = 1e-4
_PAPER_SQUARED_SINE_FLOOR = 1e-8
_NORM_FLOOR = 1e-12


class RatioTerms(NamedTuple):
    """Terms of a ratio that are added over the workers before the division."""

    numerator: Tensor
    denominator: Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or unchanged if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


@functools.lru_cache(maxsize=64)
def class_indices(num_classes: int, device: torch.device) -> Tensor:
    """0 to C - 1, (C,) int64; kept, so that a step launches nothing for it. Not to be changed."""
    return torch.arange(num_classes, device=device)


def class_counts(labels: Tensor, num_classes: int) -> Tensor:
    """Pixels of each class: (C,) float64, exact, ready to be added over workers.

    Args:
        labels: (...) int64, classes 0 to C - 1, or ``NOT_ANNOTATED``, which is not counted.
        num_classes: C.
    """
    # A comparison instead of torch.bincount, which reads the largest label back from the device.
    classes = class_indices(num_classes, labels.device)
    return (labels.reshape(1, -1) == classes[:, None]).sum(dim=1).double()


def annotated_pixels(counts: Tensor) -> Tensor:
    """The number of annotated pixels, 0-dim, from those of each class (C,); at least 1, as it is a denominator."""
    return counts.sum().clamp(min=1)


def class_weights(counts: Tensor) -> Tensor:
    """w_c = 1 - n_c / sum_k n_k, (C,), of the pixels n (C,) of each class; 1 for a class that has all pixels."""
    annotated = annotated_pixels(counts)
    return (1.0 - counts / annotated).masked_fill(counts == annotated, 1.0)


def weighted_cross_entropy_sum(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Sum over the annotated pixels of w_y CE.

    Logits are (..., B, C, H, W), labels (B, H, W) int64, weights (C,). The result is (...): a value for each of several
    heads.
    """
    logits = at_least_float32(logits)
    heads = logits.shape[:-4]
    log_p = F.log_softmax(logits, dim=-3).flatten(0, -4)
    labels = labels.expand(*heads, *labels.shape).reshape(-1, *labels.shape[1:])
    loss = F.nll_loss(log_p, labels, weights.to(log_p.dtype), ignore_index=NOT_ANNOTATED, reduction="none")
    return loss.reshape(*heads, -1).sum(dim=-1)


def weighted_cross_entropy(logits: Tensor, labels: Tensor, counts: Tensor) -> RatioTerms:
    """Cross-entropy in which frequent classes weigh less.

    value = sum_i w_{y_i} CE_i / sum_i w_{y_i}, with the weights of :func:`class_weights`. Both sums are over the
    annotated pixels, and 0 where there are none.

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W) int64.
        counts: (C,) pixels of each class in the global batch, see :func:`class_counts`.

    Source: the segmentation term of Eq. (2), Liu et al. 2022, which names no weights; weights as released.
    Differs from the released code: a batch of one class is the plain cross-entropy instead of NaN.
    """
    weights = class_weights(counts)
    numerator = weighted_cross_entropy_sum(logits, labels, weights)
    by_value = F.pad(weights.to(numerator.dtype), (0, NOT_ANNOTATED + 1 - len(weights)))
    return RatioTerms(numerator, by_value[labels].sum())


def soft_dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Soft Dice loss with squared denominator, of each image and class, background included.

    d_{b,c} = 2 sum_i p g / (sum_i p^2 + sum_i g^2 + 1e-5);  value = 1 - mean_{b,c} d_{b,c}.
    It is a plain mean over images: with equal local batches the mean over workers is the value of the global batch. The
    sums are over the annotated pixels; an image without any has d = 1, and so adds no loss and no gradient.

    Args:
        logits: (..., B, C, H, W); the result is (...), a value for each of several heads.
        labels: (B, H, W) int64.

    Source: the Dice term of Eq. (2), Liu et al. 2022; squares and constant as released.
    """
    labels = labels.flatten(1)[:, None, :]
    truth = labels == class_indices(logits.shape[-3], labels.device)[:, None]
    hidden = labels == NOT_ANNOTATED
    probabilities = F.softmax(at_least_float32(logits), dim=-3).flatten(-2).masked_fill(hidden, 0.0)
    intersection = (probabilities * truth).sum(dim=-1)
    total = probabilities.square().sum(dim=-1) + truth.sum(dim=-1)
    dice = 2.0 * intersection / (total + _DICE_EPS)
    return 1.0 - dice.masked_fill(hidden.all(dim=-1), 1.0).mean(dim=(-2, -1))


def focal_loss(logits: Tensor, labels: Tensor, gamma: float) -> RatioTerms:
    """Sum of (1 - p_y)^gamma (-log p_y) over the annotated pixels, and their number; cross-entropy for gamma = 0.

    p_y is kept within [1e-9, 1 - 1e-9]. Logits are (B, C, H, W), labels (B, H, W) int64.

    Source: the segmentation loss of the released code of Luo et al. 2019 (CLAN), with gamma = 2; the paper has
    cross-entropy.
    """
    annotated, labels = _annotated(labels)
    log_p = F.log_softmax(at_least_float32(logits), dim=1).gather(1, labels[:, None])[:, 0]
    log_p = log_p.clamp(min=math.log(1e-9))
    loss = (1.0 - log_p.exp()).clamp(min=1e-9) ** gamma * -log_p
    return RatioTerms((loss * annotated).sum(), annotated.sum().to(loss.dtype))


def self_information(logits: Tensor, eps: float = 1e-7, normalised: bool = True) -> Tensor:
    """Weighted self-information map of each class, the input of the discriminators.

    I_c = -p_c log(p_c + eps), (B, C, H, W) in float32 or float64.

    Args:
        logits: (B, C, H, W).
        eps: keeps the logarithm finite.
        normalised: the released form, divided by log C; False is the paper's, in nats.

    Source: text above Eq. (9), Liu et al. 2022.
    """
    probabilities = F.softmax(at_least_float32(logits), dim=1)
    scale = 1.0 / math.log(logits.shape[1]) if normalised else 1.0
    return probabilities * torch.log(probabilities + eps) * -scale


def domain_loss(domain_logits: Tensor, domain: int) -> Tensor:
    """Binary cross-entropy of a discriminator's logits against the label of one domain, mean over patches and batch.

    Args:
        domain_logits: any shape.
        domain: ``SOURCE_LABEL`` or ``TARGET_LABEL``.

    Source: Eqs. (9) and (10), Liu et al. 2022.
    Differs from the paper: source is 0 and target 1, as released; the loss is symmetric in the choice.
    """
    domain_logits = at_least_float32(domain_logits)
    # log(1 + e^x) is the loss against 0, log(1 + e^-x) against 1.
    return F.softplus(-domain_logits if domain == TARGET_LABEL else domain_logits).mean()


def least_squares_domain_loss(output: Tensor, domain: int) -> Tensor:
    """Mean squared distance of a discriminator's plain outputs to the label of one domain.

    Source: the least-squares variant of the released code of Tsai et al. 2018 (AdaptSegNet).
    """
    return (at_least_float32(output) - domain).square().mean()


def cosine_to_prototypes(features: Tensor, prototypes: Tensor) -> Tensor:
    """Cosine between every pixel's feature and every class's prototype.

    (B, C, h, w), float32 or float64. A vector of norm zero has cosine 0 with everything, and a finite gradient.

    Args:
        features: (B, d, h, w), raw; normalised here.
        prototypes: (C, d), raw; normalised here.

    Source: Eq. (6), Liu et al. 2022.
    """
    # Autocast and TF32 would round the factors of this product, which the sine near cosine 1 cannot afford.
    with torch.autocast(features.device.type, enabled=False):
        features = at_least_float32(features)
        directions = at_least_float32(prototypes)
        directions = (directions * _inverse_norm(directions)).to(features.dtype)
        product = exact_matmul(directions, features.flatten(2))
        return product.reshape(*product.shape[:2], *features.shape[2:]) * _inverse_norm(features)


def exact_matmul(one: Tensor, other: Tensor) -> Tensor:
    """Matrix product of factors of one dtype, in that dtype, without the rounding of TF32.

    TF32 is a switch of the process that does not apply to float64, so a GPU multiplies in float64.
    """
    exact = torch.float64 if one.is_cuda else one.dtype
    return torch.matmul(one.to(exact), other.to(exact)).to(one.dtype)


def margin_contrastive_loss(
    cosine: Tensor,
    labels: Tensor,
    margin: float,
    temperature: float,
    base_temperature: float = 1.0,
    form: MarginForm = "released",
    weights: Tensor | None = None,
) -> RatioTerms:
    """Margin preserving contrastive loss of pixels against prototypes.

    With theta_j the angle to prototype j, y the label, m the margin, t the temperature:

    - ``paper``: l = -log( e^{cos(theta_y + m)/t} / (e^{cos(theta_y + m)/t} + sum_{j != y} e^{cos(theta_j)/t}) ).
    - ``released``: phi(c) = c cos m - sqrt(clamp(1 - c^2, 1e-4, 1)) sin m, or c - m sin m where theta > pi - m;
      q = (phi(c_y) - max_k phi(c_k))/t and a_j = (c_j - max_k c_k)/t, both maxima without gradient;
      l = -(t / base_temperature) (q - log(e^q + sum_{j != y} e^{a_j} + 1e-4)).
      Where the label already has the largest cosine its value does not depend on m; the gradient of c_y does, by the
      factor cos m + sin m cot(theta_y).

    Args:
        cosine: (B, C, h, w) from :func:`cosine_to_prototypes`.
        labels: (B, h, w) int64.
        margin: m, radians in [0, pi/2].
        temperature: t.
        base_temperature: only in the released form.
        form: ``released`` or ``paper``.
        weights: (B, h, w), bool or float: the self-paced mask. None counts every pixel.

    Returns:
        numerator: sum of weights times loss over annotated pixels; denominator: sum of these weights (number of
        annotated pixels without weights). For the
        target domain the released code adds ``MASK_EPS`` to the denominator: add it once, to the global sum.

    Source: Eq. (8), Liu et al. 2022.
    Differs from the paper: mean instead of sum over pixels, at feature resolution, as released.
    """
    cosine = at_least_float32(cosine)
    annotated, index = _annotated(labels)
    positive = cosine.gather(1, index[:, None])
    scale = 1.0
    if form == "paper":
        shifted = _shift_angle(positive, margin, _PAPER_SQUARED_SINE_FLOOR)
        logits = cosine.scatter(1, index[:, None], shifted) / temperature
    elif form == "released":
        # phi grows with the cosine, so its maximum over the classes is phi of the largest cosine.
        largest = cosine.detach().amax(dim=1, keepdim=True)
        phi, largest_phi = _released_phi(torch.stack([positive, largest]), margin).unbind()
        logits = (cosine - largest).scatter(1, index[:, None], phi - largest_phi) / temperature
        # The constant inside the logarithm, as the logit of one more class.
        logits = F.pad(logits, (0, 0, 0, 0, 0, 1), value=math.log(_LOG_EPS))
        scale = temperature / base_temperature
    else:
        raise ValueError(f"the margin form must be 'released' or 'paper', got {form!r}")
    loss = F.cross_entropy(logits, labels, ignore_index=NOT_ANNOTATED, reduction="none")
    if weights is not None:
        loss, annotated = loss * weights, annotated * weights
    return RatioTerms(loss.sum() * scale, annotated.sum(dtype=loss.dtype))


def _annotated(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where labels are annotated, as bool; and labels with class 0 elsewhere, so that they can be indices."""
    annotated = labels != NOT_ANNOTATED
    return annotated, labels * annotated


def _inverse_norm(x: Tensor) -> Tensor:
    """1 / |x| along dimension 1 (kept), and 1 with zero gradient where |x| is zero."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return norm.masked_fill(norm <= _NORM_FLOOR, 1.0).reciprocal()


def _shift_angle(cosine: Tensor, margin: float, squared_sine_floor: float) -> Tensor:
    """cos(theta + margin) of cos(theta), theta in [0, pi]; the floor keeps the gradient of the sine finite."""
    sine = (1.0 - cosine.square()).clamp(min=squared_sine_floor).sqrt()
    return torch.sub(cosine * math.cos(margin), sine, alpha=math.sin(margin))


def _released_phi(cosine: Tensor, margin: float) -> Tensor:
    phi = _shift_angle(cosine, margin, _RELEASED_SQUARED_SINE_FLOOR)
    # Keeps phi monotonic past pi. Never reached after a ReLU, where cosines are not negative.
    return torch.where(cosine > math.cos(math.pi - margin), phi, cosine - margin * math.sin(math.pi - margin))
