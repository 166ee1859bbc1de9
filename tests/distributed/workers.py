"""What each gloo process of the distributed tests runs: ``workers.py RANK WORLD_SIZE FOLDER CASE...``.

Each case writes ``FOLDER/CASE-WORLD_SIZE-RANK.npz``. The global batch of a step is the same for every number of workers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpscl_ray import distributed
from mpscl_ray.methods import MPSCL, Batch, MPSCLConfig, Segmentation, SegmentationConfig
from mpscl_ray.networks import initialise
from mpscl_ray.networks.deeplab import DeepLabV2
from mpscl_ray.optimisation import OptimConfig, PrecisionConfig

CLASSES = 4
GLOBAL_BATCH = 8
SIZE = 32
STEPS = 20
CPU = torch.device("cpu")


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
    return Batch(source, label, target)


def my_part(batch: Batch) -> Batch:
    size = GLOBAL_BATCH // distributed.world_size()
    rows = slice(distributed.rank() * size, (distributed.rank() + 1) * size)
    assert batch.target_image is not None
    return Batch(batch.source_image[rows], batch.source_label[rows], batch.target_image[rows])


def segmenter(seed: int) -> DeepLabV2:
    network = DeepLabV2(CLASSES, (1, 1, 1, 1), width=4, output_stride=4, in_channels=1, train_norm_affine=True)
    initialise(network, seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():  # larger than the official start, so that features differ
            if name.endswith("weight") and parameter.ndim == 4:
                parameter.mul_(20)
    return network.double()


def method(seed: int = 0, **settings: Any) -> MPSCL:
    config = MPSCLConfig(**{"discriminator_width": 4, "delta_th": 0.02, "lambda_main": 0.1, "lambda_aux": 0.02, **settings})
    return MPSCL(segmenter(seed), config, OPTIM, CLASSES, CPU, PrecisionConfig(), seed)


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


def parity(settings: dict[str, Any]) -> dict[str, Tensor | np.ndarray[Any, Any]]:
    """Warm-up and adaptation (or plain segmentation) with everything that must not depend on the number of workers."""
    results: dict[str, Any] = {}
    # A start that differs between the ranks: wrapping must bring rank 0's weights to all.
    seed = distributed.rank()
    if settings.get("method") == "segmentation":
        trained: MPSCL | Segmentation = Segmentation(
            segmenter(seed), SegmentationConfig(), OPTIM, CLASSES, CPU, PrecisionConfig(), seed
        )
    else:
        trained = method(seed, **settings)
    trained.start_phase(5, adapt=False)
    for step in range(5):
        trained.step(my_part(global_batch(step)), step)
    slices = my_part(global_batch(100))
    # Shares of different lengths: the last rank brings its slices one by one, twice over in all.
    batches = [(slices.source_image, slices.source_label)]
    trained.initialise_prototypes(batches)
    if isinstance(trained, MPSCL):
        results["prototypes_initial"] = trained.prototypes
    trained.start_phase(STEPS)
    local: list[dict[str, float]] = []
    reduced: list[dict[str, float]] = []
    for step in range(STEPS):
        metrics = trained.step(my_part(global_batch(5 + step)), step)
        local.append({name: float(value) for name, value in metrics.items()})
        reduced.append(distributed.reduce_metrics(metrics))
        if step in (0, STEPS - 1):
            results |= {f"gradient{step}.{name}": g for name, g in named_gradients(trained.networks).items()}
    distributed.assert_same_weights(trained.networks)
    results["checksum"] = np.frombuffer(bytes.fromhex(distributed.weights_checksum(trained.networks)), dtype=np.uint8)
    results |= {f"metric.{name}": np.array([m[name] for m in reduced]) for name in reduced[0]}
    results |= {f"local.{name}": np.array([m[name] for m in local]) for name in local[0]}
    results |= {f"state.{name}": tensor for name, tensor in flat_state(trained.state_dict()).items()}
    return results


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "fc-released": lambda: parity({"discriminator": "fc", "form": "released"}),
    "fc-paper": lambda: parity({"discriminator": "fc", "form": "paper", "norm_statistics": "target"}),
    "patchgan-released": lambda: parity({"discriminator": "patchgan", "form": "released", "temperature_source": 2.0}),
    "patchgan-paper": lambda: parity({"discriminator": "patchgan", "form": "paper"}),
    "segmentation": lambda: parity({"method": "segmentation"}),
}


def main(arguments: list[str]) -> None:
    rank, world_size, folder = int(arguments[0]), int(arguments[1]), Path(arguments[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store-{world_size}", rank=rank, world_size=world_size
    )
    for case in arguments[3:]:
        results = {name: np.asarray(value) for name, value in CASES[case]().items()}
        np.savez(folder / f"{case}-{world_size}-{rank}.npz", **results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
