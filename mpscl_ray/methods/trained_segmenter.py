"""What the methods with a DeepLab have in common: the segmenter in training, alone or beside discriminators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mpscl_ray.config import OptimConfig, PrecisionConfig
from mpscl_ray.methods import base
from mpscl_ray.methods.optim import (
    DiscriminatorAdam,
    Optimiser,
    Optimisers,
    SegmenterSGD,
    autocast,
    prepare_network,
)
from mpscl_ray.networks.deeplab import DeepLabV2, SegmenterOutput


class TrainedSegmenter:
    """A segmenter that SGD trains, and the discriminators beside it, each with an Adam: passes, prediction, state.

    A method owns one, makes its losses of what :meth:`forward` gives between ``optimisers.begin`` and
    ``optimisers.finish``, and adds to the state what it has beside networks.

    Args:
        segmenter: with its initial weights; trained in place.
        optim: optimisers and decay.
        device: where to train.
        precision: how GPUs compute.
        norm_statistics: of two domains, whether both move the running statistics or the second, the target, alone.
        discriminators: by the name that they have in a method, prepared; none by default.
    """

    def __init__(
        self,
        segmenter: DeepLabV2,
        optim: OptimConfig,
        device: torch.device,
        precision: PrecisionConfig,
        norm_statistics: Literal["mixture", "target"] = "mixture",
        discriminators: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.device, self._optim, self._precision = device, optim, precision
        self._segmenter, self._discriminators = segmenter, discriminators or {}
        prepare_network(segmenter, device, precision)
        self._wrapped = base.wrap_segmenter(segmenter, norm_statistics, device)
        self.networks: dict[str, nn.Module] = {"segmenter": segmenter, **self._discriminators}
        self.optimisers = Optimisers(self.networks, device)

    def start_phase(self, iterations: int) -> None:
        """Begin a phase of so many iterations with fresh optimisers."""
        fresh: dict[str, Optimiser] = {"segmenter": SegmenterSGD(self._segmenter, self._optim)}
        fresh |= {name: DiscriminatorAdam(network, self._optim) for name, network in self._discriminators.items()}
        self.optimisers.start(fresh, iterations)

    def forward(self, *images: Tensor) -> tuple[SegmenterOutput, ...]:
        """Outputs for the slices (B, 1, H, W) of each domain, the source first; once for each backward."""
        inputs = [base.to_network(image, self._segmenter, self._precision) for image in images]
        with autocast(self.device, self._precision):
            outputs: tuple[SegmenterOutput, ...] = self._wrapped(*inputs)
        return outputs

    def evaluate(self, images: Tensor) -> SegmenterOutput:
        """Outputs for slices (B, 1, H, W), in evaluation mode, without gradient."""
        return base.evaluate(self._segmenter, images.to(self.device), self._precision)

    def predict(self, images: Tensor) -> Tensor:
        """Class probabilities (B, C, H, W) of slices (B, 1, H, W), in evaluation mode, without gradient."""
        return base.predict(self._segmenter, images.to(self.device), self._precision)

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
