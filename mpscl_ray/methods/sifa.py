"""SIFA: synergistic image and feature alignment, Chen et al. 2020 (TMI), and its first version, 2019 (AAAI)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mpscl_ray.config import OptimConfig, PrecisionConfig, SIFAConfig
from mpscl_ray.data.sampler import derive_seed
from mpscl_ray.distributed import collectives
from mpscl_ray.distributed.batch_norm import batch_norms
from mpscl_ray.methods import base
from mpscl_ray.methods.base import Batch, TargetSplit, TrainingSlices
from mpscl_ray.methods.image_pool import ImagePool
from mpscl_ray.methods.losses import at_least_float32, class_counts
from mpscl_ray.methods.optim import (
    NetworkAdam,
    NonFiniteGuard,
    Snapshot,
    autocast,
    prepare_network,
)
from mpscl_ray.methods.sifa_losses import (
    batch_dice_loss,
    clipped_cross_entropy,
    half_squared_norm,
    lsgan_discriminator_loss,
    lsgan_generator_loss,
)
from mpscl_ray.networks.sifa import (
    Decoder,
    GlobalDropout,
    SIFADiscriminator,
    SIFAOutput,
    SIFASegmenter,
    Translator,
    initialise_sifa,
)


class SIFA:
    """Translate source images into the look of the target and learn to segment them, with one encoder for both tasks.

    Names of the paper: A is the source, B the target; ``generator`` g_A, ``segmenter`` encoder e_B with classifiers
    s_B, ``decoder`` de_B, ``critic_source`` d_A (with auxiliary output), ``critic_target`` d_B, ``critic_prediction``
    d_P, ``critic_low`` its second one. An iteration has seven sub-steps, in the order of the release: generator,
    critic of the target, segmenter, decoder, critic of the source, critics of the predictions. Each has the weights
    that the ones before it have moved, its own Adam and its own look at whether all is finite.

    From a sub-step that is not finite on, nothing moves any more; what earlier sub-steps of that iteration moved stays
    moved, and the pools count on. A run ends there without a checkpoint, so nothing goes on from half an iteration.
    Copies of all weights and Adam states to undo it took between a fifteenth and a tenth of an iteration's CPU time.

    Args:
        segmenter: with its initial weights; trained in place.
        config: the method's settings.
        optim: unused, see the settings.
        num_classes: C, background included.
        device: where to train.
        precision: how GPUs compute.
        seed: of the other networks' initial weights, of the pools and of dropout.

    Source: Chen et al. 2020 and 2019.
    Differs from the released code: each network has an Adam with a step count of its own, where six losses of the
    release share one; running statistics of the encoder move in its own sub-step alone; labels outside the classes,
    which occur in the released files, are no class's truth, as there.
    """

    split: TargetSplit | None = None

    def __init__(
        self,
        segmenter: SIFASegmenter,
        config: SIFAConfig,
        optim: OptimConfig,
        num_classes: int,
        device: torch.device,
        precision: PrecisionConfig,
        seed: int,
    ) -> None:
        self.config, self.num_classes, self.seed = config, num_classes, seed
        self.device, self.precision = device, precision
        self.segmenter = segmenter
        channels = segmenter.feature_channels
        width, critic = config.generator_width, config.critic_width
        self.generator = Translator(width, config.generator_blocks)
        self.decoder = Decoder(channels, width, config.output_stride, config.decoder_blocks)
        self.networks: dict[str, nn.Module] = {
            "segmenter": segmenter,
            "generator": self.generator,
            "decoder": self.decoder,
            "critic_source": SIFADiscriminator(1, critic, outputs=2),
            "critic_target": SIFADiscriminator(1, critic),
            "critic_prediction": SIFADiscriminator(num_classes, critic),
        }
        if config.version == "v2":
            self.networks["critic_low"] = SIFADiscriminator(num_classes, critic)
        self._dtype = next(segmenter.parameters()).dtype
        for number, network in enumerate(self.networks.values()):
            if network is not segmenter:
                initialise_sifa(network, seed + number)
            prepare_network(collectives.broadcast_parameters(network.to(device, self._dtype)), device, precision)
        self._dropout = torch.Generator(device)
        for layer in segmenter.modules():
            if isinstance(layer, GlobalDropout):
                layer.generator = self._dropout
                layer.part, layer.parts = collectives.rank(), collectives.world_size()
        self._norms = batch_norms(segmenter)
        self._iterations = 0
        self._optimisers: dict[str, NetworkAdam] = {}
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._guards = {name: NonFiniteGuard(self.device) for name in self.networks}
        self._flag = torch.zeros((), dtype=torch.float32, device=self.device)
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
        assert batch.target_image is not None, "SIFA needs slices of the target domain"
        assert self._iterations > 0, "start_phase comes before the first step"
        c = self.config
        image_a, image_b = (image.to(self._dtype) for image in (batch.source_image, batch.target_image))
        labels = batch.source_label
        decay = 0.9 ** (iteration // c.segmenter_decay_every) if c.segmenter_decay_every else 1.0
        for name, optimiser in self._optimisers.items():
            optimiser.start_iteration(iteration, self._iterations, decay if name == "segmenter" else 1.0)
        self._dropout.manual_seed(derive_seed(self.seed, "dropout", iteration) % 2**63)
        counts = collectives.all_reduce_sum(class_counts(labels, self.num_classes))
        metrics: dict[str, Tensor] = {}

        # g_A
        with self._training("generator"):
            with torch.no_grad():
                fake_a = self._decode(self._segment(image_b).features, image_b)
            fake_b = self._call("generator", image_a)
            cycle_b = self._call("generator", fake_a)
            cycle_a = self._decode(self._segment(fake_b).features, fake_b)
            losses = {
                "loss_cycle": self._cycle(image_a, cycle_a, image_b, cycle_b),
                "loss_adversarial_target": lsgan_generator_loss(self._call("critic_target", fake_b)),
            }
            metrics |= self._move("generator", losses["loss_cycle"] + losses["loss_adversarial_target"], losses)

        # d_B
        with self._training("critic_target"):
            earlier_b = self._pools["target"].swap(fake_b)
            loss = lsgan_discriminator_loss(
                self._call("critic_target", image_b), self._call("critic_target", earlier_b)
            )
            metrics |= self._move("critic_target", loss, {"loss_discriminator_target": loss})

        # e_B, s_B
        with self._training("segmenter"):
            before = Snapshot([buffer for layer in self._norms for buffer in layer.buffers()])
            with torch.no_grad():
                fake_b = self._call("generator", image_a)
            on_fake = self._segment(fake_b, update_running_stats=True)
            on_real = self._segment(image_b, update_running_stats=True)
            fake_a = self._decode(on_real.features, image_b)
            cycle_a, cycle_b = self._decode(on_fake.features, fake_b), self._call("generator", fake_a)
            verdict = self._call("critic_source", fake_a)
            losses = self._segmentation(on_fake, labels, counts)
            losses["loss_prediction"] = lsgan_generator_loss(self._call("critic_prediction", on_real.main))
            losses["loss_features"] = lsgan_generator_loss(verdict[:, 1:])
            losses["loss_decoder"] = self._cycle(image_a, cycle_a, image_b, cycle_b) + lsgan_generator_loss(
                verdict[:, :1]
            )
            segmentation = losses["loss_cross_entropy_main"] + losses["loss_dice_main"]
            total = segmentation + c.lambda_l2 * half_squared_norm(self.segmenter)
            total = total + self._ramped(iteration) * losses["loss_prediction"]
            total = total + c.lambda_features * losses["loss_features"] + c.lambda_decoder * losses["loss_decoder"]
            if on_real.low is not None:
                losses["loss_prediction_low"] = lsgan_generator_loss(self._call("critic_low", on_real.low))
                total = total + c.lambda_low * (losses["loss_cross_entropy_low"] + losses["loss_dice_low"])
                total = total + c.lambda_prediction_low * losses["loss_prediction_low"]
            metrics |= {"loss_segmentation": segmentation.detach()} | self._move("segmenter", total, losses)
            before.restore_where(self._flag)

        # de_B; what the encoder says now serves the critics of the predictions too.
        with self._training("decoder"):
            with torch.no_grad():
                on_fake, on_real = self._segment(fake_b), self._segment(image_b)
            fake_a = self._decode(on_real.features, image_b)
            cycle_a, cycle_b = self._decode(on_fake.features, fake_b), self._call("generator", fake_a)
            loss = self._cycle(image_a, cycle_a, image_b, cycle_b)
            loss = loss + lsgan_generator_loss(self._call("critic_source", fake_a)[:, :1])
            metrics |= self._move("decoder", loss, {"loss_translation_to_source": loss})

        # d_A: its second output tells images made of target features from those made of translated source.
        with self._training("critic_source"):
            with torch.no_grad():
                cycle_a = self._decode(on_fake.features, fake_b)
            earlier_a = self._pools["source"].swap(fake_a)
            on_image, on_earlier, on_cycle = (
                self._call("critic_source", image) for image in (image_a, earlier_a, cycle_a)
            )
            loss = lsgan_discriminator_loss(on_image[:, :1], on_earlier[:, :1]) + lsgan_discriminator_loss(
                on_cycle[:, 1:], on_earlier[:, 1:]
            )
            metrics |= self._move("critic_source", loss, {"loss_discriminator_source": loss})

        # d_P
        for name, real, fake in (
            ("critic_prediction", on_fake.main, on_real.main),
            ("critic_low", on_fake.low, on_real.low),
        ):
            if real is not None and fake is not None:
                with self._training(name):
                    loss = lsgan_discriminator_loss(self._call(name, real), self._call(name, fake))
                    metrics |= self._move(name, loss, {f"loss_discriminator_{name.removeprefix('critic_')}": loss})
        return base.metrics(metrics, non_finite=self._flag)

    @contextmanager
    def _training(self, name: str) -> Iterator[None]:
        """A sub-step: gradients for one network alone."""
        for other, network in self.networks.items():
            network.requires_grad_(other == name)
        yield

    def _move(self, name: str, loss: Tensor, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Move the network of a sub-step, unless something was not finite on some worker, now or before."""
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = self._optimisers[name].gradients()
        collectives.average_gradients(gradients)
        guard = self._guards[name]
        guard.flag = self._flag
        guard.update(losses, gradients)
        self._flag = guard.flag
        self._optimisers[name].step(self._flag)
        return {key: value.detach() for key, value in losses.items()}

    def _call(self, name: str, x: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            return at_least_float32(self.networks[name](x))

    def _decode(self, features: Tensor, image: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            return at_least_float32(self.decoder(features, image))

    def _segment(self, image: Tensor, update_running_stats: bool = False) -> SIFAOutput:
        for layer in self._norms:
            layer.track_running_stats = update_running_stats
        try:
            with autocast(self.device, self.precision):
                output: SIFAOutput = self.segmenter(image)
        finally:
            for layer in self._norms:
                layer.track_running_stats = True
        return SIFAOutput(*(None if x is None else at_least_float32(x) for x in output))  # type: ignore[arg-type]

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
        start, end = (part * self._iterations for part in self.config.prediction_ramp)
        if iteration >= end:
            return self.config.lambda_prediction
        return self.config.lambda_prediction * max(0.0, iteration - start) / (end - start)

    def non_finite_losses(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, guard in self._guards.items():
            losses = guard.losses()
            found |= {f"{name}_{key}" if key == "gradient_norm" else key: value for key, value in losses.items()}
        return found

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        was_training = self.segmenter.training
        self.segmenter.eval()
        with autocast(self.device, self.precision):
            output: SIFAOutput = self.segmenter(images.to(self.device, self._dtype))
        self.segmenter.train(was_training)
        return at_least_float32(output.main).softmax(dim=1)

    def prepare(self, slices: TrainingSlices) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self._optimisers.items()},
            "phase": {"iterations": self._iterations},
            "pools": {name: pool.state_dict() for name, pool in self._pools.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        base.load_networks(self.networks, state["networks"])
        self._begin_anew()
        if state["phase"]["iterations"]:
            self.start_phase(state["phase"]["iterations"])
            for name, optimiser in self._optimisers.items():
                optimiser.load_state_dict(state["optimisers"].get(name, {}))
        for name, pool in self._pools.items():
            pool.load_state_dict(state["pools"][name], self.device)
