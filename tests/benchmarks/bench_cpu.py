"""Processor time of a step in fp32 and in bf16: ``OMP_NUM_THREADS=1 python tests/benchmarks/bench_cpu.py``.

Needs no data and no Ray. All variants are built first, and then take steps in turn, so that a change of the machine's
load meets all of them. Processor time is what other processes disturb least. Printed are the median of each variant,
and the median of its ratios to the preset as it is, round by round, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from mpscl_ray.config import load_config
from mpscl_ray.methods.base import Batch
from mpscl_ray.train.phases import build_method, build_segmenter

CLASSES = 5
VARIANTS = {
    "as it is": [],
    "fp32, channels last": ["precision.channels_last=true"],
    "bf16": ["precision.dtype=bf16", "precision.channels_last=false"],
    "bf16, channels last": ["precision.dtype=bf16", "precision.channels_last=true"],
}


def stepper(preset: str, settings: list[str], batch: int, size: int) -> Callable[[], object]:
    """A function that takes one step of the last phase, always with the same slices."""
    config = load_config(preset, ["data.source=a", "data.target=b", *settings])
    phase = config.schedule[-1][0]
    method = build_method(config, phase, build_segmenter(config, CLASSES, phase), CLASSES, torch.device("cpu"))
    method.start_phase(10_000)
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randn(batch, 1, size, size, generator=generator) for _ in range(2))
    labels = torch.randint(0, CLASSES, (batch, size, size), generator=generator)
    return lambda: method.step(Batch(source, labels, target), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="mr2ct/mpscl")
    parser.add_argument("--batch", type=int, default=2, help="pairs in a step")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each variant; one more is not timed")
    parser.add_argument("--set", nargs="*", default=[], help="settings of all variants")
    options = parser.parse_args()
    steppers = {
        name: stepper(options.preset, [*options.set, *settings], options.batch, options.size)
        for name, settings in VARIANTS.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for step in steppers.values():
        step()
    for _ in range(options.rounds):
        for name, step in steppers.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    print(
        f"{' '.join([options.preset, *options.set])}, {options.batch} pairs of {options.size} x {options.size}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print("\n| | s a step | times as fast |\n|---|---|---|")
    for name, taken in seconds.items():
        ratios = [base / own for base, own in zip(seconds["as it is"], taken, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {statistics.median(taken):.3f} | {spread} |")


if __name__ == "__main__":
    main()
