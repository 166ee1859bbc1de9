"""Cut trainings of every method at many steps, resume them, and compare with one that was not cut, bit for bit.

    python -m tests.trust.resume --cuts 10
    python -m tests.trust.resume cag sifa_v1 --cuts 4

A name is that of a preset below ``small/``. At each cut one training is stopped, which writes a checkpoint there, and
one is killed before that checkpoint, so that the steps since the last one are lost. Another object resumes it, with
other global random states. Compared are all files of the checkpoints at the ends of the phases (weights, optimisers,
prototypes, random states) and of the best one, the metrics of all steps, and what was recorded of the features. Exits
with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mpscl_ray.config import Config, load_config
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train.feature_log import FeatureRecord
from tests.tiny import STAGES, TINY_SIFA, make_dataset, tiny_config
from tests.tiny_runs import Killed, Killer, RecordingCallback, train

PRESETS = (
    *("source_only", "mpscl", "adabn", "adaoutput", "advent", "clan", "intrada", "cag", "mean_teacher", "sifa_v2"),
    *("sifa_v1", "minent", "source_randomised"),
)
"""One of each method, then some with parts that those have not."""

CHANGES: dict[str, tuple[str, ...]] = {
    **{
        name: tuple(change for change in changes if not change.startswith("phases."))
        for name, changes in STAGES.items()
    },
    "sifa_v2": TINY_SIFA,
    "sifa_v1": (*TINY_SIFA, "method.pool_size=2", "method.dropout=0.25"),
    "minent": ("optim.kind=adamw", "optim.accumulate=2"),
}

RANDOM = (
    "data.augmentation.mapping_probability=0.5",
    "data.augmentation.degradation_probability=0.5",
    "run.log_every=1",
    "run.keep_checkpoints=2",
)


def config_of(data: Path, name: str, steps: int = 12) -> Config:
    """A preset with about so many steps, which its phases share equally; at least two in a round."""
    preset = f"small/{name}"
    phases = load_config(preset).method_phases
    lengths = {phase: steps // len(phases) for phase in phases}
    if name == "cag":
        lengths["adaptation"] = max(6, lengths["adaptation"])
    return tiny_config(
        data / "mr",
        data / "ct",
        [*(f"phases.{phase}={length}" for phase, length in lengths.items()), *RANDOM, *CHANGES.get(name, ())],
        preset,
    )


def cuts_of(config: Config, number: int) -> list[int]:
    """So many global steps: as many ends of phases as half of them allow, and others evenly between."""
    ends = np.cumsum([iterations for _, iterations in config.schedule])
    chosen = ends[: max(1, number // 2)]
    others = np.setdiff1d(np.arange(1, ends[-1] + 1), chosen)
    places = np.linspace(0, len(others) - 1, number - len(chosen) + 2).round().astype(int)[1:-1]
    return sorted({*chosen.tolist(), *others[places].tolist()})


def left_by(run: RunDirectory) -> dict[str, Any]:
    """What has to be the same, by what it is."""
    folders = [*sorted(run.phases.glob("[!.]*")), run.best]
    files = sorted(file for folder in folders if folder.is_dir() for file in folder.iterdir())
    found: dict[str, Any] = {
        str(file.relative_to(run.path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }
    records = [{key: value for key, value in r.items() if not key.startswith("perf/")} for r in run.read_metrics()]
    # As text: NaN is equal to NaN, and every bit of a float counts.
    found["metrics.jsonl"] = [json.dumps(record, sort_keys=True) for record in records]
    found["features"] = [json.dumps(record, sort_keys=True) for record in FeatureRecord(run.path).read()]
    return found


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names of what is not the same, with the first differing line of a table."""
    names = []
    for name in sorted(found.keys() | expected.keys()):
        one, other = found.get(name), expected.get(name)
        if one != other:
            lines = [f": {a} instead of {b}" for a, b in zip(one or (), other or (), strict=False) if a != b]
            names.append(name + (lines[0] if isinstance(one, list) and lines else ""))
    return names


def cut_and_resume(config: Config, folder: Path, cut: int, *, kill: bool) -> tuple[int, RunDirectory]:
    """Train to a step, and go on from there; returns the steps that were done twice, and the run."""
    if kill:
        with suppress(Killed):
            train(config, folder, None, Killer(lambda record: record["global_step"] == cut))
    else:
        train(config, folder, cut)
    watcher = RecordingCallback()
    outcome, run = train(config, folder, None, watcher)
    assert outcome.state == "finished"
    return cut - watcher.starts[0], run


def check(config: Config, folder: Path, stops: Sequence[int], kills: Sequence[int]) -> dict[str, Any]:
    """Cut a training at these steps; a report with what differs, and how many steps each kill has cost."""
    expected = left_by(train(config, folder / "straight")[1])
    lost: list[int] = []
    different: dict[str, list[str]] = {}
    for kill, cuts in ((False, stops), (True, kills)):
        for cut in cuts:
            again, run = cut_and_resume(config, folder / "cut", cut, kill=kill)
            assert kill or again == 0, "a stop loses nothing"
            lost += [again] if kill else []
            found = differences(left_by(run), expected)
            if found:
                different[f"{'killed' if kill else 'stopped'} at {cut}"] = found
            shutil.rmtree(run.path)
    return {"phases": dict(config.schedule), "stops": stops, "kills": kills, "lost": lost, "different": different}


def make_data(folder: Path) -> Path:
    """Source and target; the target has no label."""
    make_dataset(folder / "mr", "mr")
    make_dataset(folder / "ct", "ct", seed=1, labelled=())
    return folder


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.trust.resume", description=__doc__.splitlines()[0])
    parser.add_argument("presets", nargs="*", default=PRESETS, help="names below small/; all methods by default")
    parser.add_argument("--cuts", type=int, default=10, help="stops, and kills, of each")
    parser.add_argument("--steps", type=int, default=12, help="of a training")
    options = parser.parse_args(arguments)
    different = 0
    with tempfile.TemporaryDirectory() as temporary:
        data = make_data(Path(temporary) / "data")
        for name in options.presets:
            config = config_of(data, name, options.steps)
            cuts = cuts_of(config, options.cuts)
            report = check(config, Path(temporary) / name, cuts, cuts)
            different += len(report["different"])
            print(json.dumps({"preset": name, **report}), flush=True)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
