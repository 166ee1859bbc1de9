"""What adversarial methods share: discriminators on a map of the logits, and their part of an iteration.

An iteration has the order of AdaptSegNet and its descendants: the segmenter's losses with frozen discriminators, its
backward pass, the discriminators' losses on detached maps, their backward pass, and only then all optimiser steps.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mpscl_ray.config import DiscriminatorConfig
from mpscl_ray.config.methods import AdversarialConfig
from mpscl_ray.distributed import collectives
from mpscl_ray.distributed.batch_norm import PerDomainForward
from mpscl_ray.methods.base import Batch
from mpscl_ray.methods.losses import SOURCE_LABEL, TARGET_LABEL, at_least_float32, domain_loss
from mpscl_ray.methods.optim import autocast, prepare_network
from mpscl_ray.methods.segmenter_method import SegmenterMethod
from mpscl_ray.networks import initialise
from mpscl_ray.networks.discriminators import FCDiscriminator, PatchGANDiscriminator

Discriminator = FCDiscriminator | PatchGANDiscriminator
DISCRIMINATORS: dict[str, type[Discriminator]] = {"fc": FCDiscriminator, "patchgan": PatchGANDiscriminator}

DiscriminatorSettings = TypeVar("DiscriminatorSettings", bound=DiscriminatorConfig)
AdversarialSettings = TypeVar("AdversarialSettings", bound=AdversarialConfig)


class AdversarialMethod(SegmenterMethod[DiscriminatorSettings]):
    """A method with discriminators: one for each of :attr:`discriminated_heads`, trained by Adam."""

    border = 0.0
    """An output of a discriminator below this names the source, one above it the target."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.discriminators: dict[str, Discriminator] = {}
        self._wrapped_discriminators: dict[str, nn.Module] = {}
        for number, head in enumerate(self.discriminated_heads):
            kind = DISCRIMINATORS[self.config.discriminator]
            discriminator = kind(self.num_classes, self.config.discriminator_width)
            initialise(discriminator, self.seed + number)
            prepare_network(discriminator.to(self.dtype), self.device, self.precision)
            self.discriminators[head] = self.networks[f"discriminator_{head}"] = discriminator
            self._wrapped_discriminators[head] = collectives.wrap(PerDomainForward(discriminator), self.device)

    @property
    def discriminated_heads(self) -> tuple[str, ...]:
        """Heads of the segmenter that have a discriminator: all by default."""
        return ("main",) if self.segmenter.layer5 is None else ("main", "aux")

    def discriminate_frozen(self, head: str, maps: Tensor) -> Tensor:
        """Output of a discriminator, called unwrapped because its weights need no gradients."""
        self.discriminators[head].requires_grad_(False)
        with autocast(self.device, self.precision):
            output: Tensor = self.discriminators[head](maps)
        return output

    def discriminate(self, head: str, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of a discriminator in training, on detached maps of both domains."""
        self.discriminators[head].requires_grad_(True)
        with autocast(self.device, self.precision):
            on_source, on_target = self._wrapped_discriminators[head](source.detach(), target.detach())
        return on_source, on_target

    def accuracy(self, on_source: Tensor, on_target: Tensor) -> Tensor:
        """Fraction of a discriminator's outputs that name the right domain."""
        correct = [on_source.detach().flatten() < self.border, on_target.detach().flatten() > self.border]
        return torch.cat(correct).mean(dtype=at_least_float32(on_source).dtype)


class AlignmentMethod(AdversarialMethod[AdversarialSettings]):
    """A method that aligns a map of each head's logits with one adversarial loss for each head."""

    domain_loss: Callable[[Tensor, int], Tensor] = staticmethod(domain_loss)
    """Loss of a discriminator's output against the label of a domain."""

    def step(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        self.optimisers.set_learning_rates(iteration)
        return self.update(batch)

    @abstractmethod
    def update(self, batch: Batch) -> dict[str, Tensor]:
        """A step but for its learning rates: on the device alone, with the same operators at each iteration.

        A CUDA graph of it, with the tensors of one batch as its inputs, is captured after some steps. Before each
        replay the next batch is copied into them and ``optimisers.set_learning_rates`` is called.
        """

    @abstractmethod
    def discriminated_map(self, logits: Tensor) -> Tensor:
        """The map (B, C, H, W) of logits (B, C, H, W) whose domain a discriminator should find."""

    def maps(self, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The map of each head."""
        heads = torch.stack(list(logits.values()))
        maps = self.discriminated_map(heads.flatten(0, 1)).reshape(heads.shape)
        return dict(zip(logits, maps, strict=True))

    def adversarial_losses(self, target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Loss of each head on the target's maps, which frozen discriminators should take for maps of the source."""
        return {
            head: self.domain_loss(self.discriminate_frozen(head, target[head]), SOURCE_LABEL)
            for head in self.discriminators
        }

    def add_weighted(self, total: Tensor, losses: dict[str, Tensor], kind: str, terms: Mapping[str, Tensor]) -> Tensor:
        """The total plus the weighted terms of the heads, which are also added to ``losses`` as ``loss_KIND_HEAD``."""
        for head, term in terms.items():
            losses[f"loss_{kind}_{head}"] = term
            total = total + (self.config.lambda_main if head == "main" else self.config.lambda_aux) * term
        return total

    def discriminator_backward(
        self, source: Mapping[str, Tensor], target: Mapping[str, Tensor], losses: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Backward pass of the discriminators on source logits and target maps, by head; returns their accuracies.

        Adds their losses to ``losses``.
        """
        accuracies: dict[str, Tensor] = {}
        if not self.discriminators:
            return accuracies
        with torch.no_grad():
            source_maps = self.maps({head: source[head] for head in self.discriminators})
        for head, source_map in source_maps.items():
            on_source, on_target = self.discriminate(head, source_map, target[head])
            loss = self.domain_loss(on_source, SOURCE_LABEL) + self.domain_loss(on_target, TARGET_LABEL)
            losses[f"loss_discriminator_{head}"] = loss / 2 if self.config.halve_discriminator_loss else loss
            accuracies[f"discriminator_accuracy_{head}"] = self.accuracy(on_source, on_target)
        torch.autograd.backward([losses[f"loss_discriminator_{head}"] for head in source_maps])
        return accuracies
