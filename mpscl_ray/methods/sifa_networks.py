"""The networks of SIFA as it trains them: built, placed, and run forward one at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpscl_ray.config import PrecisionConfig, SIFAConfig
from mpscl_ray.distributed import collectives
from mpscl_ray.distributed.batch_norm import batch_norms
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


class SIFANetworks:
    """All networks of SIFA by name, and their forward passes; ``seed`` is that of the initial weights."""

    def __init__(
        self,
        segmenter: SIFASegmenter,
        config: SIFAConfig,
        num_classes: int,
        device: torch.device,
        precision: PrecisionConfig,
        seed: int,
    ) -> None:
        self.segmenter, self.device, self.precision = segmenter, device, precision
        dtype = next(segmenter.parameters()).dtype
        channels, width, discriminator = segmenter.feature_channels, config.generator_width, config.discriminator_width
        self.by_name: dict[str, nn.Module] = {
            "segmenter": segmenter,
            "generator": Translator(width, config.generator_blocks),
            "decoder": Decoder(channels, width, config.output_stride, config.decoder_blocks),
            "discriminator_source": SIFADiscriminator(1, discriminator, outputs=2),
            "discriminator_target": SIFADiscriminator(1, discriminator),
            "discriminator_prediction": SIFADiscriminator(num_classes, discriminator),
        }
        if config.version == "v2":
            self.by_name["discriminator_low"] = SIFADiscriminator(num_classes, discriminator)
        for number, network in enumerate(self.by_name.values()):
            if network is not segmenter:
                initialise_sifa(network, seed + number)
            prepare_network(collectives.broadcast_parameters(network.to(device, dtype)), device, precision)
        self.dropout = torch.Generator(device)
        """Draws the masks of the segmenter's dropout."""
        for layer in segmenter.modules():
            if isinstance(layer, GlobalDropout):
                layer.generator = self.dropout
                layer.part, layer.parts = collectives.rank(), collectives.world_size()
        self._norms = batch_norms(segmenter)

    def train_only(self, name: str) -> None:
        """Let gradients reach one network alone."""
        for other, network in self.by_name.items():
            network.requires_grad_(other == name)

    def translate(self, image: Tensor) -> Tensor:
        """An image with the appearance of the target (g_A) from one of the source."""
        return self.call("generator", image)

    def decode(self, features: Tensor, image: Tensor) -> Tensor:
        """An image with the appearance of the source (de_B) from the features of one of the target."""
        return self.call("decoder", features, image)

    def segment(self, image: Tensor, update_running_stats: bool = False) -> SIFAOutput:
        """Logits and features (e_B, s_B) of an image of the target."""
        for layer in self._norms:
            layer.track_running_stats = update_running_stats
        try:
            with autocast(self.device, self.precision):
                output: SIFAOutput = self.segmenter(image)
        finally:
            for layer in self._norms:
                layer.track_running_stats = True
        return SIFAOutput(*(None if x is None else at_least_float32(x) for x in output))  # type: ignore[arg-type]

    def call(self, name: str, *inputs: Tensor) -> Tensor:
        """Output of a network with one output."""
        with autocast(self.device, self.precision):
            return at_least_float32(self.by_name[name](*inputs))
