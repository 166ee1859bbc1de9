"""What a training will take: time, memory, disk and data, from a few timed steps; nothing is trained or kept."""

from __future__ import annotations

import datetime
import os
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mpscl_ray.config import Config, reads_target
from mpscl_ray.config.titles import phase_title, title_of
from mpscl_ray.data.ray_source import KEPT_FRACTION
from mpscl_ray.evaluate.tables import text_table
from mpscl_ray.methods.base import Batch, Method
from mpscl_ray.predict.predictor import choose_device
from mpscl_ray.prepare import phantom_dataset
from mpscl_ray.runs import json_output
from mpscl_ray.runs.checkpoint import Snapshot
from mpscl_ray.runs.wording import counted
from mpscl_ray.train.domains import Domains, load_domains
from mpscl_ray.train.phases import build_method, build_segmenter

_WARM_UP, _TIMED = 1, 3
"""Steps of a phase that are run: the first allocates and is not timed."""
_OBJECT_STORE_PART = 0.3
"""Part of a machine's memory that Ray gives its object store by default."""


@dataclass(frozen=True)
class PhaseCost:
    """What one phase takes on one worker."""

    name: str
    iterations: int
    seconds: float
    """Of one iteration."""
    parameters: int
    """Bytes of the weights and buffers of all networks."""
    checkpoint: int
    """Bytes of a checkpoint: weights, optimisers, what the method keeps."""
    peak: int
    """Highest memory in bytes: of this process on a CPU, of the tensors on a GPU."""


def plan(config: Config) -> str:
    """Time a few steps of each phase on slices of noise, and say what the whole training will take.

    Args:
        config: of the run; its datasets must exist. A worker's share of a batch runs on this machine, on as many
            threads as a worker has CPUs, or on a GPU.

    Returns:
        Text for the terminal.

    Raises:
        ConfigError: no such device, or datasets that do not fit the settings.
        DataError: a dataset is missing or damaged.
    """
    device = choose_device({"cpu": "cpu", "gpu": "cuda"}.get(config.scaling.device))
    config = phantom_dataset.resolve(config)
    domains, _ = load_domains(config)
    workers = config.scaling.least_workers
    torch.set_num_threads(max(1, int(config.scaling.cpus_per_worker)))
    torch.manual_seed(config.run.seed)
    costs = [_cost(config, domains, name, iterations, device) for name, iterations in config.schedule]
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    json_output.report(device=on, workers=workers, phases=costs)
    share, parts = config.data.global_batch_size // workers, config.optim.accumulate
    lines = [
        f"{title_of(config.method_name)}: {counted(workers, 'worker')} on {on}, {counted(share, 'slice')} of "
        f"{domains.source.size[0]} x {domains.source.size[1]} of each domain a worker and step"
        + (f", in {parts} micro-batches" if parts > 1 else "")
        + "; nothing was trained",
        "",
        _table(costs),
        "",
        *_resources(config, costs, device),
        *_data(config, domains),
    ]
    return "\n".join(lines)


def _cost(config: Config, domains: Domains, name: str, iterations: int, device: torch.device) -> PhaseCost:
    classes = len(domains.classes)
    segmenter = build_segmenter(config, classes, name)
    method = build_method(config, name, segmenter, classes, device)
    method.start_phase(max(iterations, 1))
    batch = _noise(config, domains, name, device, method.target_views)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for step in range(_WARM_UP + _TIMED):
        if step == _WARM_UP:
            _wait(device)
            start = time.perf_counter()
        method.step(batch, step)
    _wait(device)
    seconds = (time.perf_counter() - start) / _TIMED
    tensors = Snapshot.take(method.state_dict(), copy=False).tensors
    return PhaseCost(name, iterations, seconds, _weights(method), _bytes(tensors), _peak(device))


def _noise(config: Config, domains: Domains, phase: str, device: torch.device, target_views: int) -> Batch:
    share = config.data.global_batch_size // config.scaling.least_workers
    shape = (share, *domains.source.size)
    label = torch.randint(0, len(domains.classes), shape, device=device)
    target = torch.randn(share, 1, *domains.source.size, device=device) if reads_target(phase) else None
    view = target if target_views == 2 else None
    return Batch(torch.randn(share, 1, *domains.source.size, device=device), label, target, view)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _weights(method: Method) -> int:
    return sum(_bytes(network.state_dict()) for network in method.networks.values())


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _table(costs: list[PhaseCost]) -> str:
    header = ["phase", "iterations", "s each", "time", "weights", "checkpoint", "peak memory"]
    rows = [
        [
            phase_title(cost.name),
            str(cost.iterations),
            f"{cost.seconds:.3g}",
            _time(cost.iterations * cost.seconds),
            _size(cost.parameters),
            _size(cost.checkpoint),
            _size(cost.peak),
        ]
        for cost in costs
    ]
    cells = [header, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return text_table(cells, widths)


def _resources(config: Config, costs: list[PhaseCost], device: torch.device) -> list[str]:
    total = sum(cost.iterations * cost.seconds for cost in costs)
    kept = config.run.keep_checkpoints * max(cost.checkpoint for cost in costs)
    # The best checkpoint and the end of each phase stay beside those to resume from.
    disk = kept + sum(cost.checkpoint for cost in costs) + costs[-1].checkpoint
    peak = max(cost.peak for cost in costs)
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
        fits = f"a GPU has {_size(there)}: " + (
            "a worker fits" if peak < there else "a worker does NOT fit; a larger optim.accumulate takes less"
        )
    else:
        memory, cores = _memory("SC_AVPHYS_PAGES"), len(os.sched_getaffinity(0))
        number = min(int(memory // peak), int(cores / config.scaling.cpus_per_worker))
        fits = (
            f"this machine has {_size(memory)} free and {counted(cores, 'CPU')}: room for "
            f"{counted(number, 'worker')} of this size"
        )
    return [
        f"time      {_time(total)} in all if {_TIMED} steps tell; without validation, start and scores at the end",
        f"memory    {_size(peak)} a worker at most; {fits}",
        f"disk      {_size(disk)} of checkpoints in {config.run.storage}: {config.run.keep_checkpoints} to resume "
        "from, the end of each phase, the best",
    ]


def _data(config: Config, domains: Domains) -> list[str]:
    pixels = domains.source.size[0] * domains.source.size[1]
    needs = [
        sum(case.slices * pixels * (5 if case.labelled else 4) for case in manifest.split(split))
        for manifest in (domains.source, domains.target)
        for split in ("train", "val")
    ]
    need, store = sum(needs), int(_OBJECT_STORE_PART * _memory("SC_PHYS_PAGES"))
    # Each split is kept or streamed for itself (open_slices).
    how = "kept in memory" if config.data.in_memory is True or max(needs) <= KEPT_FRACTION * store else "streamed"
    if config.data.in_memory is False:
        how = "streamed, as data.in_memory=false asks"
    return [f"data      {_size(need)} of training and validation slices: {how} (Ray's object store: {_size(store)})"]


def _memory(pages: str) -> int:
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def _time(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
