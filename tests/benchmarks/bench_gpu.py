"""Pairs of slices per second and memory of a training step, by precision: ``python tests/benchmarks/bench_gpu.py``.

Needs no data and no Ray. Each row builds the method anew, runs some steps, and times as many as fit into
``--seconds``; rows with "captured" replay a CUDA graph of the step. It ends after ``--minutes`` with the rows it has,
as a Markdown table.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable

import torch

from mpscl_ray.config import load_config
from mpscl_ray.methods.adversarial import AlignmentMethod
from mpscl_ray.methods.base import Batch, Method
from mpscl_ray.train.phases import build_method, build_segmenter

CLASSES = 5
VARIANTS = {
    "fp32": ["precision.tf32=false"],
    "TF32": ["precision.tf32=true"],
    "TF32, four micro-batches": ["precision.tf32=true", "optim.accumulate=4"],
    "bf16": ["precision.dtype=bf16"],
    "bf16, channels last": ["precision.dtype=bf16", "precision.channels_last=true"],
    "TF32, compiled": ["precision.tf32=true", "precision.compile=true"],
    "bf16, compiled": ["precision.dtype=bf16", "precision.compile=true"],
    "TF32, captured": ["precision.tf32=true"],
    "bf16, captured": ["precision.dtype=bf16"],
}
WARM_UP = 3


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def captured(method: Method, batch: Batch) -> Callable[[Batch, int], None]:
    """A step that replays a CUDA graph of the method's update, with the tensors of ``batch`` as its inputs.

    Call it after some steps, which choose kernels and allocate what is kept. It is for one GPU.
    """
    if not isinstance(method, AlignmentMethod):
        raise RuntimeError(f"{type(method).__name__} has no update that is the same at each iteration")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        method.update(batch)

    def step(given: Batch, iteration: int) -> None:
        for mine, new in zip(vars(batch).values(), vars(given).values(), strict=True):
            mine.copy_(new, non_blocking=True)
        method.optimisers.set_learning_rates(iteration)
        graph.replay()

    return step


def warm_up(method: Method, batch: Batch, device: torch.device) -> None:
    """Some steps on a side stream, as a capture needs them: allocation, choice of kernels, compilation."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # None: no stream
        for step in range(WARM_UP):
            method.step(batch, step)
    synchronise(device)


def measure(
    preset: str, settings: list[str], batch: int, size: int, device: torch.device, seconds: float, graph: bool = False
) -> str:
    """The cells of one row: pairs/s, ms a step, GiB."""
    config = load_config(preset, ["data.source=a", "data.target=b", *settings])
    phase = config.schedule[-1][0]
    method = build_method(config, phase, build_segmenter(config, CLASSES, phase), CLASSES, device)
    method.start_phase(10_000)
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randn(batch, 1, size, size, generator=generator).to(device) for _ in range(2))
    labels = torch.randint(0, CLASSES, (batch, size, size), generator=generator).to(device)
    given = Batch(source, labels, target)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    warm_up(method, given, device)
    train: Callable[[Batch, int], object] = method.step
    if graph:
        train = captured(method, Batch(source.clone(), labels.clone(), target.clone()))
    step = WARM_UP
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(5 if device.type == "cuda" else 1):
            train(given, step)
            step, steps = step + 1, steps + 1
        synchronise(device)
    taken = (time.perf_counter() - start) / steps
    memory = f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f}" if device.type == "cuda" else ""
    return f"{batch / taken:.1f} | {1000 * taken:.1f} | {memory}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="mr2ct/mpscl")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=4, help="pairs in a step")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=15, help="timed for each row")
    parser.add_argument("--minutes", type=float, default=8, help="no row starts later")
    options = parser.parse_args()
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"{options.preset}, {options.batch} pairs of {options.size} x {options.size}, {name}, torch {torch.__version__}"
    )
    print("\n| | pairs/s | ms a step | GiB |\n|---|---|---|---|", flush=True)
    begin = time.perf_counter()
    for row, settings in VARIANTS.items():
        if time.perf_counter() - begin > 60 * options.minutes:
            break
        try:
            graph = row.endswith("captured")
            cells = measure(options.preset, settings, options.batch, options.size, device, options.seconds, graph)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            cells = f"failed: {str(error).splitlines()[0][:80]} | | "
        print(f"| {row} | {cells} |", flush=True)
        gc.collect()
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
