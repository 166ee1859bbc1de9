"""Collectives and bytes of one training step on two gloo workers, and a model of the step on many GPUs.

    python tests/benchmarks/bench_collectives.py [PRESET] [KEY=VALUE ...]

counts the collectives of a step of the adaptation (small/mpscl without words) as the process group is given them, and
compares their bytes with what each process wrote to its sockets. A ring sends 2 (N - 1) / N of the bytes of an
all-reduce from each worker. NCCL is given the same collectives, but those of the batch norms: nn.SyncBatchNorm gathers
statistics in the forward pass and sums gradients in the backward pass.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from mpscl_ray.config import Config, load_config
from mpscl_ray.distributed.batch_norm import batch_norms
from mpscl_ray.methods import Batch
from mpscl_ray.train.phases import build_method, build_segmenter
from tests.worker_processes import on_workers

CLASSES = 5
SIZE = 64
WORKERS = 2
STEPS = 3
BYTES = {"float": 4, "double": 8}
NVLINK_GB_S = 200.0
LATENCY_S = {8: 30e-6, 64: 60e-6, 256: 100e-6}
"""Assumed: speed of a ring within a node, and seconds of a small collective by the number of GPUs."""
OVERLAP = 0.5
"""Assumed share of a step in which gradients are sent while others are computed."""


def written() -> int:
    """Bytes that this process has written, to sockets too."""
    return int(re.search(r"^wchar: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)[1])  # type: ignore[index]


def step_of(config: Config) -> dict[str, Any]:
    """Collectives of a step, by kind and bytes; parameters and batch norms of the networks."""
    torch.manual_seed(0)
    segmenter = build_segmenter(config, CLASSES, "adaptation")
    method = build_method(config, "adaptation", segmenter, CLASSES, torch.device("cpu"))
    method.start_phase(100)
    own = config.data.global_batch_size // WORKERS
    batch = Batch(
        torch.randn(own, 1, SIZE, SIZE), torch.randint(0, CLASSES, (own, SIZE, SIZE)), torch.randn(own, 1, SIZE, SIZE)
    )
    steps = itertools.count()
    for _ in range(2):
        method.step(batch, next(steps))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        method.step(batch, next(steps))
    found: Counter[tuple[str, str, int]] = Counter()
    for event in profiler.profiler.kineto_results.events():
        if event.name().startswith("gloo:"):
            size = sum(math.prod(shape) for shape in event.shapes())
            found[event.name().removeprefix("gloo:"), event.dtypes()[0], size] += 1
    dist.barrier()
    before = written()
    for _ in range(STEPS):
        method.step(batch, next(steps))
    sent = (written() - before) / STEPS
    networks = method.networks
    return {
        "found": [(*kind, count) for kind, count in found.items()],
        "sent": sent,
        "parameters": {
            name: sum(p.numel() for p in network.parameters() if p.requires_grad) for name, network in networks.items()
        },
        "norms": [layer.num_features for network in networks.values() for layer in batch_norms(network)],
    }


def nccl(found: list[list[Any]], norms: list[int]) -> tuple[int, int, int]:
    """Collectives and bytes of a step with NCCL, and how many of them wait for those of batch norms.

    All but the statistics of batch norms, which are float64 with gloo, are the same. torch's nn.SyncBatchNorm gathers
    mean, 1 / deviation and count of each layer, and sums two gradients of each; both domains pass as one batch.
    """
    statistics = {size for channels in norms for size in (4 * channels + 2, 4 * channels)}  # of two domains
    others = [
        (size * BYTES[dtype], count) for _, dtype, size, count in found if dtype != "double" or size not in statistics
    ]
    channels = 2 * sum(norms)
    own = 4 * ((2 * channels + len(norms)) + 2 * channels)
    number = sum(count for _, count in others) + 2 * len(norms)
    return number, sum(size * count for size, count in others) + own, 2 * len(norms)


def modelled(gpus: int, gradients: int, waiting: int, compute_s: float, node_gb_s: float) -> float:
    """Seconds of a step on so many GPUs, eight in a node, each with the same batch as one GPU alone.

    Gradients go around a ring whose slowest link is the network of a node, while the backward pass goes on; the
    collectives of batch norms wait for each other.
    """
    speed = NVLINK_GB_S if gpus <= 8 else node_gb_s
    ring = 2 * (gpus - 1) / gpus * gradients / (speed * 1e9)
    return compute_s + waiting * LATENCY_S[gpus] + max(0.0, ring - OVERLAP * compute_s)


def main() -> None:
    words = sys.argv[1:] or ["small/mpscl"]
    config = load_config(words[0], [*words[1:], "data.source=a", "data.target=b", f"scaling.num_workers={WORKERS}"])
    result = on_workers(WORKERS, step_of, config)[0]
    found, norms = result["found"], result["norms"]
    print("gloo, two workers: collective, type, numbers, times in a step")
    for kind, dtype, size, count in sorted(found, key=lambda row: -row[2] * row[3]):
        print(f"  {kind:12}{dtype:8}{size:12,}{count:6}")
    total = sum(size * BYTES[dtype] * count for _, dtype, size, count in found)
    number = sum(row[3] for row in found)
    print(f"  {number} collectives, {total / 1e6:.2f} MB; {result['sent'] / 1e6:.2f} MB written by a worker in a step")
    gradients = 4 * sum(result["parameters"].values())
    print(
        f"  {result['parameters']} trained parameters, {gradients / 1e6:.1f} MB of gradients; {len(norms)} batch norms"
    )
    number, size, waiting = nccl(found, norms)
    print(f"NCCL: {number} collectives, {size / 1e6:.2f} MB, {waiting} of them for batch norms")
    print("model, share of the speed of as many GPUs alone: seconds of a step of one GPU, GB/s of a node, GPUs")
    for compute_s, node_gb_s in itertools.product((0.1, 0.3), (12.5, 50.0)):
        shares = [compute_s / modelled(gpus, gradients, waiting, compute_s, node_gb_s) for gpus in LATENCY_S]
        print(
            f"  {compute_s:4} s {node_gb_s:6} GB/s "
            + "".join(f"{n:5}: {x:.0%}" for n, x in zip(LATENCY_S, shares, strict=True))
        )


if __name__ == "__main__":
    main()
