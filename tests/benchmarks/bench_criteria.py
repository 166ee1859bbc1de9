"""How well label-free criteria choose a model: each against target Dice, over all validations of finished runs.

``python tests/benchmarks/bench_criteria.py RUN [RUN ...]`` takes run folders whose target has validation labels, and
every validation in their metrics.jsonl as a candidate, so no checkpoint has to be kept. The labels are used for this
table alone. It prints Spearman's correlation with target Dice, and the Dice that the criterion's pick is short of the
best: over all validations of each direction, over those of adapted models among them, and for the mean and the worst
phase, among whose validations ``run.select`` chooses.

Two rows are of rank means, which need a set of candidates: each candidate's mean rank by class-ratio agreement and by
source Dice less entropy. "online" keeps one set of weights as training would: at each validation the new one replaces
the kept one if its mean rank among the validations so far is higher.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpscl_ray.config import load_config, reads_target
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.tune.agreement import Agreement, agreement
from mpscl_ray.tune.criteria import CRITERIA, ORACLE, score

Record = dict[str, Any]
PARTS = ("class_ratio_agreement", "source_dice_less_entropy")
RANK_MEAN = "rank_mean"


def rank_means(records: Sequence[Record]) -> np.ndarray[Any, Any]:
    """Mean over PARTS of each record's rank, 1 for the lowest; ties share their mean rank."""
    return np.mean([rankdata([score(record, part) for record in records]) for part in PARTS], axis=0)


def kept_online(records: Sequence[Record]) -> int:
    """Number of the record that is kept where each new one is compared with the kept one alone."""
    kept = 0
    for new in range(1, len(records)):
        means = rank_means(records[: new + 1])
        kept = new if means[new] > means[kept] else kept
    return kept


def agreements(records: Sequence[Record]) -> dict[str, Agreement]:
    """Of each criterion, and of the rank mean, over one set of candidates."""
    ranked = [
        record | {f"val/unsupervised/{RANK_MEAN}": value}
        for record, value in zip(records, rank_means(records), strict=True)
    ]
    found = {name: agreement(ranked, name) for name in (*CRITERIA, RANK_MEAN) if name != ORACLE}
    return {name: value for name, value in found.items() if value is not None}


def read_sets(folders: Sequence[Path]) -> tuple[dict[str, list[Record]], dict[str, list[Record]]]:
    """Validations with target Dice by direction, of all phases and of those that read the target; by phase of a run."""
    directions: dict[str, list[Record]] = defaultdict(list)
    phases: dict[str, list[Record]] = defaultdict(list)
    for folder in folders:
        data = load_config(str(folder / "config.yaml")).data
        direction = " to ".join(address.rpartition(":")[2].rpartition("/")[2] for address in (data.source, data.target))
        for record in RunDirectory(folder).read_metrics():
            if math.isfinite(score(record, ORACLE)):
                directions[direction].append(record)
                if reads_target(record["phase"]):
                    directions[f"{direction}, adapted"].append(record)
                phases[f"{folder.name} {record['phase']}"].append(record)
    return dict(sorted(directions.items())), phases


def dice_range(records: Sequence[Record]) -> str:
    """Number of candidates and how far apart they are."""
    dice = [100 * score(record, ORACLE) for record in records]
    return f"{len(records)} validations, target Dice {min(dice):.1f} to {max(dice):.1f} %"


def main() -> None:
    """Print the sets and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, with target Dice in metrics.jsonl")
    directions, phases = read_sets(parser.parse_args().runs)
    for name, records in (*directions.items(), *phases.items()):
        print(f"{name}: {dice_range(records)}")
    pooled = [agreements(records) for records in directions.values()]
    by_phase = [agreements(records) for records in phases.values() if len(records) > 1]
    print("\n| criterion | " + " | ".join([*directions, "phases: mean", "worst phase |"]))
    print("|---|" + "---|" * (len(directions) + 2))
    for name in pooled[0]:
        cells = [f"{found[name].correlation:+.2f}, {100 * found[name].regret:.1f}" for found in pooled]
        correlation = np.nanmean([found[name].correlation for found in by_phase])
        lost = [100 * found[name].regret for found in by_phase]
        print(f"| {name} | " + " | ".join([*cells, f"{correlation:+.2f}, {np.mean(lost):.1f}", f"{max(lost):.1f} |"]))
    lost = []
    for records in phases.values():
        dice = [100 * score(record, ORACLE) for record in records]
        lost.append(max(dice) - dice[kept_online(records)])
    print(f"| {RANK_MEAN}, online |{' |' * len(directions)} {np.mean(lost):.1f} | {max(lost):.1f} |")


if __name__ == "__main__":
    main()
