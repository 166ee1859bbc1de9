"""What Ray costs a training step: the same loop with and without it, on one worker and on two.

``python tests/benchmarks/bench_training.py [--rounds 3] [--steps 60]`` trains the small preset on slices of 64 x 64, in
turn in one process, in Ray with one worker, in two gloo processes, and in Ray with two workers, so that a change of the
machine's load meets all of them. Step times and shares of waiting for data are read from metrics.jsonl, from the
adaptation phase alone and without its first record. Printed are medians over all records, and the ratio of the best
rounds, which other users of the machine disturb least.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from mpscl_ray.config import Config, load_config
from mpscl_ray.distributed.ray_session import connect
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train import loop
from mpscl_ray.train.domains import load_domains, open_data
from mpscl_ray.train.ray import launch, resources
from tests.tiny import local_data, make_dataset
from tests.worker_processes import on_workers

WARM = 10
"""Steps of the phases before the measured one, and between two readings."""


def on_ray(config: Config, run: Path) -> None:
    """Train as the command does, on a Ray that runs."""
    folder = RunDirectory(run)
    folder.create()
    use_gpu = resources.check_cluster(config)
    domains, _ = load_domains(config)
    launched = launch.Launch(config, folder, open_data(config, domains), use_gpu)
    launched.start()
    assert launched.wait(lambda: None).state == "finished"


def without_ray(config: Config, run: Path) -> None:
    """Train as one worker of those there are."""
    folder = RunDirectory(run)
    folder.create()
    assert loop.train(config, local_data(config), folder, torch.device("cpu")).state == "finished"


def steps(run: Path, batch: int) -> list[tuple[float, float]]:
    """Milliseconds and share of waiting of each reading of the adaptation phase but the first."""
    records = [record for record in RunDirectory(run).read_metrics() if record["phase"] == "adaptation"][1:]
    return [(2e3 * batch / r["perf/images_per_s"], r["perf/data_stall_fraction"]) for r in records]


def main() -> None:
    """Train in all ways, in turn, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="measured steps of a training")
    options = parser.parse_args()
    measured: dict[str, list[list[tuple[float, float]]]] = {}
    with tempfile.TemporaryDirectory() as folder, connect(2, object_store_memory=200 * 2**20):
        base = Path(folder)
        for seed, modality in enumerate(("mr", "ct")):
            cases = {"train": 12, "val": 1}
            make_dataset(base / modality, modality, seed=seed, slices=40, cases=cases, size=(64, 64))
        for number in range(options.rounds):
            for workers in (1, 2):
                config = load_config(
                    "small/mpscl",
                    [
                        f"data.source={base / 'mr'}",
                        f"data.target={base / 'ct'}",
                        f"phases.source_only={WARM}",
                        f"phases.warm_up={WARM}",
                        f"phases.adaptation={options.steps + WARM}",
                        f"run.log_every={WARM}",
                        "run.validate_every=1000000",
                        "run.checkpoint_every=1000000",
                        f"scaling.num_workers={workers}",
                    ],
                )
                for way in ("alone", "Ray"):
                    run = base / f"{way}-{workers}-{number}"
                    if way == "Ray":
                        on_ray(config, run)
                    else:
                        on_workers(workers, without_ray, config, run)
                    measured.setdefault(f"{way} {workers}", []).append(steps(run, config.data.global_batch_size))
    print("workers   ms/step alone   ms/step Ray   ratio of medians   of best rounds   waiting alone   waiting Ray")
    for workers in (1, 2):
        alone, ray = measured[f"alone {workers}"], measured[f"Ray {workers}"]
        median, best, waiting = [], [], []
        for rounds in (alone, ray):
            median.append(statistics.median(ms for part in rounds for ms, _ in part))
            best.append(min(statistics.median(ms for ms, _ in part) for part in rounds))
            waiting.append(statistics.median(share for part in rounds for _, share in part))
        print(
            f"{workers:7d} {median[0]:15.1f} {median[1]:13.1f} {median[1] / median[0]:18.3f} {best[1] / best[0]:16.3f} "
            f"{waiting[0]:15.2%} {waiting[1]:13.2%}"
        )


if __name__ == "__main__":
    main()
