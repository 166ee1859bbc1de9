"""What a bucket costs a run: the same training on a local disk and in a bucket of a server on this machine.

``python tests/benchmarks/bench_storage.py [--repeats 3] [--iterations 400]`` trains in turn here and there, each time
on its own Ray, and prints the time from the first to the last step, saves included, as a ratio, and the time of
the whole commands. The server (moto) works in the same processor, so the ratio is a bound, not a forecast.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpscl_ray.runs.run_directory import open_run
from mpscl_ray.runs.storage import join_location
from tests.s3 import serve, upload_folder
from tests.tiny import SETTINGS, make_pair


def seconds(storage: str, name: str, settings: list[str]) -> tuple[float, float]:
    """Seconds from the first to the last step, and of the whole command."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "mpscl_ray.train", "small/mpscl", *settings]
    done = subprocess.run([*command, f"run.storage={storage}", f"run.name={name}"], capture_output=True, text=True)
    whole = time.perf_counter() - begin
    assert done.returncode == 0, done.stdout + done.stderr
    run = open_run(join_location(storage, name))
    run.require()
    log = (run.logs / "worker-0.log").read_text(encoding="utf-8")
    stamp = r"^(\S+ \S+?),(\d+) .*"
    times = [
        datetime.fromisoformat(match[1]).timestamp() + int(match[2]) / 1000
        for word in ("training starts at", "worker ends")
        for match in [re.search(stamp + word, log, re.MULTILINE)]
        if match
    ]
    return times[1] - times[0], whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--checkpoint-every", type=int, default=50)
    parser.add_argument("--width", type=int, default=16, help="of the segmenter, which sets the size of a checkpoint")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, serve(Path(temporary)) as server:
        folder = Path(temporary)
        upload_folder(make_pair(folder / "data"), server.folder("data"))
        settings = [
            *SETTINGS,
            *(f"phases.{phase}={options.iterations}" for phase in ("source_only", "warm_up", "adaptation")),
            f"run.checkpoint_every={options.checkpoint_every}",
            f"run.validate_every={options.iterations}",
            f"network.base_channels={options.width}",
        ]
        places = {
            "disk": (str(folder), [f"data.source={folder}/data/mr", f"data.target={folder}/data/ct"]),
            "bucket": (
                server.url("runs"),
                [f"data.source={server.url('data/mr')}", f"data.target={server.url('data/ct')}"],
            ),
        }
        found: dict[str, list[tuple[float, float]]] = {place: [] for place in places}
        for repeat in range(options.repeats):
            for place, (storage, data) in places.items():
                found[place].append(seconds(storage, f"{place}-{repeat}", [*settings, *data]))
        size = sum(file.stat().st_size for file in sorted((folder / "disk-0" / "checkpoints").iterdir())[-1].iterdir())
    medians = {
        place: [statistics.median(column) for column in zip(*rows, strict=True)] for place, rows in found.items()
    }
    ratios = [bucket / disk for bucket, disk in zip(medians["bucket"], medians["disk"], strict=True)]
    print(json.dumps({place: [[round(value, 1) for value in row] for row in rows] for place, rows in found.items()}))
    print(f"checkpoint of {size / 1e6:.1f} MB every {options.checkpoint_every} of {3 * options.iterations} steps")
    print(f"bucket / disk: training {ratios[0]:.2f}, command {ratios[1]:.2f}")


if __name__ == "__main__":
    main()
