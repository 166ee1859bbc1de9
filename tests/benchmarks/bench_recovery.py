"""What dies, and how long it takes to the next step: real processes of a cluster on this machine, killed with SIGKILL.

``python tests/benchmarks/bench_recovery.py [--repeats 5] [--kinds worker spare node shrink driver head]`` starts a
cluster by ``cluster/local/cluster.sh``, trains a small network without end as a job with two workers, and kills in turn

- worker: the process of one of the two workers;
- spare: all processes of a node that has one of the workers, where a third node has room for it;
- node: the same where no other node has room, and the node is started again at once;
- shrink: the same with scaling.num_workers=[1,2]: one worker continues; the node then comes back, and the run grows;
- driver: the process of the job, ``python -m mpscl_ray.train``; the same job is then submitted again;
- head: all processes of the head, which has the driver too; the cluster is then started again, and the job submitted.

Measured is the time from the kill to the first step after it, with all that has to be done by hand done at once by this
script, and the steps that have to be done again. Checkpoints are written every 20 steps.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpscl_ray.runs.run_directory import RunDirectory
from tests.local_cluster import LocalCluster, wait_until
from tests.tiny import SETTINGS, make_pair

EVERY = 20
"""Steps between checkpoints."""

NODES = {"worker": 2, "spare": 3, "node": 2, "shrink": 2, "driver": 2, "head": 2}


class Job:
    """A training without end, and the jobs it has been."""

    def __init__(self, cluster: LocalCluster, folder: Path, workers: str) -> None:
        self.cluster, self.submitted = cluster, 0
        data = make_pair(folder)
        settings = [
            *SETTINGS,
            f"data.source={data / 'mr'}",
            f"data.target={data / 'ct'}",
            f"run.storage={folder}",
            "run.name=run",
            "run.max_failures=100",
            "run.log_every=1",
            "run.validate_every=1000000",
            f"run.checkpoint_every={EVERY}",
            "phases.source_only=1000000",
            f"scaling.num_workers={workers}",
            "scaling.resource_timeout_s=600",
        ]
        self.command = ["python", "-m", "mpscl_ray.train", "small/mpscl", *settings]
        self.run = RunDirectory(folder / "run")

    def submit(self) -> None:
        """Submit it, for the first time or again."""
        self.submitted += 1
        done = self.cluster.submit(f"job-{self.submitted}", *self.command, wait=False)
        assert done.returncode == 0, done.stdout

    @property
    def starts(self) -> list[int]:
        """Steps at which workers have started."""
        log = self.run.logs / "worker-0.log"
        return (
            [int(step) for step in re.findall(r"training starts at step (\d+)", log.read_text(encoding="utf-8"))]
            if log.exists()
            else []
        )

    @property
    def step(self) -> int:
        """The last one."""
        return max((record["global_step"] for record in self.run.read_metrics()), default=0)

    def next_step(self, start: int) -> tuple[float, int]:
        """When the first step after the ``start``-th start of workers was seen, and the step of that start."""

        def stepped() -> bool:
            starts = self.starts
            return len(starts) >= start and self.step > starts[start - 1]

        wait_until(stepped, "the next step")
        return time.monotonic(), self.starts[start - 1]

    def worker(self) -> tuple[int, int]:
        """Process of a worker that is not on the head, or of any if all are there, and its node."""
        found = []
        for rank in (0, 1):
            log = (self.run.logs / f"worker-{rank}.log").read_text(encoding="utf-8")
            pid = int(re.findall(r"pid (\d+) INFO worker starts", log)[-1])
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            mark = next(word for word in environment if word.startswith(b"MPSCL_CLUSTER_NODE="))
            found.append((pid, int(mark.rpartition(b"/")[2])))
        return max(found, key=lambda entry: entry[1])


def kill(kind: str, job: Job) -> tuple[float, int]:
    """Kill, do what has to be done by hand, and say when it was killed, and at which step."""
    cluster = job.cluster
    pid, node = job.worker()
    if kind == "driver":
        (pid,) = [
            int(process.name)
            for process in Path("/proc").iterdir()
            if process.name.isdecimal() and str(job.run.path.parent) in command_line(process)
        ]
    killed = time.monotonic()
    if kind in ("worker", "driver"):
        os.kill(pid, signal.SIGKILL)
    else:
        cluster.script("kill", str(0 if kind == "head" else node))
    reached = job.step
    if kind == "node":
        cluster.script("start", str(node))
    if kind == "head":
        cluster.script("down")
        cluster.script("up", str(cluster.nodes))
    if kind in ("driver", "head"):
        job.submit()
    return killed, reached


def command_line(process: Path) -> str:
    """Arguments of a process, if it is the Python of a train command."""
    try:
        words = (process / "cmdline").read_text(encoding="utf-8").split("\0")
    except OSError:
        return ""
    return " ".join(words) if Path(words[0]).name.startswith("python") else ""


def measure(kind: str, repeats: int) -> list[tuple[float, int]]:
    """Seconds to the next step and steps done again, each time."""
    found = []
    with tempfile.TemporaryDirectory() as folder, LocalCluster(NODES[kind], cpus=1) as cluster:
        job = Job(cluster, Path(folder), "[1,2]" if kind == "shrink" else "2")
        job.submit()
        for number in range(1, repeats + 1):
            wait_until(lambda: job.starts, "training")
            begun = len(job.starts)
            wait_until(lambda: job.step >= job.starts[-1] + EVERY + EVERY // 2, "a checkpoint")
            killed, reached = kill(kind, job)
            at, start = job.next_step(begun + 1)
            assert reached - start <= EVERY, "at most one checkpoint interval is done again"
            found.append((at - killed, reached - start))
            print(f"{kind} {number}: {at - killed:.1f} s, {reached - start} steps again", flush=True)
            if kind in ("spare", "shrink"):
                lost = next(node for node in range(1, NODES[kind]) if not cluster.processes(node))
                cluster.script("start", str(lost))
            if kind == "shrink":
                job.next_step(begun + 2)
    return found


def main() -> None:
    """Kill in all ways, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=NODES, default=list(NODES))
    options = parser.parse_args()
    rows = {kind: measure(kind, options.repeats) for kind in options.kinds}
    print("what is killed   median s   min s   max s   most steps again")
    for kind, measured in rows.items():
        seconds = [s for s, _ in measured]
        print(
            f"{kind:14s} {statistics.median(seconds):10.1f} {min(seconds):7.1f} {max(seconds):7.1f} "
            f"{max(steps for _, steps in measured):18d}"
        )


if __name__ == "__main__":
    main()
