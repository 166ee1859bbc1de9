"""Many slices streamed through Ray Data once: memory, time to the first batch, slices per second.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_streaming.py [SLICES ...] [--size 64] [--store-mib 200] [--read ALL]

For each number of slices (10,000 and 100,000 without words) a dataset of cases of 100 slices is written, opened, and
read in a random order, once or as many as --read says, as a training does that does not keep its slices in memory. By
fifths of what is read: the most that the object store held, and at the end of each the private memory of this process
and of all of its Ray.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import ray
import torch

from mpscl_ray.data.dataset import load_manifest
from mpscl_ray.data.loader import SliceStream
from mpscl_ray.data.ray_source import open_slices
from mpscl_ray.distributed.ray_session import connect
from tests.benchmarks.bench_loader import CASE_SLICES, CLASSES, watch_memory
from tests.benchmarks.bench_start import descendants
from tests.written_dataset import save_plain_manifest, write_plain_case

PARTS = 5
BATCH = 16


def write(folder: Path, slices: int, size: int) -> None:
    """Slices of noise with labels, all of them for training."""
    random = np.random.default_rng(0)
    cases = []
    for start in range(0, slices, CASE_SLICES):
        image = random.standard_normal((CASE_SLICES, size, size), dtype=np.float32)
        label = random.integers(0, 5, (CASE_SLICES, size // 8, size // 8), np.uint8).repeat(8, axis=1).repeat(8, axis=2)
        cases.append(write_plain_case(folder, f"case-{start:07d}", "train", image, label, CLASSES))
    save_plain_manifest(folder, "ct", CLASSES, (size, size), cases)


def private_mib() -> float:
    """Private memory of this process and all that it has started, those of Ray among them."""
    total = 0
    for number in descendants(os.getpid()):
        with suppress(OSError):  # ended meanwhile
            text = Path(f"/proc/{number}/status").read_text(encoding="utf-8")
            total += int(text.partition("RssAnon:")[2].split()[0])
    return total / 2**10


def read(folder: Path, slices: int, size: int, store: int, number: int) -> None:
    """Read so many slices, and print what it took."""
    with connect(num_cpus=2, object_store_memory=store):
        ray.get([ray.remote(num_cpus=0)(lambda: None).remote() for _ in range(4)])  # processes have started
        begin = time.perf_counter()
        load_manifest(folder)
        manifest = time.perf_counter() - begin
        begin = time.perf_counter()
        source = open_slices(folder, "train", labels=True, in_memory=False)
        opened = time.perf_counter() - begin
        memory = []
        begin = time.perf_counter()
        with SliceStream(source, seed=0, domain="source", global_batch=BATCH) as stream:
            stream.next()
            first = time.perf_counter() - begin
            for _ in range(PARTS):
                with watch_memory() as peaks:
                    for _ in range(number // BATCH // PARTS):
                        stream.next()
                memory.append(peaks | {"own": private_mib()})
        seconds = time.perf_counter() - begin
    data = slices * size**2 * 5 / 2**20
    print(f"{slices:,} slices of {size} x {size}, {data:.0f} MiB; object store of {store / 2**20:.0f} MiB")
    print(f"  manifest {manifest:.2f} s, opening {opened:.2f} s, first batch {first:.2f} s after it")
    print(f"  {number:,} slices read, {number / seconds:.0f} a second")
    for name, title in (("own", "private memory"), ("store", "object store")):
        print(f"  {title} in MiB, by fifths: " + " ".join(f"{part[name]:.0f}" for part in memory), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("slices", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--size", type=int, default=64, help="height and width of a slice")
    parser.add_argument("--store-mib", type=int, default=200, help="size of Ray's object store")
    parser.add_argument("--read", type=int, help="slices to read; all by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for slices in options.slices:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), slices, options.size)
            read(Path(folder), slices, options.size, options.store_mib * 2**20, min(options.read or slices, slices))


if __name__ == "__main__":
    main()
