"""What adversarial methods share: discriminators on a map of the logits, and their part of an iteration.

An iteration has the order of AdaptSegNet and its descendants: the segmenter's losses with frozen discriminators, its
backward pass, the discriminators' losses on detached maps, their backward pass, and only then all optimiser steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mpscl_ray.config import DiscriminatorConfig, PrecisionConfig
from mpscl_ray.config.methods import AdversarialConfig
from mpscl_ray.distributed import collectives
from mpscl_ray.distributed.batch_norm import PerDomainForward
from mpscl_ray.methods.losses import SOURCE_LABEL, TARGET_LABEL, domain_loss, least_squares_domain_loss
from mpscl_ray.methods.optim import autocast, prepare_network
from mpscl_ray.networks import initialise
from mpscl_ray.networks.discriminators import FCDiscriminator, PatchGANDiscriminator

DISCRIMINATORS: dict[str, type[FCDiscriminator] | type[PatchGANDiscriminator]] = {
    "fc": FCDiscriminator,
    "patchgan": PatchGANDiscriminator,
}


class Adversary:
    """One discriminator for each head of the segmenter.

    Args:
        config: kind and width of the discriminators.
        heads: names of the heads.
        channels: of the maps.
        dtype: of the weights.
        seed: of the initial weights; head number n gets ``seed + n``.
        device: where to train.
        precision: how GPUs compute.
        least_squares: least squares on the plain outputs instead of cross-entropy.
    """

    def __init__(
        self,
        config: DiscriminatorConfig,
        heads: Sequence[str],
        channels: int,
        dtype: torch.dtype,
        seed: int,
        device: torch.device,
        precision: PrecisionConfig,
        least_squares: bool = False,
    ) -> None:
        self.discriminators: dict[str, nn.Module] = {}
        for number, head in enumerate(heads):
            discriminator = DISCRIMINATORS[config.discriminator](channels, config.discriminator_width)
            initialise(discriminator, seed + number)
            self.discriminators[head] = discriminator.to(dtype)
            prepare_network(discriminator, device, precision)
        self._discriminate = {
            head: collectives.wrap(PerDomainForward(network), device) for head, network in self.discriminators.items()
        }
        self._device, self._precision = device, precision
        self._loss = least_squares_domain_loss if least_squares else domain_loss
        self._border = (SOURCE_LABEL + TARGET_LABEL) / 2 if least_squares else 0.0

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The discriminators, unwrapped, by their names in a method."""
        return {f"discriminator_{head}": network for head, network in self.discriminators.items()}

    def adversarial_loss(self, target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Adversarial loss of each head: frozen discriminators should take the target's maps for the source's.

        The discriminators are called unwrapped, because they need no gradients.

        Args:
            target: map (B, channels, H, W) of each head, with gradient.
        """
        verdicts = {head: self.forward_frozen(head, x) for head, x in target.items() if head in self.discriminators}
        return {head: self._loss(verdict, SOURCE_LABEL) for head, verdict in verdicts.items()}

    def forward_frozen(self, head: str, x: Tensor) -> Tensor:
        """Output of a discriminator without gradients for its weights."""
        self.discriminators[head].requires_grad_(False)
        with autocast(self._device, self._precision):
            output: Tensor = self.discriminators[head](x)
        return output

    def discriminate(self, head: str, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of a discriminator in training, on detached maps of both domains."""
        self.discriminators[head].requires_grad_(True)
        with autocast(self._device, self._precision):
            on_source, on_target = self._discriminate[head](source.detach(), target.detach())
        return on_source, on_target

    def accuracy(self, on_source: Tensor, on_target: Tensor) -> Tensor:
        """Fraction of a discriminator's outputs that name the right domain."""
        correct = [on_source.detach().flatten() < self._border, on_target.detach().flatten() > self._border]
        return torch.cat(correct).to(torch.float32 if on_source.dtype != torch.float64 else torch.float64).mean()

    def discriminator_backward(
        self, source: Mapping[str, Tensor], target: Mapping[str, Tensor], halve: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the losses of the discriminators and run their backward pass.

        Args:
            source: map (B, channels, H, W) of each head.
            target: the same of the target.
            halve: halve each loss.

        Returns:
            The losses and the accuracies, by their names in the metrics.
        """
        losses: dict[str, Tensor] = {}
        accuracies: dict[str, Tensor] = {}
        total = torch.zeros((), device=self._device)
        for head in self.discriminators:
            on_source, on_target = self.discriminate(head, source[head], target[head])
            loss = self._loss(on_source, SOURCE_LABEL) + self._loss(on_target, TARGET_LABEL)
            losses[f"loss_discriminator_{head}"] = loss / 2 if halve else loss
            total = total + losses[f"loss_discriminator_{head}"]
            accuracies[f"discriminator_accuracy_{head}"] = self.accuracy(on_source, on_target)
        if losses:
            total.backward()  # type: ignore[no-untyped-call]
        return losses, accuracies


def add_weighted_heads(
    total: Tensor, losses: dict[str, Tensor], kind: str, terms: Mapping[str, Tensor], config: AdversarialConfig
) -> Tensor:
    """The total plus the weighted terms of both heads; adds the terms to the losses as ``loss_KIND_HEAD``."""
    for head, weight in (("main", config.lambda_main), ("aux", config.lambda_aux)):
        if head in terms:
            losses[f"loss_{kind}_{head}"] = terms[head]
            total = total + weight * terms[head]
    return total
