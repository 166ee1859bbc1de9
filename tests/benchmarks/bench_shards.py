"""Slices per second that the workers of a TorchTrainer get, and the seconds from its start to their first batch.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_shards.py [--slices 400] [--size 256] [--batch 16] [--workers 2]

Each worker takes its part of the batches of source and target, un-augmented, and computes nothing. The first line keeps
the slices in the object store, the second streams them through one that is smaller than the data.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpscl_ray.config import load_config
from mpscl_ray.data import SOURCE_DOMAIN, TARGET_DOMAIN
from mpscl_ray.data.dataset import load_manifest
from mpscl_ray.data.loader import SliceStream
from mpscl_ray.distributed import collectives
from mpscl_ray.distributed.ray_session import connect
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train import loop
from mpscl_ray.train.domains import Domains, open_data
from mpscl_ray.train.outcome import TrainResult
from mpscl_ray.train.ray import launch
from tests.benchmarks.bench_loader import write


def read(config: Any, data: Any, run: Any, device: Any, callback: Any, *more: Any, seconds: float) -> TrainResult:
    """Take batches in place of training; the result's losses are the time of the first and slices per second."""
    order = {"seed": 0, "global_batch": config.data.global_batch_size, "device": device}
    order |= {"rank": collectives.rank(), "world_size": collectives.world_size()}
    with (
        SliceStream(data.labelled, domain=SOURCE_DOMAIN, **order) as source,
        SliceStream(data.unlabelled, domain=TARGET_DOMAIN, **order) as target,
    ):
        source.next(), target.next()
        first = time.time()
        count, rate = 0, 0.0
        while (elapsed := time.time() - first) < seconds:
            count += sum(len(stream.next()["image"]) for stream in (source, target))
            rate = count / elapsed if elapsed else 0.0
    collectives.barrier()
    return TrainResult("finished", "", 0, 0, {"first": first, "rate": rate})


def reading_worker(worker: Any, seconds: float, settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What a worker runs, without training."""
    loop.train = functools.partial(read, seconds=seconds)
    return worker(settings, **more)


def main() -> None:
    """Measure both ways and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=400, help="slices in each domain")
    parser.add_argument("--size", type=int, default=256, help="height and width of a slice")
    parser.add_argument("--batch", type=int, default=16, help="slices of each domain in a batch")
    parser.add_argument("--workers", type=int, default=2, help="workers of the trainer")
    parser.add_argument("--seconds", type=float, default=10, help="time for each way of reading")
    options = parser.parse_args()
    launch.run_worker = functools.partial(reading_worker, launch.run_worker, options.seconds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, options.slices, options.size)
        folders = [folder / f"{domain}-parquet" for domain in (SOURCE_DOMAIN, TARGET_DOMAIN)]
        domains = Domains(*map(load_manifest, folders), *folders)
        data_bytes = options.slices * options.size**2 * 9
        for kept, store in ((True, 4 * data_bytes), (False, data_bytes // 2)):
            config = load_config(
                "small/mpscl",
                [
                    *(f"data.source={folders[0]}", f"data.target={folders[1]}"),
                    *(f"data.in_memory={json.dumps(kept)}", f"data.global_batch_size={options.batch}"),
                    *(f"scaling.num_workers={options.workers}", "scaling.cpus_per_worker=1", "run.select=label_free"),
                ],
            )
            run = RunDirectory(folder / f"run-{kept}")
            run.create()
            with connect(num_cpus=options.workers, object_store_memory=max(store, 100 * 2**20)), run.lock():
                begin = time.time()
                data = open_data(config, domains)
                opened = time.time()
                found = launch.fit_on_ray(config, run, data, False, "bench")["losses"]
            print(
                f"{'kept' if kept else 'streamed':10}{opened - begin:6.2f} s to open, {found['first'] - opened:6.2f} s "
                f"from there to the first batch, {found['rate']:6.0f} slices/s of worker 0",
                flush=True,
            )


if __name__ == "__main__":
    main()
