"""Read many changed files of a kind, with little memory, and report every error that is not the product's own.

    python -m tests.trust.fuzz nifti --runs 100000 --engine atheris

Engines: ``atheris`` is guided by the coverage of the product's code (``pip install atheris``); ``mutations`` changes
good files at random and needs nothing. Prints a line of JSON; exits with 1 where an input was not read or refused.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

HEADROOM = 256 << 20
"""Bytes of memory that an input may take, over what the process has when it starts; more is a MemoryError."""
SLOW_S = 5.0
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**62, 2**64 - 1)


def mutated(seeds: list[bytes], numbers: random.Random) -> bytes:
    """One of the seeds with a few changes."""
    data = bytearray(numbers.choice(seeds))
    for _ in range(numbers.choice((1, 1, 2, 3, 5, 8))):
        at = numbers.randrange(len(data) + 1)
        action = numbers.randrange(7)
        if action == 0 and data:
            data[at % len(data)] ^= 1 << numbers.randrange(8)
        elif action == 1 and data:
            data[at % len(data)] = numbers.randrange(256)
        elif action == 2:
            width, order = numbers.choice("BHIQ"), numbers.choice("<>")
            number = numbers.choice(NUMBERS) & ((1 << 8 * struct.calcsize(width)) - 1)
            piece = struct.pack(order + width, number)
            data[at : at + len(piece)] = piece
        elif action == 3:
            del data[at : at + numbers.randrange(1, 32)]
        elif action == 4:
            data[at:at] = data[at : at + numbers.randrange(1, 64)]
        elif action == 5:
            other = numbers.choice(seeds)
            start = numbers.randrange(len(other))
            piece = other[start : start + numbers.randrange(1, 64)]
            data[at : at + len(piece)] = piece
        else:
            data[at:at] = numbers.choice((b"[" * 200, b"9" * 400, b"\0" * 8, b"\xff" * 8, b'"', b"{", b"-", b"&a *a "))
    return bytes(data)


class Judge:
    """Reads one input after the other and counts what came of it."""

    def __init__(self, name: str, folder: Path) -> None:
        from mpscl_ray.errors import MpsclError
        from tests.trust.inputs import KINDS

        self.name, self.folder, self.kind, self.refusal = name, folder / name, KINDS[name], MpsclError
        seeds = folder / f"{name}-seeds"
        for path in (self.folder, seeds):
            path.mkdir(parents=True)
        self.seeds = self.kind.seeds(seeds)
        self.read = self.refused = self.slow = 0
        self.crashes: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, tuple[str, bytes]] = {}
        for seed in self.seeds:  # what is loaded once takes its memory before it is limited
            self.judge(seed)
        assert self.read, f"no good file of the kind {name}: {self.report()}"
        self.read = self.refused = 0
        self.peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @property
    def count(self) -> int:
        return self.read + self.refused + sum(self.crashes.values())

    def judge(self, data: bytes) -> None:
        start = time.monotonic()
        try:
            self.kind.read(self.folder, data)
            self.read += 1
        except self.refusal as error:
            self.refused += 1
            if "\n" in str(error).strip() and self.name != "yaml":
                self._crash("a message of several lines", data)
        except Exception as error:  # noqa: BLE001 any other error is what is looked for
            last = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in last if "mpscl_ray/" in frame.filename] or list(last)
            self._crash(f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}", data, str(error))
        self.slow += time.monotonic() - start > SLOW_S
        if self.count % 10_000 == 0:
            print(json.dumps(self.report()), file=sys.stderr, flush=True)

    def _crash(self, what: str, data: bytes, detail: str = "") -> None:
        self.crashes[what] += 1
        self.examples.setdefault(what, (detail[:200], data))

    def report(self) -> dict[str, object]:
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - getattr(self, "peak_kb", 0)
        counts = {"inputs": self.count, "read": self.read, "refused": self.refused, "slow": self.slow}
        return {"kind": self.name, **counts, "grown_mb": grown >> 10, "crashes": dict(self.crashes)}


def limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, resource.getrlimit(resource.RLIMIT_AS)[1]))


def guided(judge: Judge, runs: int, seed: int, corpus: Path) -> None:
    """Let atheris choose the inputs. Ends the process, as its library does."""
    import atheris

    corpus.mkdir()
    for number, data in enumerate(judge.seeds):
        (corpus / f"seed-{number}").write_bytes(data)

    def one(data: bytes) -> None:
        judge.judge(data)
        if judge.count >= runs:
            code = finish(judge)
            shutil.rmtree(judge.folder.parent, ignore_errors=True)
            os._exit(code)

    atheris.Setup([sys.argv[0], str(corpus), f"-seed={seed}", "-max_len=16384", "-verbosity=0", "-timeout=60"], one)
    limit_memory()
    atheris.Fuzz()


def finish(judge: Judge) -> int:
    print(json.dumps(judge.report()), flush=True)
    for number, (what, (detail, data)) in enumerate(judge.examples.items()):
        file = Path(tempfile.gettempdir()) / f"mpscl-crash-{judge.name}-{number}"
        file.write_bytes(data)
        print(f"{what}: {detail} ({file})", file=sys.stderr, flush=True)
    return 1 if judge.crashes or judge.slow else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.trust.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="+", help="kinds of tests/trust/inputs.py, such as nifti")
    parser.add_argument("--runs", type=int, default=1000, help="inputs of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=("mutations", "atheris"), default="mutations")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    if "itk" in options.kinds:
        import SimpleITK

        SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as temporary:
        folder = Path(temporary)
        if options.engine == "atheris":
            import atheris

            (name,) = options.kinds
            with atheris.instrument_imports(include=["mpscl_ray"]):
                import tests.trust.inputs  # noqa: F401 with all of the product that it reads files with
            guided(Judge(name, folder), options.runs, options.seed, folder / "corpus")
        judges = [Judge(name, folder) for name in options.kinds]
        limit_memory()
        for judge in judges:
            numbers = random.Random(options.seed)
            while judge.count < options.runs:
                judge.judge(mutated(judge.seeds, numbers))
        return max([finish(judge) for judge in judges])


if __name__ == "__main__":
    sys.exit(main())
