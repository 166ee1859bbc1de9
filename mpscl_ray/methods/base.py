"""What all methods share: the batch, the interface, and the supervised part of their losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mpscl_ray.config import OptimConfig, PrecisionConfig
from mpscl_ray.config.schema import NetworkConfig
from mpscl_ray.distributed import collectives
from mpscl_ray.errors import DataError
from mpscl_ray.methods.batch_losses import batch_dice_loss, floored_cross_entropy
from mpscl_ray.methods.losses import (
    annotated_pixels,
    at_least_float32,
    class_weights,
    focal_loss,
    soft_dice_loss,
    weighted_cross_entropy_sum,
)
from mpscl_ray.methods.optim import autocast
from mpscl_ray.methods.prototypes import PrototypeClassifier
from mpscl_ray.networks.deeplab import DeepLabV2, SegmenterOutput, network_input, upsample_logits


@dataclass(frozen=True)
class Batch:
    """A worker's part of one global batch. There is no field for a label of the target domain, on purpose."""

    source_image: Tensor
    """(B, 1, H, W) in [-1, 1]."""
    source_label: Tensor
    """(B, H, W) int64, class indices, or ``NOT_ANNOTATED`` where a pixel counts in no loss."""
    target_image: Tensor | None = None
    """(B, 1, H, W) in [-1, 1]; None for plain segmentation."""
    target_view: Tensor | None = None
    """The slices of target_image at the same place with another appearance; None unless ``Method.target_views`` is
    2."""
    source_original: Tensor | None = None
    """The slices of source_image at the same place with the appearance of their files; None unless
    ``Method.original_source``."""

    @property
    def images(self) -> tuple[Tensor, Tensor]:
        """Slices of source and target, for a method that needs both."""
        assert self.target_image is not None, "the method needs slices of the target domain"
        return self.source_image, self.target_image


@dataclass(frozen=True)
class TrainingSlices:
    """This worker's share of the training slices, un-augmented, for a pass over them before a phase.

    ``labelled`` and ``unlabelled`` give each slice once, in order. Shares may differ in length, so the loop must not
    contain a collective. A loop with one, as for batch statistics, takes the ``synchronised`` batches.
    """

    labelled: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    """Batches of (image (B, 1, H, W), label (B, H, W)) of the labelled domain."""
    synchronised_source_batches: Callable[[], Iterable[Tensor]]
    """This worker's parts, images (B, 1, H, W), of the global batches of one shuffled pass over the labelled domain.
    Every worker gets the same number of parts of the same size, so the last batch may repeat slices."""
    synchronised_target_batches: Callable[[], Iterable[Tensor]]
    """The same of the target."""
    unlabelled: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    """Batches of (rows (B,) int64, image (B, 1, H, W)) of the target; a row is the slice's number."""
    target_volumes: tuple[range, ...]
    """Rows of each volume of the target, over all workers, in the order of the volumes' ids."""
    size: tuple[int, int]
    """H and W."""
    source_only_weights: Callable[[], dict[str, Tensor]]
    """The segmenter's weights at the end of the source-only phase; the initial ones in a run without that phase."""
    pretrained_prototypes: Callable[[int, int], Tensor] | None = None
    """Loads the prototypes (C, d) of network.pretrained_prototypes, from C and d; None where no file is configured."""


@dataclass(frozen=True)
class TargetSplit:
    """A target split in two: pseudo-labelled slices replace the source in the batches."""

    easy: Tensor
    """(n,) int64 rows, ascending: they come as source_image, with their pseudo-labels."""
    hard: Tensor
    """(m,) int64 rows, ascending: they come as target_image."""
    pseudo_labels: Tensor
    """(n, H, W) uint8, of the easy rows."""


class Method(ABC):
    """A published method: owns its networks, optimisers and state, and runs one training step at a time.

    It is built from a segmenter with its initial weights, which it trains in place, the settings of the method and of
    the optimisers, the number of classes (with background), device, precision, and the seed of all random numbers.
    """

    networks: dict[str, nn.Module]
    """The trained networks, unwrapped: "segmenter" and those that the method adds."""

    split: TargetSplit | None = None
    """Where not None: which slices the batches of this phase are made of."""

    target_views: ClassVar[int] = 1
    """2 for a method whose batches also have a second view of the target slices, with an appearance drawn by
    ``data.augmentation``. Where that has neither mappings nor degradations, the view equals the slice."""

    original_source: bool = False
    """Whether batches also have the source slices without the changes of appearance of ``data.augmentation``."""

    guard: float | None = None
    """Where not None: the state before the first step competes for the best one, and a phase ends when the class-ratio
    agreement falls by more than this below its value there. The state with that agreement does not compete, and the
    phase ends with the best one instead."""

    may_skip: int = 0
    """Steps of a phase that may be skipped because a loss or gradient is not finite."""

    fixed_state: tuple[str, ...] = ()
    """Keys of :meth:`state_dict` whose tensors stay as :meth:`prepare` has left them to the end of the phase."""

    prototype_classifier: PrototypeClassifier | None = None
    """Assigns pseudo-labels by prototypes; None for a method without them. Its angles and labels are logged."""

    def __init__(
        self,
        segmenter: Any,
        config: Any,
        optim: OptimConfig,
        num_classes: int,
        device: torch.device,
        precision: PrecisionConfig,
        seed: int,
    ) -> None:
        self.segmenter, self.config, self.optim, self.num_classes = segmenter, config, optim, num_classes
        self.device, self.precision, self.seed = device, precision, seed
        self.dtype = next(segmenter.parameters()).dtype

    @classmethod
    @abstractmethod
    def network_arguments(cls, network: NetworkConfig, config: Any, num_classes: int) -> dict[str, Any]:
        """The segmenter that this method trains, as :func:`mpscl_ray.networks.build` takes it."""

    @abstractmethod
    def start_phase(self, iterations: int) -> None:
        """Begin a phase of so many iterations with fresh optimisers."""

    def prepare(self, slices: TrainingSlices) -> None:  # noqa: B027 - most methods need none
        """Prepare the phase with a pass over the training slices; by default nothing is needed.

        Called between :meth:`start_phase` and the first step, but not when a run resumes within the phase.
        """

    @abstractmethod
    def step(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """One training iteration, optimiser steps included, without waiting for the device.

        Args:
            batch: on the method's device, the same size on every worker; what is computed from
                images has the dtype of the segmenter's weights.
            iteration: of the phase, from 0.

        Returns:
            Detached 0-dim tensors whose mean over the workers is the global value: read them with
            ``collectives.reduce_metrics``. ``non_finite`` is 1 where nothing was updated: a loss or gradient was not
            finite on some worker, or more than ``may_skip`` steps before were so, and ``non_finite_losses`` has the
            losses of the one too many.
        """

    def end_phase(self, slices: TrainingSlices) -> bool:
        """Change the state after the last step, before the validation there; by default nothing is changed.

        Where the guard has ended the phase, this follows the return to the best state.

        Returns:
            Whether anything was changed.
        """
        return False

    def diagnostics(self) -> dict[str, Tensor]:
        """Numbers of the state as it is, to be reported beside those of a step: 0-dim, the same on every worker.

        ``skipped_steps`` is the number of steps of the phase that were not finite.
        """
        return {}

    @abstractmethod
    def non_finite_losses(self) -> dict[str, Tensor]:
        """This worker's component losses, by name, at the step from which on nothing is updated, if there was one."""

    @abstractmethod
    def predict(self, images: Tensor) -> Tensor:
        """Class probabilities (B, C, H, W) of slices (B, 1, H, W), in evaluation mode, without gradient."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that training resumes from: nested, of live tensors and plain values."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, the phase included.

        Raises:
            DataError: the state is of other networks.
        """


@dataclass(frozen=True)
class SegmentationLoss:
    """Weighted cross-entropy and Dice on both heads, each this worker's share."""

    total: Tensor
    """0-dim, with gradient: main terms plus the weighted auxiliary ones."""
    parts: dict[str, Tensor]
    """The unweighted terms by name."""


def segmentation_loss(logits: dict[str, Tensor], labels: Tensor, counts: Tensor, aux_weight: float) -> SegmentationLoss:
    """L_seg = CE_main + Dice_main + w_aux (CE_aux + Dice_aux).

    From logits (B, C, H, W) by head, "main" and perhaps "aux", labels (B, H, W) int64, and the counts (C,) of each
    class's pixels in the global batch.

    Source: the segmentation term of Eq. (2), Liu et al. 2022; auxiliary weight as released.
    """
    heads = torch.stack(list(logits.values()))
    weights = class_weights(counts)
    numerators = weighted_cross_entropy_sum(heads, labels, weights)
    # Sum over all pixels of the weight of their class: it follows from the global counts without another collective.
    # Where it is not 0, it is at least 1.
    weight_sum = (counts * weights).sum().clamp(min=1.0)
    entropy = collectives.ddp_ratio(numerators, weight_sum.to(numerators.dtype))
    dice = soft_dice_loss(heads, labels)
    parts: dict[str, Tensor] = {}
    for head, *values in zip(logits, entropy, dice, strict=True):
        parts[f"loss_cross_entropy_{head}"], parts[f"loss_dice_{head}"] = values
    main, *aux = entropy + dice
    return SegmentationLoss(sum((aux_weight * x for x in aux), main), parts)


def batch_segmentation_loss(
    logits: dict[str, Tensor], labels: Tensor, counts: Tensor, aux_weight: float, floor: float
) -> SegmentationLoss:
    """The same with no class weight below ``floor``, and with Dice of the global batch instead of each slice.

    Dice of a slice gives no gradient to false positives of a class that the slice lacks; that of the batch does.
    """
    parts: dict[str, Tensor] = {}
    totals = []
    for head, x in logits.items():
        entropy = floored_cross_entropy(x, labels, counts, floor)
        dice = batch_dice_loss(x, labels)
        parts[f"loss_cross_entropy_{head}"], parts[f"loss_dice_{head}"] = entropy, dice
        totals.append(entropy + dice)
    main, *aux = totals
    return SegmentationLoss(sum((aux_weight * x for x in aux), main), parts)


def mean_focal_loss(logits: Tensor, labels: Tensor, gamma: float, counts: Tensor) -> Tensor:
    """This worker's share of :func:`~mpscl_ray.methods.losses.focal_loss`, mean over the annotated global batch.

    ``counts`` (C,) are the pixels of each class in the global batch.
    """
    numerator = focal_loss(logits, labels, gamma).numerator
    return collectives.ddp_ratio(numerator, annotated_pixels(counts).to(numerator.dtype))


def upsampled(size: torch.Size, *outputs: SegmenterOutput) -> list[dict[str, Tensor]]:
    """Logits at image resolution of each output by head, "main" first; "aux" only if the segmenter has that head."""
    heads = ("main",) if outputs[0].aux is None else ("main", "aux")
    logits = torch.stack([getattr(output, head) for output in outputs for head in heads])
    large = upsample_logits(at_least_float32(logits).flatten(0, 1), size).reshape(*logits.shape[:3], *size).unbind()
    return [dict(zip(heads, large[start:], strict=False)) for start in range(0, len(large), len(heads))]


def to_network(image: Tensor, segmenter: DeepLabV2, precision: PrecisionConfig) -> Tensor:
    """Slices as the segmenter takes them, in the dtype of its weights."""
    x = network_input(image.to(segmenter.conv1.weight.dtype), segmenter.in_channels)
    return x.contiguous(memory_format=torch.channels_last) if precision.channels_last else x


@torch.no_grad()
def evaluate(segmenter: DeepLabV2, image: Tensor, precision: PrecisionConfig) -> SegmenterOutput:
    """Run the segmenter in evaluation mode, and leave it in the mode it was in."""
    was_training = segmenter.training
    segmenter.eval()
    with autocast(image.device, precision):
        output: SegmenterOutput = segmenter(to_network(image, segmenter, precision))
    segmenter.train(was_training)
    return output


def load_networks(networks: dict[str, nn.Module], state: dict[str, dict[str, Tensor]]) -> None:
    """Load each network's weights.

    Raises:
        DataError: a network is missing, or a tensor has another name or shape.
    """
    for name, network in networks.items():
        saved = state.get(name)
        if saved is None:
            raise DataError(
                f"the checkpoint has no network '{name}', only {sorted(state)}; was it made by another method?"
            )
        own = network.state_dict()
        for key in sorted(own.keys() | saved.keys()):
            found = tuple(saved[key].shape) if key in saved else "no such tensor"
            expected = tuple(own[key].shape) if key in own else "no such tensor"
            if found != expected:
                raise DataError(
                    f"the checkpoint does not fit the {name}: {key} is {found}, expected {expected}; "
                    "use the network settings that it was trained with"
                )
        network.load_state_dict(saved)


def metrics(*tables: dict[str, Tensor], non_finite: Tensor) -> dict[str, Tensor]:
    """What a step returns: its numbers, detached."""
    return {name: value.detach() for table in (*tables, {"non_finite": non_finite}) for name, value in table.items()}
