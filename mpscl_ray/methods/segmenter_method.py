"""What the methods with a DeepLab have in common: all of a method but its step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from mpscl_ray.config import OptimConfig, PrecisionConfig
from mpscl_ray.methods import base
from mpscl_ray.methods.adversarial import Adversary
from mpscl_ray.methods.base import Batch, TargetSplit, TrainingSlices
from mpscl_ray.methods.optim import (
    DiscriminatorAdam,
    Optimiser,
    Optimisers,
    SegmenterSGD,
    autocast,
    prepare_network,
)
from mpscl_ray.networks.deeplab import DeepLabV2, SegmenterOutput

Config = TypeVar("Config")


class SegmenterMethod(ABC, Generic[Config]):
    """A segmenter that SGD trains, and the discriminators beside it, each with an Adam: passes, prediction, state.

    A method derives from it. Its :meth:`step` computes its losses from what :meth:`forward` returns, between
    ``optimisers.start_iteration`` and ``optimisers.step``. It builds its discriminators in :meth:`build_adversary`, and
    adds what it has beside networks to the state.

    Args:
        segmenter: with its initial weights; trained in place.
        config: the method's settings.
        optim: optimisers and decay.
        num_classes: C, background included.
        device: where to train.
        precision: how GPUs compute.
        seed: of the discriminators' initial weights.
    """

    split: TargetSplit | None = None

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
        # Of two domains both move the running statistics, or the second, the target, alone.
        self._wrapped = base.wrap_segmenter(segmenter, getattr(config, "norm_statistics", "mixture"), device)
        self.networks: dict[str, nn.Module] = {"segmenter": segmenter, **self._discriminators}
        self.optimisers = Optimisers(self.networks, device)

    def build_adversary(self) -> Adversary:
        """The discriminators of the method: none, unless it says otherwise."""
        return self.adversary_on(())

    def adversary_on(self, heads: Sequence[str], least_squares: bool = False) -> Adversary:
        """A discriminator for the maps of each of these heads, see :class:`Adversary`."""
        config: Any = self.config
        return Adversary(
            config, heads, self.num_classes, self.dtype, self.seed, self.device, self.precision, least_squares
        )

    def start_phase(self, iterations: int) -> None:
        """Begin a phase of so many iterations with fresh optimisers."""
        fresh: dict[str, Optimiser] = {"segmenter": SegmenterSGD(self.segmenter, self._optim)}
        fresh |= {name: DiscriminatorAdam(network, self._optim) for name, network in self._discriminators.items()}
        self.optimisers.start(fresh, iterations)

    def prepare(self, slices: TrainingSlices) -> None:
        """Nothing, unless the method looks at the training slices before its phase."""

    @abstractmethod
    def step(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """One training iteration, see :class:`~mpscl_ray.methods.base.Method`."""

    def forward(self, *images: Tensor) -> tuple[SegmenterOutput, ...]:
        """Outputs for the slices (B, 1, H, W) of each domain, the source first; once for each backward."""
        inputs = [base.to_network(image, self.segmenter, self.precision) for image in images]
        with autocast(self.device, self.precision):
            outputs: tuple[SegmenterOutput, ...] = self._wrapped(*inputs)
        return outputs

    def evaluate(self, images: Tensor) -> SegmenterOutput:
        """Outputs for slices (B, 1, H, W), in evaluation mode, without gradient."""
        return base.evaluate(self.segmenter, images.to(self.device), self.precision)

    def predict(self, images: Tensor) -> Tensor:
        """Class probabilities (B, C, H, W) of slices (B, 1, H, W), in evaluation mode, without gradient."""
        return base.predict(self.segmenter, images.to(self.device), self.precision)

    def non_finite_losses(self) -> dict[str, Tensor]:
        """This worker's component losses at the first non-finite step, by name; only if there was one."""
        return self.optimisers.guard.losses()

    def state_dict(self) -> dict[str, Any]:
        """State of networks, optimisers and phase."""
        return base.state_dict(self.networks, self.optimisers)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, the phase started if it was.

        Raises:
            DataError: the state is of other networks.
        """
        base.load_state_dict(self.networks, self.optimisers, self.start_phase, state)
