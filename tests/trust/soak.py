"""Train the phantom for hours with two workers, kill one of its processes every few minutes, and watch what it holds.

    python -m tests.trust.soak EMPTY_FOLDER --hours 2 --every 5 --iterations 9000

In turn a worker is killed (SIGKILL), a worker is stopped (SIGTERM), and so on; every eighth time the command itself is
killed, and started again at once. After the hours nothing is killed, and the training continues to its end. Every ten
seconds the memory (each page shared by n processes counts 1/n), open files and processes are written to
EMPTY_FOLDER/samples.csv; the table at the end compares their medians in the second tenth of the time and in the last.
Exits with 1 if the training did not finish, or a step of its metrics is missing or there twice.
"""

from __future__ import annotations

import argparse
import csv
import re
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from mpscl_ray.runs.run_directory import RunDirectory
from tests.train_command import Command, signal_worker, starts

SAMPLE_S = 10.0
COMMAND_EVERY = 8
"""Kills between two of the command, the second counted."""


@dataclass(frozen=True)
class Sample:
    """What all processes hold at a moment: those of the command, of both workers, and of Ray."""

    seconds: float
    step: int
    processes: int
    command_mib: float
    workers_mib: float
    ray_mib: float
    command_files: int
    workers_files: int
    ray_files: int
    temporary_mib: float
    run_mib: float


class Soak:
    """The training, the commands that it has been, and what was sampled of them."""

    def __init__(self, folder: Path, iterations: int) -> None:
        self.run = RunDirectory(folder / "soak")
        self.arguments = [
            "phantom/mpscl",
            f"run.storage={folder}",
            "run.name=soak",
            "run.max_failures=1000",
            "run.log_every=1",
            f"phases.adaptation={iterations}",
            "scaling.num_workers=2",
        ]
        self.commands = [Command(self.arguments)]
        self.samples: list[Sample] = []
        self.starts_before = 0
        """Starts of the workers when something was last killed."""
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def trains(self) -> bool:
        """Whether workers have started since the last kill, and made a step."""
        begun = starts(self.run)
        return len(begun) > self.starts_before and self.step > begun[-1]

    @property
    def step(self) -> int:
        """The last one."""
        return max((int(record["global_step"]) for record in self.run.read_metrics()), default=0)

    def kill(self, number: int) -> str:
        """Kill for the ``number``-th time; returns what was killed."""
        self.starts_before = len(starts(self.run))
        if number % COMMAND_EVERY == 0:
            self.commands[-1].process.kill()
            self.commands[-1].process.wait()
            self.commands.append(Command(self.arguments))
            return "command"
        kind = signal.SIGKILL if number % 2 else signal.SIGTERM
        signal_worker(self.run, number // 2 % 2, kind)
        return f"worker {number // 2 % 2} by {kind.name}"

    def sample(self) -> Sample:
        """Measure and keep."""
        mib = {"command": 0.0, "workers": 0.0, "ray": 0.0}
        files = dict.fromkeys(mib, 0)
        pids = [pid for command in self.commands for pid in command.processes()]
        for pid in pids:
            role = "command" if pid == self.commands[-1].process.pid else "ray"
            process = Path(f"/proc/{pid}")
            try:
                # Ray writes what a worker runs into its title.
                role = "workers" if b"TrainWorker" in (process / "cmdline").read_bytes() else role
                kib = re.search(r"^Pss: +(\d+) kB", (process / "smaps_rollup").read_text(), re.MULTILINE)
                files[role] += len(list((process / "fd").iterdir()))
                mib[role] += int(kib[1]) / 2**10 if kib else 0
            except OSError:
                continue  # ended meanwhile
        self.samples.append(
            Sample(
                round(self.seconds, 1),
                self.step,
                len(pids),
                *(round(value, 1) for value in mib.values()),
                *files.values(),
                sum(_mib(command.temporary) for command in self.commands),
                _mib(self.run.path),
            )
        )
        return self.samples[-1]


def _mib(folder: Path) -> float:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size
        except OSError:
            continue  # removed meanwhile
    return round(total / 2**20, 1)


def soak(folder: Path, hours: float, every_minutes: float, iterations: int) -> bool:
    """Run it; returns whether it finished with each step of its metrics once."""
    job = Soak(folder, iterations)
    kills: list[str] = []
    due = 60 * every_minutes
    try:
        with (folder / "samples.csv").open("w", newline="", encoding="utf-8") as stream:
            table = csv.DictWriter(stream, list(Sample.__annotations__))
            table.writeheader()
            while job.commands[-1].process.poll() is None:
                table.writerow(asdict(job.sample()))
                stream.flush()
                if due <= job.seconds < 3600 * hours + 60 and job.trains():
                    kills.append(job.kill(len(kills) + 1))
                    print(f"{job.seconds:.0f} s, step {job.samples[-1].step}: killed {kills[-1]}", flush=True)
                    due += 60 * every_minutes
                time.sleep(SAMPLE_S)
        exit_code = job.commands[-1].process.wait()
        print(job.commands[-1].text[-3000:])
        recorded = [record["global_step"] for record in job.run.read_metrics() if "train/non_finite" in record]
        total = max(recorded, default=0)
        once = recorded == list(range(1, total + 1))
        state = job.run.read_status()["state"]
        print(f"{job.seconds:.0f} s, {len(kills)} kills, {len(starts(job.run))} starts of the workers, {total} steps,")
        print(f"exit code {exit_code}, {state}, each step recorded {'once' if once else 'NOT once'}")
        _print_table(job.samples)
        return exit_code == 0 and state == "finished" and once
    finally:
        for command in job.commands:
            command.end()


def _print_table(samples: list[Sample]) -> None:
    """Medians early and late; the first tenth, with the first start, is left out."""
    tenth = max(1, len(samples) // 10)
    print("\n| | early | late | largest |\n|---|---|---|---|")
    for name in list(Sample.__annotations__)[2:]:
        values = [float(getattr(sample, name)) for sample in samples]
        early, late = statistics.median(values[tenth : 2 * tenth]), statistics.median(values[-tenth:])
        print(f"| {name} | {early:.0f} | {late:.0f} | {max(values):.0f} |")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.trust.soak", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="EMPTY_FOLDER")
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--every", type=float, default=5.0, metavar="MINUTES")
    parser.add_argument("--iterations", type=int, default=9000, help="of the last phase")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    if any(options.folder.iterdir()):
        parser.error(f"{options.folder} is not empty")
    return 0 if soak(options.folder.resolve(), options.hours, options.every, options.iterations) else 1


if __name__ == "__main__":
    sys.exit(main())
