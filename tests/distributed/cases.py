"""What each worker of the distributed tests runs. The global batch of a step is the same for any number of workers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
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
from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.distributed import collectives
from mpscl_ray.distributed.batch_norm import PerDomainForward, WorkersBatchNorm2d, convert_batch_norm
from mpscl_ray.errors import TrainingError
from mpscl_ray.methods import METHODS, MPSCL, SIFA, AdvEnt, Batch, Method, Segmentation
from mpscl_ray.methods.base import TrainingSlices, batch_segmentation_loss
from mpscl_ray.methods.losses import class_counts
from mpscl_ray.networks import build, initialise
from mpscl_ray.networks.deeplab import DeepLabV2
from mpscl_ray.train.phases import transfer_weights
from tests.tiny_methods import weights_checksum

CLASSES = 4
GLOBAL_BATCH = 8
SIZE = 32
STEPS = 6
WARM_UP = 3
CPU = torch.device("cpu")
HIDDEN = False
"""Whether a part of the source labels is not annotated."""


def global_batch(step: int) -> Batch:
    """Class 2 is in the last image alone, class 3 nowhere; the second half of the target images is nearly flat."""
    generator = torch.Generator().manual_seed(step)
    coarse = torch.randint(0, 2, (GLOBAL_BATCH, 4, 4), generator=generator)
    coarse[-1, 1:3, 1:3] = 2
    label = coarse.repeat_interleave(SIZE // 4, dim=1).repeat_interleave(SIZE // 4, dim=2)
    noise = torch.randn(2, GLOBAL_BATCH, 1, SIZE, SIZE, generator=generator, dtype=torch.float64)
    source = label[:, None] * 0.7 - 0.5 + 0.2 * noise[0]
    target = 0.5 - label.flip(0)[:, None] * 0.6 + 0.2 * noise[1]
    target[GLOBAL_BATCH // 2 :] *= 0.01
    if HIDDEN:
        label = label.clone()
        label[:3] = label[4, : SIZE // 2] = NOT_ANNOTATED
    return Batch(source, label, target, target_view=0.3 - 0.7 * target)


def partly_annotated(case: str) -> dict[str, Any]:
    """A case whose global batches have three source images, and half of the fifth, that are not annotated."""
    global HIDDEN
    HIDDEN = True
    try:
        return CASES[case]()
    finally:
        HIDDEN = False


def accumulated(case: str) -> dict[str, Any]:
    """A case in two micro-batches."""
    global OPTIM
    whole, OPTIM = OPTIM, dataclasses.replace(OPTIM, accumulate=2)
    try:
        return CASES[case]()
    finally:
        OPTIM = whole


def my_part(batch: Batch) -> Batch:
    size = GLOBAL_BATCH // collectives.world_size()
    rows = slice(collectives.rank() * size, (collectives.rank() + 1) * size)
    return Batch(**{name: images[rows] for name, images in vars(batch).items()})


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


def method(seed: int = 0, **settings: Any) -> MPSCL:
    chosen = {"discriminator_width": 4, "delta_th": 0.07, "lambda_main": 0.1, "lambda_aux": 0.02, **settings}
    return MPSCL(segmenter(seed), MPSCLConfig(**chosen), OPTIM, CLASSES, CPU, PrecisionConfig(), seed)


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


def uneven_shares(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """All slices of a global batch, of which the last worker has all but one for each other worker."""
    rank, last = collectives.rank(), collectives.world_size() - 1
    rows = [rank] if rank < last else list(range(last, GLOBAL_BATCH))
    return [(batch.source_image[row : row + 1], batch.source_label[row : row + 1]) for row in rows]


def non_finite(place: str) -> dict[str, Any]:
    """Two good steps, one with a NaN or an infinity in the batch of the last rank alone, and one more good step."""
    trained = method(0, discriminator="patchgan")
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


def batch_norm() -> dict[str, Any]:
    """One layer over the workers, and nn.BatchNorm2d on the union of their batches."""
    results: dict[str, Any] = {}
    rank = collectives.rank()
    cases = {
        "plain": {"dtype": torch.float64},
        "single": {"dtype": torch.float32},
        "channels_last": {"dtype": torch.float32, "memory_format": torch.channels_last},
        "no_affine": {"dtype": torch.float64, "affine": False},
        "two_parts": {"dtype": torch.float64, "inputs": 2},
        "second_moves": {"dtype": torch.float64, "inputs": 2, "moves": (False, True)},
        "uneven": {"dtype": torch.float64, "sizes": [5, 1, 2, 4]},
    }
    for name, case in cases.items():
        dtype = case["dtype"]
        sizes = case.get("sizes", [3] * 4)[: collectives.world_size()]
        rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        reference = nn.BatchNorm2d(6, affine=case.get("affine", True)).to(dtype)
        generator = torch.Generator().manual_seed(1)
        if reference.affine:
            with torch.no_grad():
                reference.weight.normal_(generator=generator)
                reference.bias.normal_(generator=generator)
        layer = nn.BatchNorm2d(6, affine=reference.affine).to(dtype)
        layer.load_state_dict(reference.state_dict())
        converted = convert_batch_norm(layer, CPU)
        assert isinstance(converted, WorkersBatchNorm2d)
        assert convert_batch_norm(converted, CPU) is converted
        assert list(converted.state_dict()) == list(reference.state_dict())
        ours, plain = (
            PerDomainForward(converted, case.get("moves")),
            PerDomainForward(reference, case.get("moves")),
        )
        for _ in range(2):
            whole = [
                torch.randn(sum(sizes), 6, 5, 4, generator=generator, dtype=dtype) * 3 + 7
                for _ in range(case.get("inputs", 1))
            ]
            weights = [torch.randn(x.shape, generator=generator, dtype=dtype) for x in whole]
            union = [x.clone().requires_grad_() for x in whole]
            part = [
                x[rows].contiguous(memory_format=case.get("memory_format", torch.contiguous_format)).requires_grad_()
                for x in whole
            ]
            expected, output = plain(*union), ours(*part)
            sum((y.tanh() * w).sum() for y, w in zip(expected, weights, strict=True)).backward()
            sum((y.tanh() * w[rows]).sum() for y, w in zip(output, weights, strict=True)).backward()
            for i in range(len(whole)):
                results[f"ours.{name}.output{i}"], results[f"reference.{name}.output{i}"] = output[i], expected[i][rows]
                results[f"ours.{name}.gradient{i}"], results[f"reference.{name}.gradient{i}"] = (
                    part[i].grad,
                    union[i].grad[rows],
                )
        if reference.affine:
            for key in ("weight", "bias"):
                results[f"ours.{name}.{key}"] = collectives.all_reduce_sum(getattr(converted, key).grad)
                results[f"reference.{name}.{key}"] = getattr(reference, key).grad
        results |= {f"ours.{name}.{key}": value for key, value in converted.named_buffers()}
        results |= {f"reference.{name}.{key}": value for key, value in reference.named_buffers()}
        results[f"ours.{name}.evaluated"] = converted.eval()(whole[0])
        results[f"reference.{name}.evaluated"] = reference.eval()(whole[0])
    return {name: value.detach() for name, value in results.items()}


def adamw() -> dict[str, Any]:
    """A segmenter and discriminators, the first trained by AdamW."""
    seed = collectives.rank()
    config = AdvEntConfig(discriminator_width=4, segmentation_loss="plain", **STRONG)
    optim = OptimConfig(kind="adamw", lr=1e-3, lr_discriminator=1e-3)
    trained = AdvEnt(segmenter(seed), config, optim, CLASSES, CPU, PrecisionConfig(), seed)
    trained.start_phase(STEPS)
    return record(trained)


def batch_losses() -> dict[str, Any]:
    """Value of the loss of the batch, and the gradient of its mean over the workers in the logits of all slices."""
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(GLOBAL_BATCH, CLASSES, 6, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES - 1, (GLOBAL_BATCH, 6, 8), generator=generator)  # one class is nowhere
    labels[0], labels[-1, :3] = 0, NOT_ANNOTATED
    size = GLOBAL_BATCH // collectives.world_size()
    rows = slice(collectives.rank() * size, (collectives.rank() + 1) * size)
    mine = logits[rows].requires_grad_()
    counts = collectives.all_reduce_sum(class_counts(labels[rows], CLASSES))
    loss = batch_segmentation_loss({"main": mine, "aux": mine.flip(1)}, labels[rows], counts, 0.1, 0.4)
    loss.total.backward()  # type: ignore[no-untyped-call]
    assert mine.grad is not None
    gradient = collectives.gather_batch(mine.grad) / collectives.world_size()
    return {"loss": np.array(collectives.reduce_metrics(loss.parts | {"total": loss.total})["total"]), "g": gradient}


def objects() -> dict[str, Any]:
    """What every rank gets of objects and sums that differ between the ranks."""
    rank = collectives.rank()
    everything = collectives.gather_objects({"rank": rank, "text": "ä" * (10 * rank)})
    assert [item["rank"] for item in everything] == list(range(collectives.world_size()))
    assert [len(item["text"]) for item in everything] == [10 * r for r in range(collectives.world_size())]
    assert collectives.broadcast_object([rank, None, 0.5]) == [0, None, 0.5]
    counts, halves = collectives.all_reduce_sums(torch.tensor([[rank, 1]]), torch.tensor(0.5))
    assert counts.dtype == torch.int64
    network = nn.Linear(2, 2)
    nn.init.constant_(network.weight, rank)
    try:
        collectives.assert_same_weights({"linear": network})
        message = ""
    except TrainingError as error:
        message = str(error)
    value = torch.tensor(float(rank + 1), requires_grad=True)
    denominator = collectives.all_reduce_sum(torch.tensor(2.0 * rank)) + 1.0
    share = collectives.ddp_ratio(value * value, denominator)
    share.backward()
    collectives.barrier()
    return {
        "counts": counts,
        "halves": halves,
        "drift_was_seen": np.array("linear" in message),
        "any": collectives.all_reduce_any(torch.tensor(rank == 1)),
        "none": collectives.all_reduce_any(torch.tensor(False)),
        "ratio": np.array(collectives.reduce_metrics({"ratio": share})["ratio"]),
        "ratio_gradient": value.grad,
    }


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "fc-released": lambda: parity({"discriminator": "fc", "margin_form": "released"}),
    "fc-paper": lambda: parity({"discriminator": "fc", "margin_form": "paper"}),
    "patchgan-released": lambda: parity(
        {"discriminator": "patchgan", "margin_form": "released", "temperature_source": 2.0}
    ),
    "patchgan-paper": lambda: parity({"discriminator": "patchgan", "margin_form": "paper"}),
    "fc-baseline": lambda: parity({"discriminator": "fc", "beta": 0.0, "gamma": 0.0}),
    "segmentation": source_only_then_adapted,
    "segmentation-batch": lambda: look_and_train("segmentation", segmentation_loss="plain", class_weight_floor=0.4),
    "adamw": adamw,
    "advent": lambda: look_and_train("advent", discriminator_width=4, **STRONG),
    "minent": lambda: look_and_train("advent", variant="minent", **STRONG),
    "adaoutput": lambda: look_and_train("adaoutput", discriminator_width=4, discriminator="patchgan", **STRONG),
    "adaoutput-least-squares": lambda: look_and_train(
        "adaoutput", discriminator_width=4, adversarial_loss="least_squares", **STRONG
    ),
    "clan": lambda: look_and_train("clan", discriminator_width=4, lambda_adversarial=0.1, lambda_weight=0.1),
    "clan-focal": lambda: look_and_train(
        "clan", discriminator_width=4, segmentation_loss="focal", lambda_adversarial=0.1, warmup_fraction=0.2
    ),
    "intrada": lambda: look_and_train("intrada", discriminator_width=4, **STRONG),
    "intrada-volumes": lambda: look_and_train(
        "intrada", discriminator_width=4, unit="volume", score="foreground_entropy", **STRONG
    ),
    "cag": lambda: look_and_train("cag", min_pixels=2, probability_threshold=0.4),
    "cag-ce": lambda: look_and_train(
        "cag",
        min_pixels=2,
        segmentation_loss="ce",
        distance_quantile=None,
        distance_threshold=0.01,
        bn_running_stats="target",
    ),
    "mean_teacher": lambda: look_and_train("mean_teacher", seed=3, mixing=0.5, share_matching=0.5, ramp=3),
    "mean_teacher-target": lambda: look_and_train("mean_teacher", bn_running_stats="target", ramp=0),
    "mean_teacher-all": lambda: look_and_train(
        "mean_teacher",
        seed=3,
        bn_running_stats="target",
        mixing=0.5,
        consistency=1.0,
        contrast=0.5,
        delta_th=0.02,
        share_matching=0.5,
        adabn=True,
        ramp=3,
    ),
    "sifa": lambda: sifa(pool_size=2),
    "sifa-first": lambda: sifa(version="v1", pool_size=2, dropout=0.25, adversarial_prediction_ramp=(0.1, 0.4)),
    "adabn": lambda: look_and_train("adabn"),
    **{
        f"{case}-partly-annotated": functools.partial(partly_annotated, case)
        for case in ("fc-released", "clan-focal", "cag-ce", "mean_teacher", "sifa")
    },
    **{
        f"{case}-accumulated": functools.partial(accumulated, case)
        for case in ("fc-released", "segmentation", "sifa-first")
    },
    "non-finite-source": lambda: non_finite("source"),
    "non-finite-target": lambda: non_finite("target"),
    "batch-norm": batch_norm,
    "objects": objects,
    "batch-losses": batch_losses,
}


def run_case(name: str) -> dict[str, np.ndarray[Any, Any]]:
    """What this worker has in the end."""
    results = CASES[name]()
    return {key: np.asarray(x.detach() if isinstance(x, Tensor) else x) for key, x in results.items()}
