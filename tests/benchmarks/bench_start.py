"""CPU seconds and processes of the train command before its first step, by kind of process.

    python tests/benchmarks/bench_start.py phantom scaling.num_workers=1

takes the words of the train command, run.storage among them. The datasets should be there before, phantom hearts too.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

MARK = "MPSCL_RAY_BENCH"
TICKS = os.sysconf("SC_CLK_TCK")
KINDS = {
    "mpscl_ray.train": "command",
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


def usage(mark: str) -> tuple[Counter[str], Counter[str]]:
    """CPU seconds, those of ended children included, and numbers of the processes with this mark."""
    seconds, numbers = Counter[str](), Counter[str]()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() not in (folder / "environ").read_bytes():
                continue
            name = kind((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            fields = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        seconds[name] += sum(map(int, fields[11:15])) / TICKS
        numbers[name] += 1
    return seconds, numbers


def main() -> None:
    mark = secrets.token_hex(8)
    given = [word.removeprefix("run.storage=") for word in sys.argv[1:] if word.startswith("run.storage=")]
    folder = Path(given[-1] if given else "runs") / f"bench-{mark}"
    words = [sys.executable, "-m", "mpscl_ray.train", *sys.argv[1:], f"run.name={folder.name}", "run.log_every=1"]
    process = subprocess.Popen(words, env=os.environ | {MARK: mark}, stdout=subprocess.DEVNULL)
    while not (folder / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    seconds, numbers = usage(mark)
    process.send_signal(signal.SIGTERM)
    process.wait()
    shutil.rmtree(folder)
    for name, amount in seconds.most_common():
        print(f"{amount:6.1f} s  {numbers[name]:2d}  {name}")
    print(f"{seconds.total():6.1f} s  {numbers.total():2d}  all")


if __name__ == "__main__":
    main()
