"""AdaBN: the batch statistics of the target instead of those of the source, Li et al. 2016."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mpscl_ray.config import AdaBNConfig, PrecisionConfig
from mpscl_ray.distributed.batch_norm import set_cumulative_average
from mpscl_ray.methods import base
from mpscl_ray.methods.base import Batch
from mpscl_ray.methods.losses import at_least_float32
from mpscl_ray.methods.optim import autocast
from mpscl_ray.methods.segmenter_method import SegmenterMethod
from mpscl_ray.networks.deeplab import DeepLabV2, SegmenterOutput


class AdaBN(SegmenterMethod[AdaBNConfig]):
    """Set the running statistics of a trained segmenter to the mean over batches of the target; no weight is updated.

    The adaptation's iterations are batches: after k of them mean and variance are the plain averages over those k.

    Source: Li et al. 2016, "Revisiting batch normalization for practical domain adaptation".
    Differs from the paper: all layers in one pass, each fed with activations normalised by the statistics of the batch,
    instead of layer after layer.
    """

    def start_phase(self, iterations: int) -> None:
        self.optimisers.start({}, iterations)

    @torch.no_grad()
    def step(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        _, target = batch.images
        self.optimisers.start_iteration(iteration)
        output = _pass(self.segmenter, target, iteration + 1, self.precision)
        probabilities = at_least_float32(output.main).softmax(dim=1)
        entropy = torch.special.entr(probabilities).sum(dim=1).mean()
        flag = self.optimisers.step({"target_entropy": entropy})
        return base.metrics({"target_entropy": entropy}, non_finite=flag)


@torch.no_grad()
def estimate_statistics(network: DeepLabV2, batches: Iterable[Tensor], precision: PrecisionConfig) -> None:
    """Set the running statistics of a network to their mean over batches; it ends in evaluation mode.

    ``batches`` are this worker's parts (B, 1, H, W) of global batches, as many and as large on every worker.
    """
    network.train()
    for number, images in enumerate(batches, start=1):
        _pass(network, images, number, precision)
    network.eval()


def _pass(network: DeepLabV2, images: Tensor, number: int, precision: PrecisionConfig) -> SegmenterOutput:
    """Pass ``number``, from 1, of those over which the running statistics are averaged."""
    set_cumulative_average(network, number)
    with autocast(images.device, precision):
        output: SegmenterOutput = network(base.to_network(images, network, precision))
    return output
