"""Base class of the methods that train a DeepLab: all of a method but its step."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from mpscl_ray.config import SegmentationConfig
from mpscl_ray.config.schema import NetworkConfig
from mpscl_ray.distributed import collectives
from mpscl_ray.distributed.batch_norm import PerDomainForward
from mpscl_ray.distributed.recompute import recompute_in_backward
from mpscl_ray.methods import base
from mpscl_ray.methods.base import Method
from mpscl_ray.methods.losses import at_least_float32, class_counts
from mpscl_ray.methods.optim import SEGMENTER_OPTIMISERS, NetworkAdam, Optimiser, Optimisers, autocast, prepare_network
from mpscl_ray.networks.deeplab import Bottleneck, DeepLabV2, SegmenterOutput, upsample_logits

Config = TypeVar("Config", bound=SegmentationConfig)


class SegmenterMethod(Method, Generic[Config]):
    """A segmenter with its optimiser, and other networks with one Adam each: forward passes, prediction, state.

    A subclass adds to ``networks`` what it trains besides the segmenter. It computes its losses in :meth:`step` from
    what :meth:`forward` returns, between ``optimisers.start_iteration`` and ``optimisers.step``, and adds to the state
    what it has besides networks.
    """

    segmenter: DeepLabV2
    config: Config

    segmenter_arguments: ClassVar[dict[str, Any]] = {}
    """Arguments of the segmenter that this method needs."""

    target_inputs: int = 1
    """How many inputs of :meth:`forward` are slices of the target. Set before ``__init__`` of this class."""

    @classmethod
    def network_arguments(cls, network: NetworkConfig, config: Any, num_classes: int) -> dict[str, Any]:
        arguments = dataclasses.asdict(network)
        for key in ("pretrained", "pretrained_heads", "pretrained_prototypes"):
            del arguments[key]
        return {"kind": "deeplab", "num_classes": num_classes, **arguments, **cls.segmenter_arguments}

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        prepare_network(self.segmenter, self.device, self.precision)
        if self.optim.recompute:
            recompute_in_backward(layer for layer in self.segmenter.modules() if isinstance(layer, Bottleneck))
        # Both domains update the running statistics, or the target alone, whose inputs come after that of the source.
        target_alone = getattr(self.config, "bn_running_stats", None) == "target"
        update_running_stats = (False, *[True] * self.target_inputs) if target_alone else None
        both = PerDomainForward(self.segmenter, update_running_stats, self.optim.accumulate)
        self._wrapped = collectives.wrap(both, self.device)
        self.networks = {"segmenter": self.segmenter}
        self.may_skip = self.optim.max_skipped_steps
        self.optimisers = Optimisers(self.networks, self.device, self.may_skip)

    def start_phase(self, iterations: int) -> None:
        optim = self.optim
        fresh: dict[str, Optimiser] = {
            name: NetworkAdam(network, optim.lr_discriminator, optim.betas, optim.poly_power)
            for name, network in self.networks.items()
        }
        fresh["segmenter"] = SEGMENTER_OPTIMISERS[optim.kind](self.segmenter, optim)
        self.optimisers.start(fresh, iterations)

    def forward(self, *images: Tensor) -> tuple[SegmenterOutput, ...]:
        """Outputs for the slices (B, 1, H, W) of each domain, the source first.

        One forward of both domains for one backward: gradient averaging allows no more.
        """
        inputs = base.to_network(torch.cat(images), self.segmenter, self.precision).chunk(len(images))
        with autocast(self.device, self.precision):
            outputs: tuple[SegmenterOutput, ...] = self._wrapped(*inputs)
        return outputs

    def forward_logits(self, *images: Tensor) -> list[dict[str, Tensor]]:
        """Logits (B, C, H, W) of each domain by head, from :meth:`forward`."""
        return base.upsampled(images[0].shape[-2:], *self.forward(*images))

    def segmentation_loss(
        self, logits: dict[str, Tensor], labels: Tensor, counts: Tensor | None = None
    ) -> base.SegmentationLoss:
        """L_seg, see :func:`~mpscl_ray.methods.base.segmentation_loss`, or ``batch_segmentation_loss`` there.

        ``counts`` are computed where they are None.
        """
        c = self.config
        if counts is None:
            counts = collectives.all_reduce_sum(class_counts(labels, self.num_classes))
        if c.segmentation_loss == "plain":
            floor = c.class_weight_floor
            return base.batch_segmentation_loss(logits, labels, counts, c.segmentation_aux_weight, floor)
        return base.segmentation_loss(logits, labels, counts, c.segmentation_aux_weight)

    def evaluate(self, images: Tensor) -> SegmenterOutput:
        """Outputs for slices (B, 1, H, W), in evaluation mode, without gradient."""
        return base.evaluate(self.segmenter, images.to(self.device), self.precision)

    def features(self, images: Tensor) -> Tensor:
        """Features (B, d, h, w) of slices (B, 1, H, W), in evaluation mode, without gradient."""
        return self.evaluate(images).features

    def predict(self, images: Tensor) -> Tensor:
        logits = self.segmenter.prediction(self.evaluate(images))
        return upsample_logits(at_least_float32(logits), images.shape[-2:]).softmax(dim=1)

    def diagnostics(self) -> dict[str, Tensor]:
        return self.optimisers.diagnostics()

    def non_finite_losses(self) -> dict[str, Tensor]:
        return self.optimisers.guard.losses()

    def state_dict(self) -> dict[str, Any]:
        networks = {name: network.state_dict() for name, network in self.networks.items()}
        return {"networks": networks, **self.optimisers.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        base.load_networks(self.networks, state["networks"])
        self.optimisers = Optimisers(self.networks, self.device, self.may_skip)
        if state["phase"]["iterations"]:
            self.start_phase(state["phase"]["iterations"])
            self.optimisers.load_state_dict(state)
