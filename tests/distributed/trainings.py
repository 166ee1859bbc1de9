"""Trainings of the distributed tests, by methods with tiny networks, with everything that has to be the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpscl_ray.config import (
    METHOD_CONFIGS,
    AdvEntConfig,
    MPSCLConfig,
    OptimConfig,
    PrecisionConfig,
    SegmentationConfig,
    SIFAConfig,
)
from mpscl_ray.distributed import collectives
from mpscl_ray.methods import METHODS, MPSCL, SIFA, AdvEnt, Method, Segmentation
from mpscl_ray.methods.base import TrainingSlices
from mpscl_ray.networks import build, initialise
from mpscl_ray.networks.deeplab import DeepLabV2
from mpscl_ray.train.phases import transfer_weights
from tests.distributed.global_batches import CLASSES, CPU, GLOBAL_BATCH, SIZE, global_batch, my_part, uneven_shares
from tests.tiny_methods import weights_checksum

STEPS = 6
WARM_UP = 3


def segmenter(seed: int, **arguments: Any) -> DeepLabV2:
    network = DeepLabV2(
        CLASSES, (1, 1, 1, 1), base_channels=4, output_stride=4, in_channels=1, train_bn_affine=True, **arguments
    )
    initialise(network, seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():  # larger than the official start, so that features differ
            if name.endswith("weight") and parameter.ndim == 4:
                parameter.mul_(20)
    return network.double()


def method(seed: int = 0, *, optim: OptimConfig | None = None, **settings: Any) -> MPSCL:
    chosen = {"discriminator_width": 4, "delta_th": 0.07, "lambda_main": 0.1, "lambda_aux": 0.02, **settings}
    return MPSCL(segmenter(seed), MPSCLConfig(**chosen), optim or OPTIM, CLASSES, CPU, PrecisionConfig(), seed)


STRONG = {"lambda_main": 0.1, "lambda_aux": 0.02}
OPTIM = OptimConfig(lr=2e-3, lr_discriminator=1e-3)


def named_gradients(networks: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{network}.{name}": parameter.grad.clone()
        for network, module in networks.items()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def flat_state(state: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, dict):
            tensors |= flat_state(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            tensors[prefix + name] = value.detach().clone()
    return tensors


def parity(settings: dict[str, Any]) -> dict[str, Any]:
    """Warm-up and adaptation with everything that must not depend on the number of workers."""
    # A start that differs between the ranks: wrapping must bring rank 0's weights to all.
    seed = collectives.rank()
    config = AdvEntConfig(
        discriminator=settings["discriminator"], discriminator_width=4, lambda_main=0.1, lambda_aux=0.02
    )
    warm_up = AdvEnt(segmenter(seed), config, OPTIM, CLASSES, CPU, PrecisionConfig(), seed)
    warm_up.start_phase(WARM_UP)
    for step in range(WARM_UP):
        warm_up.step(my_part(global_batch(step)), step)
    trained = method(seed, **settings)
    transfer_weights(trained.networks, {name: network.state_dict() for name, network in warm_up.networks.items()})
    trained.start_phase(STEPS)
    trained.initialise_prototypes(uneven_shares(global_batch(100)))
    return {"prototypes_initial": trained.prototypes.clone(), **record(trained)}


def look_and_train(name: str, seed: int | None = None, **settings: Any) -> dict[str, Any]:
    """Any method, after it has looked at slices that the workers share unevenly; its draws need one seed for all."""
    kind = METHODS[name]
    network = segmenter(collectives.rank(), **getattr(kind, "segmenter_arguments", {}))
    seed = collectives.rank() if seed is None else seed
    method = kind(network, METHOD_CONFIGS[name](**settings), OPTIM, CLASSES, CPU, PrecisionConfig(), seed)
    method.start_phase(STEPS)
    method.prepare(slices())
    results = record(method)
    if method.end_phase(slices()):
        collectives.assert_same_weights(method.networks)
        results |= {f"state.{name}": tensor for name, tensor in flat_state(method.state_dict()).items()}
    return results


def sifa(**settings: Any) -> dict[str, Any]:
    """SIFA with tiny networks."""
    config = SIFAConfig(
        generator_width=2,
        generator_blocks=1,
        decoder_blocks=1,
        encoder_width=1,
        discriminator_width=2,
        output_stride=4,
        **settings,
    )
    seed = collectives.rank()
    network = build({"num_classes": CLASSES, **config.network_arguments()})
    initialise(network, seed)
    trained = SIFA(network.double(), config, OPTIM, CLASSES, CPU, PrecisionConfig(), 3)
    trained.start_phase(STEPS)
    return record(trained, steps=4)


def slices() -> TrainingSlices:
    """Eight slices of each domain, the target's in four volumes; the last worker has nearly all of them."""
    rank, last = collectives.rank(), collectives.world_size() - 1
    rows = torch.tensor([rank] if rank < last else list(range(last, GLOBAL_BATCH)))
    whole = global_batch(100)
    assert whole.target_image is not None
    target = [(row[None], whole.target_image[row][None]) for row in rows]
    return TrainingSlices(
        labelled=lambda: uneven_shares(whole),
        synchronised_source_batches=lambda: [my_part(global_batch(step)).source_image for step in (100, 101)],
        synchronised_target_batches=lambda: [my_part(global_batch(step)).images[1] for step in (100, 101)],
        unlabelled=lambda: target,
        target_volumes=(range(3), range(3, 4), range(4, 7), range(7, 8)),
        size=(SIZE, SIZE),
        source_only_weights=lambda: segmenter(7).state_dict(),
    )


def source_only_then_adapted() -> dict[str, Any]:
    """Two methods that are wrapped around the same segmenter, one after the other."""
    shared = segmenter(collectives.rank())
    first = Segmentation(shared, SegmentationConfig(), OPTIM, CLASSES, CPU, PrecisionConfig(), 0)
    config = MPSCLConfig(discriminator_width=4, delta_th=0.1, bn_running_stats="target")
    second = MPSCL(shared, config, OPTIM, CLASSES, CPU, PrecisionConfig(), collectives.rank())
    first.start_phase(STEPS)
    results = record(first)
    second.start_phase(WARM_UP)
    for step in range(WARM_UP):
        second.step(my_part(global_batch(50 + step)), step)
    collectives.assert_same_weights(second.networks)
    return results | {f"state.adapted.{name}": tensor for name, tensor in flat_state(second.state_dict()).items()}


def record(trained: Method, steps: int = STEPS) -> dict[str, Any]:
    """Steps of a phase that has been started."""
    results: dict[str, Any] = {}
    local: list[dict[str, float]] = []
    reduced: list[dict[str, float]] = []
    for step in range(steps):
        metrics = trained.step(my_part(global_batch(WARM_UP + step)), step)
        local.append({name: float(value) for name, value in metrics.items()})
        reduced.append(collectives.reduce_metrics(metrics))
        if step in (0, steps - 1):
            place = "first" if step == 0 else "last"
            results |= {f"gradient_{place}.{name}": g for name, g in named_gradients(trained.networks).items()}
    collectives.assert_same_weights(trained.networks)
    results["checksum"] = np.frombuffer(bytes.fromhex(weights_checksum(trained.networks)), dtype=np.uint8)
    results |= {f"metric.{name}": np.array([m[name] for m in reduced]) for name in reduced[0]}
    results |= {f"local.{name}": np.array([m[name] for m in local]) for name in local[0]}
    results |= {f"state.{name}": tensor for name, tensor in flat_state(trained.state_dict()).items()}
    return results


def non_finite(place: str) -> dict[str, Any]:
    """Two good steps, one with a NaN or an infinity in the batch of the last rank alone, and one more good step."""
    trained = method(0, discriminator="patchgan", optim=dataclasses.replace(OPTIM, max_skipped_steps=0))
    trained.start_phase(STEPS)
    results: dict[str, Any] = {}
    flags: list[float] = []
    for step, name in enumerate(("first", "before", "after", "later")):
        batch = my_part(global_batch(step))
        assert batch.target_image is not None
        if name == "after" and collectives.rank() == collectives.world_size() - 1:
            image = {"source": batch.source_image, "target": batch.target_image}[place]
            image[0, 0, 3, 4] = torch.nan if place == "source" else torch.inf
        metrics = trained.step(batch, step)
        flags.append(float(metrics["non_finite"]))
        results |= {f"{name}.{key}": tensor for key, tensor in flat_state(trained.state_dict()).items()}
        if name == "after":
            results |= {f"local.{key}": value for key, value in trained.non_finite_losses().items()}
    losses = collectives.reduce_metrics(trained.non_finite_losses())
    results |= {f"loss.{key}": np.array(value) for key, value in losses.items()}
    return {"flags": np.array(flags), **results}


def adamw() -> dict[str, Any]:
    """A segmenter and discriminators, the first trained by AdamW."""
    seed = collectives.rank()
    config = AdvEntConfig(discriminator_width=4, segmentation_loss="plain", **STRONG)
    optim = OptimConfig(kind="adamw", lr=1e-3, lr_discriminator=1e-3)
    trained = AdvEnt(segmenter(seed), config, optim, CLASSES, CPU, PrecisionConfig(), seed)
    trained.start_phase(STEPS)
    return record(trained)
