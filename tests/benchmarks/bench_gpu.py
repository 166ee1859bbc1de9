"""Pairs of slices per second and memory of a training step, by precision: ``python tests/benchmarks/bench_gpu.py``.

Needs no data and no Ray. Each row builds the method anew, runs some steps, and times as many as fit into
``--seconds``. It ends after ``--minutes`` with the rows it has, as a Markdown table.
"""

from __future__ import annotations

import argparse
import gc
import time

import torch

from mpscl_ray.config import load_config
from mpscl_ray.methods.base import Batch
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
}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(preset: str, settings: list[str], batch: int, size: int, device: torch.device, seconds: float) -> str:
    """The cells of one row: pairs/s, ms a step, GiB."""
    config = load_config(preset, ["data.source=a", "data.target=b", *settings])
    phase = config.schedule[-1][0]
    method = build_method(config, phase, build_segmenter(config, CLASSES, phase), CLASSES, device)
    method.start_phase(10_000)
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randn(batch, 1, size, size, generator=generator).to(device) for _ in range(2))
    labels = torch.randint(0, CLASSES, (batch, size, size), generator=generator).to(device)
    step = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(3):  # allocation, choice of kernels, compilation
        method.step(Batch(source, labels, target), step)
        step += 1
    synchronise(device)
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(5 if device.type == "cuda" else 1):
            method.step(Batch(source, labels, target), step)
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
            cells = measure(options.preset, settings, options.batch, options.size, device, options.seconds)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            cells = f"failed: {str(error).splitlines()[0][:80]} | | "
        print(f"| {row} | {cells} |", flush=True)
        gc.collect()
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
