"""CPU seconds and processes before the first step of a training and of a trial, by kind of process.

    python tests/benchmarks/bench_start.py

Both have one worker and tiny datasets, and start a Ray of their own. The trial is one of a search that shares no phase.
Seconds of CPU are what a start costs, however busy the machine is; seconds of the clock are printed beside them.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.tiny import SETTINGS, make_pair

TICKS = os.sysconf("SC_CLK_TCK")
KINDS = {
    r"mpscl_ray\.(train|tune)": "command",
    "gcs_server": "gcs_server",
    "raylet/raylet": "raylet",
    "monitor.py": "monitors of autoscaler and logs",
    "dashboard.py": "dashboard",
    "Agent|agent": "agents of dashboard and environments",
    r"ray::(\w+)": "",
}
"""Patterns of command lines, and what is printed; nothing: the group."""


def kind(command_line: str) -> str:
    for pattern, name in KINDS.items():
        if found := re.search(pattern, command_line):
            return name or found.group(1)
    return "others"


def descendants(command: int) -> set[int]:
    """A process and all that it has started, directly or not."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended meanwhile
            parents[int(folder.name)] = int((folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    ours, before = {command}, 0
    while len(ours) > before:
        before = len(ours)
        ours |= {number for number, parent in parents.items() if parent in ours}
    return ours


def usage(command: int) -> tuple[Counter[str], Counter[str]]:
    """CPU seconds, those of ended children included, and numbers of a process and all that it has started."""
    seconds, numbers = Counter[str](), Counter[str]()
    for number in descendants(command):
        with suppress(OSError):
            folder = Path("/proc") / str(number)
            name = kind((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            fields = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            seconds[name] += sum(map(int, fields[11:15])) / TICKS
            numbers[name] += 1
    return seconds, numbers


def measure(words: list[str], first: Path) -> None:
    """Start a command, print what has been used when its first record of metrics is there, and stop it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", *words], env=environment, stdout=subprocess.DEVNULL)
    while not first.exists() and process.poll() is None:
        time.sleep(0.05)
    elapsed = time.monotonic() - begin
    assert first.exists(), f"{words[0]} ended with {process.returncode} before its first step"
    seconds, numbers = usage(process.pid)
    process.send_signal(signal.SIGTERM)
    process.wait()
    print(f"{words[0]}, {elapsed:.0f} s by the clock")
    for name, amount in seconds.most_common():
        print(f"{amount:6.1f} s  {numbers[name]:2d}  {name}")
    print(f"{seconds.total():6.1f} s  {numbers.total():2d}  all", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        data, runs = make_pair(Path(folder)), Path(folder) / "runs"
        places = [f"data.source={data / 'mr'}", f"data.target={data / 'ct'}", f"run.storage={runs}", "run.name=start"]
        words = [*SETTINGS, *places, "phases.source_only=1000000", "run.log_every=1", "scaling.num_workers=1"]
        measure(["mpscl_ray.train", "small/mpscl", *words], runs / "start" / "metrics.jsonl")
        space = Path(folder) / "space.yaml"
        space.write_text("preset: small/mpscl\nspace: {optim.lr: {choice: [0.01]}}\n", encoding="utf-8")
        more = ["run.name=search", "search.method=grid", "search.evaluate=none"]
        measure(["mpscl_ray.tune", str(space), *words, *more], runs / "search" / "trials" / "001" / "metrics.jsonl")


if __name__ == "__main__":
    main()
