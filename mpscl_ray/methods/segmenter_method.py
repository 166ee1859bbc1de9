"""Base class of the methods that train a DeepLab: all of a method but its step."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from mpscl_ray.config import OptimConfig, PrecisionConfig
from mpscl_ray.config.schema import NetworkConfig
from mpscl_ray.distributed import collectives
from mpscl_ray.distributed.batch_norm import PerDomainForward
from mpscl_ray.methods import base
from mpscl_ray.methods.adversarial import Adversary
from mpscl_ray.methods.base import Batch, TargetSplit, TrainingSlices
from mpscl_ray.methods.losses import at_least_float32
from mpscl_ray.methods.optim import (
    DiscriminatorAdam,
    Optimiser,
    Optimisers,
    SegmenterSGD,
    autocast,
    prepare_network,
)
from mpscl_ray.methods.prototypes import PrototypeClassifier
from mpscl_ray.networks.deeplab import DeepLabV2, SegmenterOutput, upsample_logits

Config = TypeVar("Config")


class SegmenterMethod(ABC, Generic[Config]):
    """A segmenter trained by SGD, and discriminators trained by one Adam each: forward passes, prediction, state.

    A subclass computes its losses in :meth:`step` from what :meth:`forward` returns, between
    ``optimisers.start_iteration`` and ``optimisers.step``. It builds its discriminators in :meth:`build_adversary`, and
    adds to the state what it has beside networks.
    """

    segmenter_arguments: ClassVar[dict[str, Any]] = {}
    """Arguments of the segmenter that this method needs."""

    split: TargetSplit | None = None
    prototype_classifier: PrototypeClassifier | None = None

    @classmethod
    def network_arguments(cls, network: NetworkConfig, config: Config, num_classes: int) -> dict[str, Any]:
        """The segmenter, as :func:`mpscl_ray.networks.build` takes it."""
        arguments = dataclasses.asdict(network)
        for key in ("pretrained", "pretrained_heads", "pretrained_prototypes"):
            del arguments[key]
        return {"kind": "deeplab", "num_classes": num_classes, **arguments, **cls.segmenter_arguments}

    def __init__(
        self,
        segmenter: DeepLabV2,
        config: Config,
        optim: OptimConfig,
        num_classes: int,
        device: torch.device,
        precision: PrecisionConfig,
        seed: int,
    ) -> None:
        self.segmenter, self.config, self.num_classes, self.seed = segmenter, config, num_classes, seed
        self.device, self.precision, self._optim = device, precision, optim
        self.dtype = next(segmenter.parameters()).dtype
        self.adversary = self.build_adversary()
        self._discriminators = self.adversary.networks
        prepare_network(segmenter, device, precision)
        # Both domains update the running statistics, or the second, the target, alone.
        update_running_stats = (False, True) if getattr(config, "bn_running_stats", "both") == "target" else None
        self._wrapped = collectives.wrap(PerDomainForward(segmenter, update_running_stats), device)
        self.networks: dict[str, nn.Module] = {"segmenter": segmenter, **self._discriminators}
        self.optimisers = Optimisers(self.networks, device)

    def build_adversary(self) -> Adversary:
        """The discriminators of the method; none by default."""
        return self.adversary_on(())

    def adversary_on(self, heads: Sequence[str], least_squares: bool = False) -> Adversary:
        """A discriminator for the maps of each of these heads, see :class:`Adversary`."""
        config: Any = self.config
        return Adversary(
            config, heads, self.num_classes, self.dtype, self.seed, self.device, self.precision, least_squares
        )

    def start_phase(self, iterations: int) -> None:
        fresh: dict[str, Optimiser] = {"segmenter": SegmenterSGD(self.segmenter, self._optim)}
        fresh |= {name: DiscriminatorAdam(network, self._optim) for name, network in self._discriminators.items()}
        self.optimisers.start(fresh, iterations)

    def prepare(self, slices: TrainingSlices) -> None:
        """Nothing by default: most methods need no pass over the training slices before their phase."""

    @abstractmethod
    def step(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """One training iteration, see :class:`~mpscl_ray.methods.base.Method`."""

    def forward(self, *images: Tensor) -> tuple[SegmenterOutput, ...]:
        """Outputs for the slices (B, 1, H, W) of each domain, the source first.

        One forward of both domains for one backward: gradient averaging allows no more.
        """
        inputs = [base.to_network(image, self.segmenter, self.precision) for image in images]
        with autocast(self.device, self.precision):
            outputs: tuple[SegmenterOutput, ...] = self._wrapped(*inputs)
        return outputs

    def evaluate(self, images: Tensor) -> SegmenterOutput:
        """Outputs for slices (B, 1, H, W), in evaluation mode, without gradient."""
        return base.evaluate(self.segmenter, images.to(self.device), self.precision)

    def predict(self, images: Tensor) -> Tensor:
        logits = self.segmenter.prediction(self.evaluate(images))
        return upsample_logits(at_least_float32(logits), images.shape[-2:]).softmax(dim=1)

    def non_finite_losses(self) -> dict[str, Tensor]:
        return self.optimisers.guard.losses()

    def state_dict(self) -> dict[str, Any]:
        networks = {name: network.state_dict() for name, network in self.networks.items()}
        return {"networks": networks, **self.optimisers.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        base.load_networks(self.networks, state["networks"])
        self.optimisers.reset_guard()
        if state["phase"]["iterations"]:
            self.start_phase(state["phase"]["iterations"])
            self.optimisers.load_state_dict(state)
