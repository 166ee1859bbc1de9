"""The networks of SIFA as it trains them: built, moved to their device, and run forward one at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mpscl_ray.config import SIFAConfig
from mpscl_ray.distributed import collectives
from mpscl_ray.distributed.batch_norm import batch_norms
from mpscl_ray.distributed.micro_batches import ImageRandom, in_micro_batches
from mpscl_ray.methods.base import Method
from mpscl_ray.methods.losses import at_least_float32
from mpscl_ray.methods.optim import autocast, prepare_network
from mpscl_ray.networks.sifa import (
    Decoder,
    GlobalDropout,
    SIFADiscriminator,
    SIFAOutput,
    SIFASegmenter,
    Translator,
    initialise_sifa,
)


class SIFANetworks(Method):
    """The part of SIFA that has the networks and runs them forward."""

    segmenter: SIFASegmenter
    config: SIFAConfig

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        c, classes, discriminator = self.config, self.num_classes, self.config.discriminator_width
        self.networks = {
            "segmenter": self.segmenter,
            "generator": Translator(c.generator_width, c.generator_blocks, self.segmenter.in_channels),
            "decoder": Decoder(
                self.segmenter.feature_channels, c.generator_width, c.output_stride, c.decoder_blocks, c.decoder_dropout
            ),
            "discriminator_source": SIFADiscriminator(1, discriminator, outputs=2),
            "discriminator_target": SIFADiscriminator(1, discriminator),
            "discriminator_prediction": SIFADiscriminator(classes, discriminator),
        }
        if c.version == "v2":
            self.networks["discriminator_low"] = SIFADiscriminator(classes, discriminator)
        for number, (name, network) in enumerate(self.networks.items()):
            if name != "segmenter":
                initialise_sifa(network, self.seed + number)
            collectives.broadcast_parameters(network.to(self.device, self.dtype))
            prepare_network(network, self.device, self.precision)
        self.dropout = ImageRandom(self.device)
        """Draws all masks of dropout."""
        for network in self.networks.values():
            for layer in network.modules():
                if isinstance(layer, GlobalDropout):
                    layer.random = self.dropout
        self.norms = batch_norms(self.segmenter)

    def train_only(self, name: str) -> None:
        """Let gradients reach one network alone."""
        for other, network in self.networks.items():
            network.requires_grad_(other == name)

    def translate(self, image: Tensor) -> Tensor:
        """An image with the appearance of the target (g_A) from one of the source."""
        return self.call("generator", image)

    def decode(self, features: Tensor, image: Tensor) -> Tensor:
        """An image with the appearance of the source (de_B) from the features of one of the target."""
        return self.call("decoder", features, image)

    def segment(self, image: Tensor, update_running_stats: bool = False) -> SIFAOutput:
        """Logits and features (e_B, s_B) of an image of the target."""

        def run(part: Tensor) -> SIFAOutput:
            for layer in self.norms:
                layer.track_running_stats = update_running_stats
            try:
                output: SIFAOutput = self.segmenter(part)
            finally:
                for layer in self.norms:
                    layer.track_running_stats = True
            return output

        output = self._in_micro_batches(run, image)
        return SIFAOutput(*(None if x is None else at_least_float32(x) for x in output))  # type: ignore[arg-type]

    def call(self, name: str, *inputs: Tensor) -> Tensor:
        """Output of a network with one output."""
        return at_least_float32(self._in_micro_batches(self.networks[name], *inputs))

    def _in_micro_batches(self, run: Callable[..., Any], *inputs: Tensor) -> Any:
        with autocast(self.device, self.precision):
            return in_micro_batches(run, self.optim.accumulate, inputs, self.segmenter.buffers(), self.dropout)
