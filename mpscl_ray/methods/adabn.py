"""AdaBN: the batch statistics of the target instead of those of the source, Li et al. 2016."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mpscl_ray.config import AdaBNConfig, OptimConfig, PrecisionConfig
from mpscl_ray.distributed import collectives
from mpscl_ray.distributed.batch_norm import set_cumulative_average
from mpscl_ray.methods import base
from mpscl_ray.methods.base import Batch, TargetSplit, TrainingSlices
from mpscl_ray.methods.losses import at_least_float32
from mpscl_ray.methods.optim import Optimisers, autocast, prepare_network
from mpscl_ray.networks.deeplab import DeepLabV2


class AdaBN:
    """Set the running statistics of a trained segmenter to the mean over batches of the target; no weight moves.

    The adaptation's iterations are batches: after k of them mean and variance are the plain averages over those k.

    Args:
        segmenter: with trained weights; its running statistics are replaced in place.
        config: nothing.
        optim: unused, because nothing is optimised.
        num_classes: C, background included.
        device: where to compute.
        precision: how GPUs compute.
        seed: unused, because nothing here is drawn.

    Source: Li et al. 2016, "Revisiting batch normalization for practical domain adaptation".
    Differs from the paper: all layers in one pass, each fed with activations normalised by the statistics of the batch,
    instead of layer after layer.
    """

    split: TargetSplit | None = None

    def __init__(
        self,
        segmenter: DeepLabV2,
        config: AdaBNConfig,
        optim: OptimConfig,
        num_classes: int,
        device: torch.device,
        precision: PrecisionConfig,
        seed: int,
    ) -> None:
        self.device, self.precision = device, precision
        self.segmenter = segmenter
        self.networks: dict[str, nn.Module] = {"segmenter": segmenter}
        prepare_network(collectives.broadcast_parameters(segmenter), device, precision)
        self._optimisers = Optimisers(self.networks, device)

    def start_phase(self, iterations: int) -> None:
        self._optimisers.start({}, iterations)

    @torch.no_grad()
    def step(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        assert batch.target_image is not None, "AdaBN needs slices of the target domain"
        self._optimisers.start_iteration(iteration)
        set_cumulative_average(self.segmenter, iteration + 1)
        with autocast(self.device, self.precision):
            output = self.segmenter(base.to_network(batch.target_image, self.segmenter, self.precision))
        probabilities = at_least_float32(output.main).softmax(dim=1)
        entropy = torch.special.entr(probabilities).sum(dim=1).mean()
        flag = self._optimisers.step({"target_entropy": entropy})
        return base.metrics({"target_entropy": entropy}, non_finite=flag)

    def non_finite_losses(self) -> dict[str, Tensor]:
        return self._optimisers.guard.losses()

    def predict(self, images: Tensor) -> Tensor:
        return base.predict(self.segmenter, images.to(self.device), self.precision)

    def prepare(self, slices: TrainingSlices) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        return base.state_dict(self.networks, self._optimisers)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        base.load_state_dict(self.networks, self._optimisers, self.start_phase, state)
