"""Mean teacher: self-training with distribution-aligned, class-balanced pseudo-labels. A method of this project."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpscl_ray.config import MeanTeacherConfig
from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.data.sampler import derive_seed, splitmix64
from mpscl_ray.distributed import collectives
from mpscl_ray.errors import DataError
from mpscl_ray.methods import base
from mpscl_ray.methods.adabn import estimate_statistics
from mpscl_ray.methods.base import Batch, TrainingSlices
from mpscl_ray.methods.contrast import Contrasted, contrastive_losses, source_prototypes
from mpscl_ray.methods.histograms import QUANTILES, class_quantiles, match_histograms, mean_quantiles, sums_over_slices
from mpscl_ray.methods.losses import annotated_pixels, class_counts, cosine_to_prototypes
from mpscl_ray.methods.optim import SEGMENTER_OPTIMISERS, Optimisers, prepare_network
from mpscl_ray.methods.prototypes import clearly_nearest, downsample_labels, prototype_sums, update_prototypes
from mpscl_ray.methods.pseudo_labels import align, class_sums, confident_labels, jensen_shannon, share_quotient
from mpscl_ray.methods.segmenter_method import SegmenterMethod
from mpscl_ray.networks.deeplab import DeepLabV2, SegmenterOutput

SHARE_MOMENTUM = 0.95
"""Share of the old class shares of the target that one update keeps."""

CONFIDENCE_MOMENTUM = 0.9
"""Share of the old thresholds that one update keeps."""

HISTOGRAM_MOMENTUM = 0.9
"""Share of the old histograms of the target's classes that one update keeps."""

NEEDED_BY = {"prototypes": "contrast", "histograms": "histogram_matching"}
"""Statistics that are kept only where this setting is above 0."""


class MeanTeacher(SegmenterMethod[MeanTeacherConfig]):
    """A student follows labels of the source and pseudo-labels of the target; its moving average is the teacher.

    The teacher labels the target, with its class shares drawn to those of the source, where it is as confident as it
    usually is of that class. Source slices take the intensities that each class has, by these labels, in the target, so
    that true labels train the student on the target's appearance; and the student sees the target with another one. The
    network "segmenter", which predicts, is the teacher; "student" is trained.

    Source: teacher as Tarvainen and Valpola 2017; distribution alignment as Berthelot et al. 2020 (ReMixMatch); a
    threshold for each class, the running mean confidence, after Wang et al. 2023 (FreeMatch); pasted structures as
    Olsson et al. 2021 (ClassMix), from the source as Tranheden et al. 2021 (DACS); two views that agree after Hendrycks
    et al. 2020 (AugMix); contrast with prototypes of the source, Liu et al. 2022 (MPSCL).
    Differs from MPSCL: pixels of the target are drawn to the prototype of the teacher's label instead of the nearest
    one, and Eq. (7) is only a veto.
    Differs from all of them: alignment and thresholds are those of the step before, so that a step needs one sum over
    the workers for both.
    """

    target_views = 2

    def __init__(self, segmenter: DeepLabV2, config: MeanTeacherConfig, *arguments: Any, **named: Any) -> None:
        self.teacher = copy.deepcopy(segmenter)  # before the segmenter is wrapped
        self.target_inputs = 2 if config.consistency > 0 else 1
        self.original_source = config.histogram_matching > 0
        super().__init__(segmenter, config, *arguments, **named)
        prepare_network(collectives.broadcast_parameters(self.teacher.to(self.device)), self.device, self.precision)
        self.teacher.requires_grad_(False)
        self.networks = {"segmenter": self.teacher, "student": self.segmenter}
        self.optimisers = Optimisers(self.networks, self.device, self.may_skip)
        self.guard = self.config.guard
        uniform = torch.full((self.num_classes,), 1 / self.num_classes, dtype=torch.float64, device=self.device)
        self.source_shares, self.target_shares, self.thresholds = uniform, uniform, uniform
        shape = self.num_classes, segmenter.feature_channels
        self.prototypes = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self.histograms = torch.zeros(self.num_classes, QUANTILES, dtype=self.dtype, device=self.device)

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
        pixels = collectives.all_reduce_sum(pixels)
        posterior, confidence, number = self._sums_of_target(slices)
        self.source_shares = pixels / annotated_pixels(pixels)
        self.target_shares = posterior / posterior.sum()
        self.thresholds = torch.where(number > 0, confidence / number.clamp(min=1), self.thresholds)
        if self.config.contrast > 0:
            self.prototypes = source_prototypes(self.features, slices.labelled(), self.prototypes)
        if self.config.histogram_matching > 0:
            labelled = ((image.to(self.device), label.to(self.device)) for image, label in slices.labelled())
            taught = ((image, self._pseudo_labels(self.predict(image))[1]) for _, image in slices.unlabelled())
            self.histograms = mean_quantiles(taught, mean_quantiles(labelled, self.histograms))

    def step(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        c = self.config
        labels = batch.source_label
        source, target = batch.images
        self.optimisers.start_iteration(iteration)

        # The teacher labels the target. Some slices of the source take the intensities that its classes have there.
        posterior = self.predict(target)
        aligned, pseudo_labels = self._pseudo_labels(posterior)
        if c.histogram_matching > 0:
            histograms = class_quantiles(target, pseudo_labels, self.num_classes)
            source = self._matched(batch, histograms, iteration)

        # The student sees the target with another appearance, and structures of the source.
        pasted = self._pasted(labels, iteration)
        pseudo_labels = torch.where(pasted, labels, pseudo_labels)
        view = torch.where(pasted[:, None], source, target if batch.target_view is None else batch.target_view)
        outputs = self.forward(source, view, *([target] if c.consistency > 0 else []))
        source_logits, *target_logits = base.upsampled(labels.shape[-2:], *outputs)

        # Statistics of the global batch, in one collective.
        counts, selected, shares, confidence, number, *others = collectives.all_reduce_sums(
            class_counts(labels, self.num_classes),
            class_counts(pseudo_labels, self.num_classes),
            posterior.double().sum(dim=(0, 2, 3)),
            *class_sums(aligned)[1:],
            *(self._feature_sums(outputs[0], labels) if c.contrast > 0 else ()),
            *(sums_over_slices(histograms) if c.histogram_matching > 0 else ()),
        )

        # The student learns labels and pseudo-labels with the same loss.
        on_source = self.segmentation_loss(source_logits, labels, counts)
        losses = {"loss_pseudo_labels": self.segmentation_loss(target_logits[0], pseudo_labels, selected).total}
        if c.consistency > 0:
            divergence = jensen_shannon(*(logits["main"] for logits in target_logits))
            losses["loss_consistency"] = (divergence * ~pasted).mean()
        metrics, prototypes = {"loss_segmentation": on_source.total}, self.prototypes
        if c.contrast > 0:
            sums, pixels, *others = others
            prototypes = update_prototypes(prototypes, sums, pixels, c.alpha)
            contrast, agreeing = self._contrast(outputs, labels, pseudo_labels, prototypes, pixels)
            losses |= contrast
            metrics["contrast_fraction"] = agreeing.double().mean()
        weights = self._weights(iteration)
        total = sum((weights[name] * loss for name, loss in losses.items()), on_source.total)
        total.backward()  # type: ignore[no-untyped-call]

        # Nothing is updated unless all of it is finite on all workers.
        losses = on_source.parts | losses
        flag = self.optimisers.step(losses)
        self._update_statistics(shares / shares.sum(), confidence, number, prototypes, flag)
        if c.histogram_matching > 0:
            self._update_histograms(others[0], others[1], flag)
        self._update_teacher(iteration, flag)
        metrics["pseudo_label_fraction"] = (pseudo_labels != NOT_ANNOTATED).double().mean()
        metrics["teacher_confidence"] = confidence.sum() / number.sum()
        return base.metrics(losses, metrics, non_finite=flag)

    def _pseudo_labels(self, posterior: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's aligned class probabilities (B, C, H, W), and its labels (B, H, W) where it is confident."""
        aligned = align(posterior, self.source_shares, self.target_shares, self.config.alignment)
        return aligned, confident_labels(aligned, self.thresholds)

    def _weights(self, iteration: int) -> dict[str, float]:
        """Of the losses beside that on source labels; those of the target grow over the first iterations."""
        c = self.config
        ramp = min(1.0, (iteration + 1) / max(1, c.ramp))
        return {
            "loss_pseudo_labels": ramp * c.target_weight,
            "loss_consistency": ramp * c.consistency,
            "loss_contrastive_source": c.contrast,
            "loss_contrastive_target": ramp * c.contrast,
        }

    def _feature_sums(self, source: SegmenterOutput, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum (C, d) of the source's features of each class, and its number of pixels (C,)."""
        features = source.features
        return prototype_sums(features, downsample_labels(labels, features.shape[2:]), self.num_classes)

    def _contrast(
        self,
        outputs: Sequence[SegmenterOutput],
        labels: Tensor,
        pseudo_labels: Tensor,
        prototypes: Tensor,
        pixels: Tensor,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Eq. (8) of MPSCL with pseudo-labels of the teacher, and the target pixels (B, h, w) that take part.

        These are clearly nearest to the prototype of their label, by Eq. (7). ``pixels`` (C,) are the numbers of those
        of each class in the global source batch.
        """
        source, target = (
            Contrasted(cosine_to_prototypes(x.features, prototypes), downsample_labels(y, x.features.shape[2:]))
            for x, y in zip(outputs, (labels, pseudo_labels), strict=False)
        )
        agreeing = clearly_nearest(*target, self.config.delta_th)
        return contrastive_losses(self.config, source, target, agreeing, annotated_pixels(pixels)), agreeing

    @torch.no_grad()
    def end_phase(self, slices: TrainingSlices) -> bool:
        """Correct the teacher: its batch statistics by those of the target, then its class shares."""
        c = self.config
        if c.adabn:
            images = (image.to(self.device) for image in slices.synchronised_target_batches())
            estimate_statistics(self.teacher, images, self.precision)
        if c.share_matching > 0:
            posterior, _, _ = self._sums_of_target(slices)
            self.target_shares = posterior / posterior.sum()
            # A posterior times a factor is a logit plus its logarithm, here in the bias of the head that predicts.
            bias = self.teacher.layer6.conv2d_list[0].get_parameter("bias")
            bias.add_(c.share_matching * share_quotient(self.source_shares, self.target_shares).log())
        return c.adabn or c.share_matching > 0

    def _sums_of_target(self, slices: TrainingSlices) -> list[Tensor]:
        """:func:`class_sums` of the teacher's predictions of all target slices, over all workers."""
        sums = torch.zeros(3, self.num_classes, dtype=torch.float64, device=self.device)
        for _, image in slices.unlabelled():
            sums += torch.stack(class_sums(self.predict(image)))
        return list(collectives.all_reduce_sum(sums))

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

    def _update_statistics(
        self, shares: Tensor, confidence: Tensor, number: Tensor, prototypes: Tensor, flag: Tensor
    ) -> None:
        """Move the target's class shares and the thresholds towards those of this step, from their global sums.

        The prototypes are the new ones.
        """
        means = torch.where(number > 0, confidence / number.clamp(min=1), self.thresholds)
        new_shares = SHARE_MOMENTUM * self.target_shares + (1 - SHARE_MOMENTUM) * shares
        new_thresholds = CONFIDENCE_MOMENTUM * self.thresholds + (1 - CONFIDENCE_MOMENTUM) * means
        self.target_shares = torch.where(flag > 0, self.target_shares, new_shares)
        self.thresholds = torch.where(flag > 0, self.thresholds, new_thresholds)
        self.prototypes = torch.where(flag > 0, self.prototypes, prototypes)

    def _update_histograms(self, sums: Tensor, number: Tensor, flag: Tensor) -> None:
        """Move the mean histograms (C, Q) of the target's classes towards those of this step, from global sums."""
        means = torch.where(number > 0, sums / number.clamp(min=1), self.histograms)
        moved = HISTOGRAM_MOMENTUM * self.histograms + (1 - HISTOGRAM_MOMENTUM) * means
        self.histograms = torch.where(flag > 0, self.histograms, moved)

    def _matched(self, batch: Batch, histograms: Tensor, iteration: int) -> Tensor:
        """Source slices, some of them with the histograms (B, C, Q) of the target slices beside them.

        For a class that such a slice lacks it is the mean one of the target.
        """
        original = batch.source_image if batch.source_original is None else batch.source_original
        wanted = torch.where(histograms.isnan(), self.histograms.to(histograms), histograms)
        matched = match_histograms(original, batch.source_label, wanted)
        chosen = self._drawn("histogram_matching", iteration, (len(original), 1))
        return torch.where(chosen[:, :, None, None], matched, batch.source_image)

    def _pasted(self, labels: Tensor, iteration: int) -> Tensor:
        """Where source slices, with these labels (B, H, W), are pasted into the target slices beside them."""
        if self.config.mixing == 0:
            return torch.zeros_like(labels, dtype=torch.bool)
        structures = self._drawn("mixing", iteration, (len(labels), self.num_classes))
        structures[:, 0] = False  # the background is no structure
        classes = torch.arange(self.num_classes, device=labels.device)
        return ((labels[..., None] == classes) & structures[:, None, None]).any(dim=-1)

    def _drawn(self, setting: str, iteration: int, shape: tuple[int, int]) -> Tensor:
        """For each slice of this worker, whether it is drawn, ``shape`` times, with the probability of that setting."""
        size, columns = shape
        keys = splitmix64(
            np.arange(collectives.world_size() * size * columns), derive_seed(self.seed, setting, iteration)
        )
        mine = keys.reshape(-1, columns)[size * collectives.rank() :][:size]
        return torch.from_numpy(mine < getattr(self.config, setting) * 2.0**64).to(self.device)

    def evaluate(self, images: Tensor) -> SegmenterOutput:
        """Outputs of the teacher for slices (B, 1, H, W), in evaluation mode, without gradient."""
        return base.evaluate(self.teacher, images.to(self.device), self.precision)

    def _statistics(self) -> dict[str, Tensor]:
        always = ("source_shares", "target_shares", "thresholds")
        asked_for = [name for name, setting in NEEDED_BY.items() if getattr(self.config, setting) > 0]
        return {name: getattr(self, name) for name in (*always, *asked_for)}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "statistics": self._statistics()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for name, own in self._statistics().items():
            if name not in state["statistics"]:
                setting = NEEDED_BY[name]
                raise DataError(
                    f"the checkpoint has no {name}, which method.{setting}={getattr(self.config, setting):g} needs; "
                    f"resume with method.{setting}=0, or start another run from the end of its source-only phase"
                )
            setattr(self, name, state["statistics"][name].to(own, copy=True))
