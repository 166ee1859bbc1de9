"""Slices per second from Parquet through Ray Data, against a plain torch DataLoader over npy files, in one run.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_loader.py [--slices 1000] [--size 256] [--batch 16] [--seconds 10]

Two domains are read side by side, as training does: the source with labels, the target without. Each way of reading
gives shuffled batches of float32 images and int64 labels to one process. Printed are the seconds from opening to the
first pair of batches, the slices per second after it (both domains together), the ratio to the DataLoader without
worker processes, and for the ways that go through Ray the most that the object store held and by how much the private
memory of all processes grew. The last lines stream through an object store that is smaller than the data.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import ray
import torch
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpscl_ray.data import SOURCE_DOMAIN, TARGET_DOMAIN, parquet_writer
from mpscl_ray.data.augment import AugmentConfig, augment
from mpscl_ray.data.loader import SliceStream
from mpscl_ray.data.ray_source import open_slices
from mpscl_ray.data.sampler import sample_keys
from mpscl_ray.data.slices import LocalSlices, Slices
from mpscl_ray.distributed.ray_session import connect
from tests.written_dataset import save_plain_manifest, write_plain_case

CASE_SLICES = 100
CLASSES = ("background", "MYO", "LAC", "LVC", "AA")
DOMAINS = (SOURCE_DOMAIN, TARGET_DOMAIN)


class NpySlices(Dataset):
    """One npy file for each slice, and one for its label, as other loaders of this kind of data have them."""

    def __init__(self, folder: Path, labels: bool) -> None:
        self.files = sorted(folder.glob("image-*.npy"))
        self.labels = labels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        path = self.files[index]
        item = {"image": torch.from_numpy(np.load(path, allow_pickle=False))[None]}
        if self.labels:
            label = np.load(path.with_name(path.name.replace("image", "label")), allow_pickle=False)
            item["label"] = torch.from_numpy(label).long()
        return item


def write(folder: Path, slices: int, size: int) -> None:
    """Write the same random slices of both domains as npy files and as prepared datasets."""
    rng = np.random.default_rng(0)
    for domain in DOMAINS:
        (folder / domain).mkdir()
        cases = []
        for start in range(0, slices, CASE_SLICES):
            depth = min(CASE_SLICES, slices - start)
            image = rng.standard_normal((depth, size, size), dtype=np.float32)
            label = rng.integers(0, 5, (depth, size // 8, size // 8), np.uint8).repeat(8, axis=1).repeat(8, axis=2)
            for i in range(depth):
                np.save(folder / domain / f"image-{start + i:06d}.npy", image[i])
                np.save(folder / domain / f"label-{start + i:06d}.npy", label[i])
            name = f"case-{start:06d}"
            cases.append(write_plain_case(folder / f"{domain}-parquet", name, "train", image, label, CLASSES))
        save_plain_manifest(folder / f"{domain}-parquet", domain, CLASSES, (size, size), cases)


def data_loader(folder: Path, batch: int, workers: int) -> Iterator[int]:
    """Endless shuffled batches of both domains; yields how many slices came."""

    def batches(domain: str) -> Iterator[dict[str, torch.Tensor]]:
        slices = NpySlices(folder / domain, domain == SOURCE_DOMAIN)
        loader = DataLoader(slices, batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
        return itertools.chain.from_iterable(itertools.repeat(loader))

    for source, target in zip(batches(SOURCE_DOMAIN), batches(TARGET_DOMAIN), strict=False):
        yield len(source["image"]) + len(target["image"])


def streams(opener: Callable[..., Slices], folder: Path, batch: int) -> Iterator[int]:
    """Endless batches of both domains from :class:`SliceStream`."""
    with ExitStack() as stack:
        opened = []
        for domain in DOMAINS:
            slices = opener(folder / f"{domain}-parquet", "train", labels=domain == SOURCE_DOMAIN)
            opened.append(stack.enter_context(SliceStream(slices, seed=0, domain=domain, global_batch=batch)))
        while True:
            yield sum(len(stream.next()["image"]) for stream in opened)


def measure(batches: Iterator[int], seconds: float) -> tuple[float, float]:
    """Seconds to the first batch, and slices per second after it."""
    begin = time.perf_counter()
    next(batches)
    first = time.perf_counter() - begin
    begin, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - begin) < seconds:
        count += next(batches)
    batches.close()
    return first, count / elapsed


def private_bytes() -> int:
    """Private memory of this process and of all processes that Ray runs on this machine."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text(encoding="utf-8")
        except (FileNotFoundError, ProcessLookupError):
            continue
        own = int(status.parent.name) == threading.main_thread().native_id
        if "RssAnon:" in text and (own or text.startswith("Name:\tray::")):
            total += int(text.partition("RssAnon:")[2].split()[0]) * 1024
    return total


@contextmanager
def watch_memory() -> Iterator[dict[str, float]]:
    """Largest use of the object store, and largest growth of private memory, in MiB, while the block runs."""
    peaks, done = {"store": 0.0, "private": 0.0}, threading.Event()
    size, before = ray.cluster_resources()["object_store_memory"], private_bytes()

    def sample() -> None:
        while not done.wait(0.2):
            used = size - ray.available_resources().get("object_store_memory", 0.0)
            peaks["store"] = max(peaks["store"], used / 2**20)
            peaks["private"] = max(peaks["private"], (private_bytes() - before) / 2**20)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()


def main() -> None:
    """Measure all ways and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=1000, help="slices in each domain")
    parser.add_argument("--size", type=int, default=256, help="height and width of a slice")
    parser.add_argument("--batch", type=int, default=16, help="slices of each domain in a batch")
    parser.add_argument("--seconds", type=float, default=10, help="time for each way of reading")
    parser.add_argument("--row-group", type=int, help="slices in a row group, in place of the format's own number")
    options = parser.parse_args()
    if options.row_group:
        parquet_writer.ROW_GROUP_SLICES = options.row_group
    torch.set_num_threads(1)
    results: list[tuple[str, float, float, str]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, options.slices, options.size)
        data = 2 * options.slices * options.size**2 * 4 + options.slices * options.size**2

        for workers in (0, 2):
            way = data_loader(folder, options.batch, workers)
            results.append((f"DataLoader over npy, {workers} worker processes", *measure(way, options.seconds), ""))
        way = streams(LocalSlices, folder, options.batch)
        results.append(("Parquet, in this process, no Ray", *measure(way, options.seconds), ""))

        stores = (
            ("kept in the object store", True, 4 * data),
            ("streamed", False, 4 * data),
            ("streamed", False, data // 3),
        )
        for title, in_memory, store in stores:
            store = max(store, 100 * 2**20)
            with connect(num_cpus=2, object_store_memory=store):
                # The first task of a cluster waits for processes to start; that is not reading.
                ray.get([ray.remote(num_cpus=0)(private_bytes).remote() for _ in range(4)])
                with watch_memory() as peaks:

                    def opener(*place: object, in_memory: bool = in_memory, **choice: bool) -> Slices:
                        return open_slices(*place, **choice, in_memory=in_memory)

                    timing = measure(streams(opener, folder, options.batch), options.seconds)
                memory = f"store {peaks['store']:.0f} of {store / 2**20:.0f} MiB, private +{peaks['private']:.0f} MiB"
                results.append((f"Parquet, Ray Data, {title}", *timing, memory))

    size, batch = options.size, options.batch
    print(f"{data / 2**20:.0f} MiB of slices of {size} x {size}, batches of {batch} + {batch}")
    print(f"{'':44}{'first batch':>12}{'slices/s':>10}{'ratio':>7}  memory")
    for title, first, rate, memory in results:
        print(f"{title:44}{first:10.2f} s{rate:10.0f}{rate / results[0][2]:7.2f}  {memory}")

    image, label = torch.randn(16, 1, options.size, options.size), torch.zeros(16, options.size, options.size).byte()
    affine = AugmentConfig(rotation_deg=15, scale=(0.85, 1.15), translation=0.1)
    for title, config in (("affine", affine), ("intensity mapping", AugmentConfig(random_conv_probability=1))):
        begin = time.perf_counter()
        for step in range(10):
            augment(image, label, sample_keys(0, "source", 16 * step, 16 * step + 16), config)
        print(f"augmentation, {title:30}{160 / (time.perf_counter() - begin):22.0f}")


if __name__ == "__main__":
    main()
