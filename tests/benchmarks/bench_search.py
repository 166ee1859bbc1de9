"""What early stopping saves on the phantom, and what it and label-free criteria cost in Dice.

``python tests/benchmarks/bench_search.py [--seeds 1 2] [--storage FOLDER]`` searches the default space with every trial
trained in full, then with ASHA from the same shared beginning. For each seed it prints the iterations of both, the
final target validation Dice of ASHA's pick among the same trials in full, and the time between two trainings on the
same CPU. Then how each label-free criterion orders the trials in full. Searches that are finished are not run again.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpscl_ray.tune.agreement import agreement
from mpscl_ray.tune.criteria import CRITERIA, ORACLE, score
from mpscl_ray.tune.ledger import Ledger, Trial
from mpscl_ray.tune.results import best_trial

_MOMENT = re.compile(r"^(\S+ \S+) pid \d+ \w+ (training starts|worker ends)", re.MULTILINE)


def search(name: str, storage: Path, *words: str) -> None:
    """Run one search as a user does."""
    command = [sys.executable, "-m", "mpscl_ray.tune", "phantom", f"run.storage={storage}", f"run.name={name}", *words]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": sys.path[0]})


def trials_of(folder: Path) -> list[Trial]:
    """Trials of a search by their numbers."""
    return [trial for _, trial in sorted(Ledger(folder / "ledger.jsonl").trials.items())]


def idle_seconds(folder: Path) -> list[float]:
    """Seconds between the end of a training and the start of the next one on the same place.

    Worker slots are told apart by taking, for each training, the one that has been free for the shortest time.
    """
    spans = []
    for log in folder.glob("trials/*/logs/worker-0.log"):
        moments = [
            datetime.datetime.strptime(time, "%Y-%m-%d %H:%M:%S,%f").timestamp()
            for time, _ in _MOMENT.findall(log.read_text(encoding="utf-8"))
        ]
        spans += list(zip(moments[::2], moments[1::2], strict=False))
    idle, free = [], []
    for start, end in sorted(spans):
        before = [moment for moment in free if moment <= start]
        if before:
            free.remove(max(before))
            idle.append(start - max(before))
        free.append(end)
    return idle


def main() -> None:
    """Search, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--storage", type=Path, default=Path("runs"))
    options = parser.parse_args()
    everything: list[Trial] = []
    print("seed  in full  ASHA  share  best Dice  Dice of ASHA's pick  short by  idle s between trials, median (most)")
    for seed in options.seeds:
        full, asha = options.storage / f"full-{seed}", options.storage / f"asha-{seed}"
        seeds = (f"run.seed={seed}", f"search.seed={seed}")
        search(full.name, options.storage, "search.scheduler=fifo", *seeds)
        search(asha.name, options.storage, "--warm-up", str(full / "shared"), *seeds)
        complete, stopped = trials_of(full), trials_of(asha)
        assert [trial.settings for trial in complete] == [trial.settings for trial in stopped]
        everything += [trial for trial in complete if trial.state == "finished"]
        best, pick = best_trial(complete, ORACLE), best_trial(stopped, ORACLE)
        assert best is not None
        assert pick is not None
        in_full, taken = (sum(trial.iteration for trial in trials) for trials in (complete, stopped))
        highest, found = score(best.last, ORACLE), score(complete[pick.number - 1].last, ORACLE)
        idle = idle_seconds(asha)
        print(
            f"{seed:4d} {in_full:8d} {taken:5d} {taken / in_full:6.0%} {highest:10.4f} {found:20.4f} "
            f"{highest - found:9.4f}  {statistics.median(idle):.1f} ({max(idle):.1f})"
        )
    print("\ncriterion                 trials  rank correlation  Dice lost by its pick")
    for name in CRITERIA:
        if name != ORACLE:
            value = agreement([trial.last for trial in everything], name)
            assert value is not None
            print(f"{name:24s} {value.trials:7d} {value.correlation:17.2f} {value.regret:22.4f}")


if __name__ == "__main__":
    main()
