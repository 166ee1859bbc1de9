"""Mean teacher: self-training with distribution-aligned, class-balanced pseudo-labels. A method of this project."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpscl_ray.config import MeanTeacherConfig
from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.data.sampler import derive_seed, splitmix64
from mpscl_ray.distributed import collectives
from mpscl_ray.methods import base
from mpscl_ray.methods.base import Batch, TrainingSlices
from mpscl_ray.methods.losses import class_counts
from mpscl_ray.methods.optim import SEGMENTER_OPTIMISERS, Optimisers, prepare_network
from mpscl_ray.methods.segmenter_method import SegmenterMethod
from mpscl_ray.networks.deeplab import DeepLabV2, SegmenterOutput

SHARE_MOMENTUM = 0.95
"""Share of the old class shares of the target that one update keeps."""

CONFIDENCE_MOMENTUM = 0.9
"""Share of the old thresholds that one update keeps."""

_SMALLEST_SHARE = 1e-6
"""Keeps the quotient of class shares finite."""


class MeanTeacher(SegmenterMethod[MeanTeacherConfig]):
    """A student follows labels of the source and pseudo-labels of the target; its moving average is the teacher.

    The teacher labels the target, with its class shares drawn to those of the source, where it is as confident as it
    usually is of that class. The student sees the same slices with another appearance. The network "segmenter", which
    predicts, is the teacher; "student" is trained.

    Source: teacher as Tarvainen and Valpola 2017; distribution alignment as Berthelot et al. 2020 (ReMixMatch); a
    threshold for each class, the running mean confidence, after Wang et al. 2023 (FreeMatch); pasted structures as
    Olsson et al. 2021 (ClassMix), from the source as Tranheden et al. 2021 (DACS).
    Differs from all of them: alignment and thresholds are those of the step before, so that a step needs one sum over
    the workers for both.
    """

    target_views = 2

    def __init__(self, segmenter: DeepLabV2, *arguments: Any, **named: Any) -> None:
        self.teacher = copy.deepcopy(segmenter)  # before the segmenter is wrapped
        super().__init__(segmenter, *arguments, **named)
        prepare_network(collectives.broadcast_parameters(self.teacher.to(self.device)), self.device, self.precision)
        self.teacher.requires_grad_(False)
        self.networks = {"segmenter": self.teacher, "student": self.segmenter}
        self.optimisers = Optimisers(self.networks, self.device)
        self.guard = self.config.guard
        uniform = torch.full((self.num_classes,), 1 / self.num_classes, dtype=torch.float64, device=self.device)
        self.source_shares, self.target_shares, self.thresholds = uniform, uniform, uniform

    def start_phase(self, iterations: int) -> None:
        self.optimisers.start(
            {"student": SEGMENTER_OPTIMISERS[self.optim.kind](self.segmenter, self.optim)}, iterations
        )

    @torch.no_grad()
    def prepare(self, slices: TrainingSlices) -> None:
        """Start the student from the teacher's weights, and the class statistics from all training slices."""
        self.segmenter.load_state_dict(self.teacher.state_dict())
        pixels = torch.zeros_like(self.source_shares)
        for _, label in slices.labelled():
            pixels += class_counts(label.to(self.device), self.num_classes)
        sums = torch.zeros(3, self.num_classes, dtype=torch.float64, device=self.device)
        for _, image in slices.unlabelled():
            sums += torch.stack(class_sums(self.predict(image)))
        pixels, sums = collectives.all_reduce_sums(pixels, sums)
        posterior, confidence, number = sums
        self.source_shares = pixels / pixels.sum()
        self.target_shares = posterior / posterior.sum()
        self.thresholds = torch.where(number > 0, confidence / number.clamp(min=1), self.thresholds)

    def step(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        c = self.config
        labels = batch.source_label
        source, target = batch.images
        self.optimisers.start_iteration(iteration)

        # The teacher labels the target; the student sees it with another appearance.
        posterior = self.predict(target)
        aligned = align(posterior, self.source_shares, self.target_shares, c.alignment)
        pseudo_labels = confident_labels(aligned, self.thresholds)
        view = target if batch.target_view is None else batch.target_view
        if c.mixing > 0:
            pasted = self._pasted(labels, iteration)
            view = torch.where(pasted[:, None], source, view)
            pseudo_labels = torch.where(pasted, labels, pseudo_labels)

        # Statistics of the global batch, in one collective.
        counts, selected, shares, confidence, number = collectives.all_reduce_sums(
            class_counts(labels, self.num_classes),
            class_counts(pseudo_labels, self.num_classes),
            posterior.double().sum(dim=(0, 2, 3)),
            *class_sums(aligned)[1:],
        )

        # The student learns both with the same loss.
        source_logits, target_logits = self.forward_logits(source, view)
        on_source = self.segmentation_loss(source_logits, labels, counts)
        on_target = self.segmentation_loss(target_logits, pseudo_labels, selected)
        weight = c.target_weight * min(1.0, (iteration + 1) / max(1, c.ramp))
        (on_source.total + weight * on_target.total).backward()  # type: ignore[no-untyped-call]
        losses = on_source.parts | {"loss_pseudo_labels": on_target.total}

        # Nothing is updated unless all of it is finite on all workers.
        flag = self.optimisers.step(losses)
        self._update_statistics(shares / shares.sum(), confidence, number, flag)
        self._update_teacher(iteration, flag)
        metrics = {
            "loss_segmentation": on_source.total,
            "pseudo_label_fraction": (pseudo_labels != NOT_ANNOTATED).double().mean(),
            "teacher_confidence": confidence.sum() / number.sum(),
        }
        return base.metrics(losses, metrics, non_finite=flag)

    @torch.no_grad()
    def _update_teacher(self, iteration: int, flag: Tensor) -> None:
        """theta' <- m theta' + (1 - m) theta, running statistics likewise; nothing where the flag is set."""
        m = min(self.config.ema, 1 - 1 / (iteration + 10))
        pairs = zip(self.teacher.state_dict().values(), self.segmenter.state_dict().values(), strict=True)
        for mine, students in pairs:
            if mine.is_floating_point():
                mine.lerp_(students, ((1 - m) * (1 - flag)).to(mine.dtype))
            else:
                mine.copy_(students)
        if self.config.share_matching and iteration + 1 == self.optimisers.iterations:
            # A posterior times a factor is a logit plus its logarithm, here in the bias of the head that predicts.
            quotient = self.source_shares.clamp(min=_SMALLEST_SHARE) / self.target_shares.clamp(min=_SMALLEST_SHARE)
            bias = self.teacher.layer6.conv2d_list[0].get_parameter("bias")
            bias.add_(self.config.share_matching * quotient.log() * (1 - flag))

    def _update_statistics(self, shares: Tensor, confidence: Tensor, number: Tensor, flag: Tensor) -> None:
        """Move the target's class shares and the thresholds towards those of this step, from their global sums."""
        means = torch.where(number > 0, confidence / number.clamp(min=1), self.thresholds)
        new_shares = SHARE_MOMENTUM * self.target_shares + (1 - SHARE_MOMENTUM) * shares
        new_thresholds = CONFIDENCE_MOMENTUM * self.thresholds + (1 - CONFIDENCE_MOMENTUM) * means
        self.target_shares = torch.where(flag > 0, self.target_shares, new_shares)
        self.thresholds = torch.where(flag > 0, self.thresholds, new_thresholds)

    def _pasted(self, labels: Tensor, iteration: int) -> Tensor:
        """Where source slices, with these labels (B, H, W), are pasted into the target slices beside them."""
        draws = np.arange(collectives.world_size() * len(labels) * self.num_classes)
        keys = splitmix64(draws, derive_seed(self.seed, "mixing", iteration)).reshape(-1, self.num_classes)
        chosen = keys[len(labels) * collectives.rank() :][: len(labels)] < self.config.mixing * 2.0**64
        chosen[:, 0] = False  # the background is no structure
        structures = torch.from_numpy(chosen).to(labels.device)
        classes = torch.arange(self.num_classes, device=labels.device)
        return ((labels[..., None] == classes) & structures[:, None, None]).any(dim=-1)

    def evaluate(self, images: Tensor) -> SegmenterOutput:
        """Outputs of the teacher for slices (B, 1, H, W), in evaluation mode, without gradient."""
        return base.evaluate(self.teacher, images.to(self.device), self.precision)

    def _statistics(self) -> dict[str, Tensor]:
        names = ("source_shares", "target_shares", "thresholds")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "statistics": self._statistics()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for name, own in self._statistics().items():
            setattr(self, name, state["statistics"][name].to(own, copy=True))


def align(probabilities: Tensor, source_shares: Tensor, target_shares: Tensor, exponent: float) -> Tensor:
    """Distribution alignment: p_k (r_k / q_k)^exponent, renormalised.

    Args:
        probabilities: p, (B, C, H, W).
        source_shares: r, (C,), of pixels with each label of the source.
        target_shares: q, (C,), running mean of p.
        exponent: 0 changes nothing.

    Source: Berthelot et al. 2020 (ReMixMatch), section 3.1; the exponent is ours.
    """
    factors = (source_shares / target_shares.clamp(min=_SMALLEST_SHARE)) ** exponent
    weighted = probabilities * factors.to(probabilities.dtype)[:, None, None]
    return weighted / weighted.sum(dim=1, keepdim=True)


def confident_labels(probabilities: Tensor, thresholds: Tensor) -> Tensor:
    """The most likely class (B, H, W) int64 where its probability reaches its threshold, elsewhere ``NOT_ANNOTATED``.

    Probabilities are (B, C, H, W), thresholds (C,).
    """
    confidence, labels = probabilities.max(dim=1)
    return torch.where(confidence >= thresholds.to(confidence.dtype)[labels], labels, NOT_ANNOTATED)


def class_sums(probabilities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each class, from probabilities (B, C, H, W): three sums (C,) float64, ready to be added over workers.

    They are the sum of its probability, the sum of the confidence over pixels where it is the most likely class, and
    the number of these.
    """
    confidence, labels = probabilities.max(dim=1)
    number = probabilities.shape[1]
    classes = torch.arange(number, device=labels.device)
    members = (labels.reshape(1, -1) == classes[:, None]).double()
    return probabilities.double().sum(dim=(0, 2, 3)), members @ confidence.reshape(-1).double(), members.sum(dim=1)
