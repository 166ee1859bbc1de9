"""SIFA: synergistic image and feature alignment, Chen et al. 2020 (TMI), and its first version, 2019 (AAAI)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mpscl_ray.config.schema import NetworkConfig
from mpscl_ray.data.sampler import derive_seed
from mpscl_ray.distributed import collectives
from mpscl_ray.methods import base
from mpscl_ray.methods.base import Batch
from mpscl_ray.methods.batch_losses import batch_dice_loss
from mpscl_ray.methods.image_pool import ImagePool
from mpscl_ray.methods.losses import at_least_float32, class_counts
from mpscl_ray.methods.optim import (
    GRADIENT_NORM,
    SKIPPED_STEPS,
    NetworkAdam,
    NonFiniteGuard,
    Snapshot,
    autocast,
    learning_rates,
)
from mpscl_ray.methods.sifa_losses import (
    clipped_cross_entropy,
    half_squared_norm,
    lsgan_discriminator_loss,
    lsgan_generator_loss,
)
from mpscl_ray.methods.sifa_networks import SIFANetworks
from mpscl_ray.networks.sifa import SIFAOutput

ONE_ADAM = (
    "generator",
    "discriminator_target",
    "decoder",
    "discriminator_source",
    "discriminator_prediction",
    "discriminator_low",
)
"""Networks that one Adam of the released code updates, one after the other in this order. Its bias correction counts
updates of all of them, so that early steps of each are up to sqrt(6) times as long as with an Adam of its own."""


class SIFA(SIFANetworks):
    """Translate source images into the appearance of the target and segment them, with one encoder for both tasks.

    Names of the paper: A is the source, B the target; ``generator`` g_A, ``segmenter`` encoder e_B with classifiers
    s_B, ``decoder`` de_B, ``discriminator_source`` d_A (with auxiliary output), ``discriminator_target`` d_B,
    ``discriminator_prediction`` d_P, ``discriminator_low`` its second one. An iteration has seven sub-steps, in the
    order of the release: g_A, d_B, e_B with s_B, de_B, d_A, d_P and its second one. Each uses the weights that the
    sub-steps before it have updated and its own check that everything is finite.

    After a sub-step that is not finite nothing is updated any more. What earlier sub-steps of that iteration updated
    stays updated, and the pools keep counting; the run ends there without a checkpoint, so none resumes from half an
    iteration. Copies of all weights and Adam states to undo it took 7 to 10 % of an iteration's CPU time.

    The settings of the optimisers are unused: SIFA has its own.

    Source: Chen et al. 2020 and 2019, and their released code, whose numbers three iterations reproduce. As there,
    labels outside the classes, which occur in the released files, count for no class, and without ``pool_size``
    discriminators get the newest images alone: the pool there overwrites an earlier image before it is given back.
    Differs from the released code:

    - running statistics of the encoder are updated in its own sub-step alone, first with translated, then with target
      images. There every sub-step that runs the encoder updates them, in no defined order of the two, so that they are
      in effect those of the last iteration;
    - the sub-steps after the encoder's share one pass of it, so in the first version they share dropped activations,
      which are drawn anew for each there;
    - in the first version the weight of the adversarial loss on predictions grows in a line; there it is a third in one
      epoch and two thirds in the next;
    - the loader may augment images while training; the released files are augmented before.
    """

    @classmethod
    def network_arguments(cls, network: NetworkConfig, config: Any, num_classes: int) -> dict[str, Any]:
        return {"num_classes": num_classes, **config.network_arguments()}

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._iterations = 0
        self._optimisers: dict[str, NetworkAdam] = {}
        self._reset()

    def _reset(self) -> None:
        self._guards = {name: NonFiniteGuard(self.device) for name in self.networks}
        self._flag = torch.zeros((), dtype=torch.float32, device=self.device)
        for guard in self._guards.values():
            guard.flag = self._flag
        self._pools = {
            name: ImagePool(self.config.pool_size, derive_seed(self.seed, "pool", name))
            for name in ("source", "target")
        }

    def start_phase(self, iterations: int) -> None:
        c = self.config
        self._iterations = iterations
        self._optimisers = {
            name: NetworkAdam(network, c.lr_segmenter, (0.9, 0.999), power=0.0)
            if name == "segmenter"
            else NetworkAdam(network, c.lr_generator, (0.5, 0.999), power=0.0)
            for name, network in self.networks.items()
        }
        for network in self.networks.values():
            network.train()

    def step(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        assert self._iterations > 0, "start_phase comes before the first step"
        c = self.config
        a, b = (image.to(self.dtype) for image in batch.images)
        decay = 0.9 ** (iteration // c.segmenter_decay_every) if c.segmenter_decay_every else 1.0
        together = [name for name in ONE_ADAM if name in self.networks]
        for name, optimiser in self._optimisers.items():
            alone = name == "segmenter"
            optimiser.start_iteration(iteration, self._iterations, decay if alone else 1.0)
            optimiser.set_step(iteration if alone else iteration * len(together) + together.index(name))
        self.dropout.generator.manual_seed(derive_seed(self.seed, "dropout", iteration) % 2**63)
        counts = collectives.all_reduce_sum(class_counts(batch.source_label, self.num_classes))

        fake_b, losses = self._step_generator(a, b)
        losses |= self._step_discriminator("target", b, self._pools["target"].swap(fake_b))
        with torch.no_grad():
            fake_b = self.translate(a)
        losses |= self._step_segmenter(a, b, fake_b, batch.source_label, counts, iteration)
        with torch.no_grad():
            on_fake, on_real = self.segment(fake_b), self.segment(b)
        fake_a, decoder_losses = self._step_decoder(a, b, fake_b, on_fake, on_real)
        losses |= decoder_losses
        losses |= self._step_discriminator_source(a, fake_a, fake_b, on_fake)
        losses |= self._step_discriminator("prediction", on_fake.main, on_real.main)
        if on_fake.low is not None and on_real.low is not None:
            losses |= self._step_discriminator("low", on_fake.low, on_real.low)
        return base.metrics(losses, non_finite=self._flag.clone())

    def _step_generator(self, a: Tensor, b: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """g_A. Returns its images of a, from before its update, and its losses."""
        self.train_only("generator")
        with torch.no_grad():
            fake_a = self.decode(self.segment(b).features, b)
        fake_b = self.translate(a)
        cycle_b = self.translate(fake_a)
        cycle_a = self.decode(self.segment(fake_b).features, fake_b)
        losses = {
            "loss_cycle": self._cycle(a, cycle_a, b, cycle_b),
            "loss_adversarial_target": lsgan_generator_loss(self.call("discriminator_target", fake_b)),
        }
        return fake_b, self._update("generator", losses["loss_cycle"] + losses["loss_adversarial_target"], losses)

    def _step_segmenter(
        self, a: Tensor, b: Tensor, fake_b: Tensor, labels: Tensor, counts: Tensor, iteration: int
    ) -> dict[str, Tensor]:
        """e_B and s_B."""
        c = self.config
        self.train_only("segmenter")
        before = Snapshot([buffer for layer in self.norms for buffer in layer.buffers()])
        on_fake = self.segment(fake_b, update_running_stats=True)
        on_real = self.segment(b, update_running_stats=True)
        fake_a = self.decode(on_real.features, b)
        cycle_a, cycle_b = self.decode(on_fake.features, fake_b), self.translate(fake_a)
        verdict = self.call("discriminator_source", fake_a)
        losses = self._segmentation(on_fake, labels, counts)
        losses["loss_prediction"] = lsgan_generator_loss(self.call("discriminator_prediction", on_real.main))
        losses["loss_features"] = lsgan_generator_loss(verdict[:, 1:])
        losses["loss_decoder"] = self._cycle(a, cycle_a, b, cycle_b) + lsgan_generator_loss(verdict[:, :1])
        segmentation = losses["loss_cross_entropy_main"] + losses["loss_dice_main"]
        total = segmentation + c.lambda_l2 * half_squared_norm(self.segmenter)
        total = total + self._ramped(iteration) * losses["loss_prediction"]
        total = total + c.lambda_features * losses["loss_features"] + c.lambda_decoder * losses["loss_decoder"]
        if on_real.low is not None:
            losses["loss_prediction_low"] = lsgan_generator_loss(self.call("discriminator_low", on_real.low))
            total = total + c.lambda_low * (losses["loss_cross_entropy_low"] + losses["loss_dice_low"])
            total = total + c.lambda_prediction_low * losses["loss_prediction_low"]
        metrics = {"loss_segmentation": segmentation.detach()} | self._update("segmenter", total, losses)
        before.restore_where(self._flag)
        return metrics

    def _step_decoder(
        self, a: Tensor, b: Tensor, fake_b: Tensor, on_fake: SIFAOutput, on_real: SIFAOutput
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """de_B. Returns its images of b, from before its update, and its losses."""
        self.train_only("decoder")
        fake_a = self.decode(on_real.features, b)
        cycle_a, cycle_b = self.decode(on_fake.features, fake_b), self.translate(fake_a)
        loss = self._cycle(a, cycle_a, b, cycle_b)
        loss = loss + lsgan_generator_loss(self.call("discriminator_source", fake_a)[:, :1])
        return fake_a, self._update("decoder", loss, {"loss_translation_to_source": loss})

    def _step_discriminator_source(
        self, a: Tensor, fake_a: Tensor, fake_b: Tensor, on_fake: SIFAOutput
    ) -> dict[str, Tensor]:
        """d_A: its second output separates images decoded from target features from those of translated source."""
        self.train_only("discriminator_source")
        with torch.no_grad():
            cycle_a = self.decode(on_fake.features, fake_b)
        earlier_a = self._pools["source"].swap(fake_a)
        on_image, on_earlier, on_cycle = (self.call("discriminator_source", image) for image in (a, earlier_a, cycle_a))
        loss = lsgan_discriminator_loss(on_image[:, :1], on_earlier[:, :1])
        loss = loss + lsgan_discriminator_loss(on_cycle[:, 1:], on_earlier[:, 1:])
        return self._update("discriminator_source", loss, {"loss_discriminator_source": loss})

    def _step_discriminator(self, which: str, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """d_B on images, d_P or its second one on the logits of translated source ("real") and of target ("fake")."""
        name = f"discriminator_{which}"
        self.train_only(name)
        loss = lsgan_discriminator_loss(self.call(name, real), self.call(name, fake))
        return self._update(name, loss, {f"loss_{name}": loss})

    def _update(self, name: str, loss: Tensor, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Update the network of a sub-step, unless this or an earlier one was not finite on some worker."""
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = self._optimisers[name].gradients()
        collectives.average_gradients(gradients)
        self._guards[name].update(losses, gradients)
        self._optimisers[name].step(self._flag)
        return {key: value.detach() for key, value in losses.items()}

    def _cycle(self, image_a: Tensor, cycle_a: Tensor, image_b: Tensor, cycle_b: Tensor) -> Tensor:
        difference = (image_a - cycle_a).abs().mean() + (image_b - cycle_b).abs().mean()
        return self.config.lambda_cycle * difference

    def _segmentation(self, output: SIFAOutput, labels: Tensor, counts: Tensor) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for head, logits in (("main", output.main), ("low", output.low)):
            if logits is not None:
                losses[f"loss_cross_entropy_{head}"] = clipped_cross_entropy(logits, labels, counts)
                losses[f"loss_dice_{head}"] = batch_dice_loss(logits, labels)
        return losses

    def _ramped(self, iteration: int) -> float:
        """lambda_prediction at an iteration."""
        start, end = (part * self._iterations for part in self.config.adversarial_prediction_ramp)
        if iteration >= end:
            return self.config.lambda_prediction
        return self.config.lambda_prediction * max(0.0, iteration - start) / (end - start)

    def diagnostics(self) -> dict[str, Tensor]:
        losses = {name: guard.losses() for name, guard in self._guards.items()}
        norms = {f"{GRADIENT_NORM}_{name}": own[GRADIENT_NORM] for name, own in losses.items() if GRADIENT_NORM in own}
        return learning_rates(self._optimisers) | norms | {SKIPPED_STEPS: self._flag}

    def non_finite_losses(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, guard in self._guards.items():
            losses = guard.losses()
            found |= {f"{name}_{key}" if key == GRADIENT_NORM else key: value for key, value in losses.items()}
        return found

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        was_training = self.segmenter.training
        self.segmenter.eval()
        with autocast(self.device, self.precision):
            output: SIFAOutput = self.segmenter(images.to(self.device, self.dtype))
        self.segmenter.train(was_training)
        return at_least_float32(output.main).softmax(dim=1)

    def state_dict(self) -> dict[str, Any]:
        return {
            "networks": {_saved_name(name): network.state_dict() for name, network in self.networks.items()},
            "optimisers": {_saved_name(name): optimiser.state_dict() for name, optimiser in self._optimisers.items()},
            "phase": {"iterations": self._iterations},
            "pools": {name: pool.state_dict() for name, pool in self._pools.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        base.load_networks({_saved_name(name): network for name, network in self.networks.items()}, state["networks"])
        self._reset()
        if state["phase"]["iterations"]:
            self.start_phase(state["phase"]["iterations"])
            for name, optimiser in self._optimisers.items():
                optimiser.load_state_dict(state["optimisers"].get(_saved_name(name), {}))
        for name, pool in self._pools.items():
            pool.load_state_dict(state["pools"][name], self.device)


def _saved_name(network: str) -> str:
    """Name of a network in checkpoints, which call discriminators critics."""
    return network.replace("discriminator_", "critic_")
