"""Memory of the first adaptation step of mr2ct/mpscl on a CPU: ``python tests/benchmarks/bench_memory.py``.

The most bytes of tensors at a time beside weights and optimisers, gradients included, for 4 + 4 slices of 128 x 128.
Words of the command line are the settings of one row; without any, all ways to save memory are measured.
"""

from __future__ import annotations

import gc
import itertools
import sys

import torch
from torch.profiler import ProfilerActivity, profile

from mpscl_ray.config import load_config
from mpscl_ray.methods import Batch
from mpscl_ray.train.phases import build_method, build_segmenter

CLASSES = 5
CPU = torch.device("cpu")
ROWS: list[list[str]] = [
    [],
    ["optim.accumulate=2"],
    ["optim.accumulate=4"],
    ["optim.recompute=true"],
    ["optim.recompute=true", "optim.accumulate=2"],
    ["optim.recompute=true", "optim.accumulate=4"],
]


def peak(settings: list[str]) -> int:
    """Most bytes that the step allocates beyond what was there before."""
    config = load_config("mr2ct/mpscl", ["data.source=a", "data.target=b", *settings])
    segmenter = build_segmenter(config, CLASSES, "adaptation")
    method = build_method(config, "adaptation", segmenter, CLASSES, CPU)
    method.start_phase(100)
    source, target = torch.randn(2, 4, 1, 128, 128)
    batch = Batch(source, torch.randint(0, CLASSES, (4, 128, 128)), target)
    gc.collect()  # what the row before has left must not be freed in the step
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        method.step(batch, 0)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


if __name__ == "__main__":
    for row in [sys.argv[1:]] if len(sys.argv) > 1 else ROWS:
        print(f"{peak(row) / 2**30:.2f} GiB  {' '.join(row) or 'nothing set'}", flush=True)
