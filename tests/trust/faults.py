"""Inject each kind of fault several times, by the tests that do it, and count how often the outcome was the right one.

    python -m tests.trust.faults --repeats 5
    python -m tests.trust.faults "disk full" "storage slow" --repeats 5

A repeat is a process of pytest of its own. Prints a row of the table in docs/trust.md for each kind: how often it was
tried, how often all its tests ran and passed, and the seconds of the longest. Exits with 1 if a repeat failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_WRITING = "tests/unit/runs/test_checkpoint_writing.py::"
_STORAGE = "tests/unit/runs/test_storage.py::"
_LOOP = "tests/unit/train/test_loop.py::"
_LAUNCH = "tests/unit/train/test_launch.py::"
_INTERRUPTED = "tests/cluster/test_interrupted_training.py::"
_LOST_WORKERS = "tests/ray/test_train.py::test_a_run_that_loses_workers_and_is_stopped_ends_as_if_it_had_not"
_LOST_NODE = "tests/cluster/test_elastic.py::test_a_lost_node_shrinks_the_run_and_a_new_one_grows_it"

KINDS: dict[str, tuple[str, ...]] = {
    "worker SIGKILL": (_LOST_WORKERS,),
    "worker SIGTERM": (_LOST_WORKERS,),
    "worker raises": (
        f"{_LAUNCH}test_workers_that_fail_too_often_end_the_run_with_their_causes",
        f"{_LAUNCH}test_the_error_of_a_worker_is_raised_with_its_own_type",
    ),
    "GPU out of memory": (f"{_LOOP}test_a_step_that_does_not_fit_into_memory_says_what_to_change",),
    "raylet killed": (_LOST_NODE,),
    "node lost": (_LOST_NODE,),
    "head lost": ("tests/benchmarks/bench_recovery.py",),
    "command killed": (f"{_INTERRUPTED}test_a_run_that_is_stopped_and_killed_resumes_each_time_to_its_end",),
    "Ctrl-C": (
        "tests/unit/runs/test_signals.py::test_first_signal_lets_the_loop_finish",
        "tests/unit/runs/test_signals.py::test_second_signal_ends_the_process_at_once",
    ),
    "storage cannot be written": (
        f"{_WRITING}test_folder_that_cannot_be_written",
        f"{_STORAGE}test_an_outage_longer_than_patience_is_an_error",
        "tests/unit/train/test_checkpointing.py::test_a_checkpoint_that_cannot_be_written_ends_the_training",
    ),
    "disk full": (
        f"{_WRITING}test_full_disk_is_refused_before_writing",
        f"{_WRITING}test_disk_that_fills_while_writing",
        "tests/unit/runs/test_run_directory.py::test_metrics_on_a_full_disk_keep_what_was_written",
    ),
    "storage slow": (
        "tests/unit/train/test_checkpointing.py::test_what_is_written_is_the_moment_of_saving",
        f"{_STORAGE}test_after_an_outage_everything_is_uploaded",
    ),
    "network between ranks cut": (f"{_INTERRUPTED}test_a_worker_that_stops_answering_is_named_and_replaced",),
    "newest checkpoint damaged": (
        f"{_LOOP}test_a_damaged_checkpoint_is_skipped_with_a_warning",
        f"{_LOOP}test_a_run_whose_checkpoints_are_all_damaged_does_not_restart",
        "tests/unit/runs/test_checkpoint.py::test_bit_flips_are_all_detected",
    ),
}
"""The tests of each kind. A lost node loses its raylet with everything else; a lost head is a script, not a test."""


def command(kind: str) -> list[str]:
    """What injects a fault once."""
    tests = KINDS[kind]
    if "::" not in tests[0]:
        return [sys.executable, *tests, "--kinds", "head", "--repeats", "1"]
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", *tests]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.trust.faults", description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"all by default: {', '.join(KINDS)}")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    unknown = [kind for kind in options.kinds if kind not in KINDS]
    if unknown:
        parser.error(f"no kind {unknown[0]!r}; there are {', '.join(KINDS)}")
    print("| fault | repeats | passed | longest, s |\n|---|---|---|---|", flush=True)
    failed = 0
    for kind in options.kinds or KINDS:
        seconds, passed = [], 0
        for _ in range(options.repeats):
            started = time.monotonic()
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            done = subprocess.run(command(kind), cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            seconds.append(time.monotonic() - started)
            good = done.returncode == 0 and " skipped" not in done.stdout
            passed += good
            if not good:
                print(done.stdout[-4000:] + done.stderr[-2000:], file=sys.stderr, flush=True)
        failed += options.repeats - passed
        print(f"| {kind} | {options.repeats} | {passed} | {max(seconds):.0f} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
