"""Scores of one checkpoint (the evaluate command), or of the end of each phase of a run, and their tables."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mpscl_ray.distributed.places import TaskPlace, inference_place
from mpscl_ray.distributed.ray_session import connect
from mpscl_ray.evaluate.evaluation import PROTOCOLS, Evaluation, write_rows
from mpscl_ray.evaluate.scoring import evaluate_checkpoint, find_dataset
from mpscl_ray.evaluate.tables import default_measures
from mpscl_ray.predict.model import read_model
from mpscl_ray.predict.predictor import choose_device
from mpscl_ray.runs import json_output
from mpscl_ray.runs.model_store import open_model
from mpscl_ray.runs.run_directory import RunDirectory, open_run
from mpscl_ray.runs.storage import join_location
from mpscl_ray.runs.wording import counted

PHASES_TABLE, PHASES_JSON = "phases.txt", "phases.json"
"""Files in a run's results with a row for each phase, as in ``phases.md`` and ``.csv``."""


def evaluate_phases(
    run: RunDirectory | Path | str,
    phases: Sequence[str],
    *,
    device: str | None = None,
    workers: int | None = None,
    progress: bool = True,
    place: TaskPlace | None = None,
) -> dict[str, Evaluation]:
    """Evaluate the end of each phase on the target and write ``results/phases.{txt,md,csv,json}``, a row per phase.

    The volumes are those of the test split; if none of them is labelled, those of the validation split, and the table
    says so.

    Args:
        run: folder, or URL, of a run whose phases are finished.
        phases: their names, in order.
        device: see :func:`~mpscl_ray.evaluate.scoring.evaluate_checkpoint`.
        workers: see :func:`~mpscl_ray.evaluate.scoring.evaluate_checkpoint`.
        progress: whether to show progress lines.
        place: see :func:`~mpscl_ray.evaluate.scoring.evaluate_checkpoint`.

    Returns:
        Phase -> evaluation; empty, and nothing is written, if no volume of the target is labelled.

    Raises:
        As :func:`evaluate_checkpoint`.
    """
    home = open_run(run)
    folder, manifest, _ = find_dataset(home.display_path, read_model(home), None)
    split = next((name for name in ("test", "val") if any(case.labelled for case in manifest.split(name))), None)
    if split is None:
        return {}
    how: dict[str, Any] = {"device": device, "workers": workers, "progress": progress, "place": place}
    done = {phase: evaluate_checkpoint(home, phase, split=split, **how) for phase in phases}
    rows = {evaluation.row_label: evaluation.summary for evaluation in done.values()}
    volumes = next(iter(rows.values())).volumes
    kind = "test" if split == "test" else "validation"
    heading = f"{counted(volumes, f'labelled {kind} volume')} of {manifest.modality}"
    if split == "val":
        heading += " (no test volume is labelled)"
    protocol = next(iter(done.values())).protocol
    heading += f"; scored: {PROTOCOLS[protocol]}"
    about = {"split": split, "dataset": str(folder), "protocol": protocol}
    write_rows(home.results, "phases", heading, rows, about)
    home.store.upload(home.results)
    return done


def evaluate(options: argparse.Namespace) -> int:
    """Evaluate one checkpoint and print its table; returns the exit code."""
    if options.ray is None:
        choose_device(options.device)
    home = open_model(options.run)
    with connect(address=options.ray) if options.ray else nullcontext():
        evaluation = evaluate_checkpoint(
            home,
            options.checkpoint,
            data=options.data,
            split=options.split,
            out=options.out,
            device=options.device,
            workers=options.workers,
            largest_component=options.largest_component,
            protocol=options.protocol,
            place=inference_place(options.device) if options.ray else None,
        )
    measures = (*default_measures([evaluation.summary]), *(["asd_voxel"] if evaluation.protocol != "file" else []))
    print(f"{evaluation.modality}, {counted(len(evaluation.scores), 'volume')} of the split {evaluation.split}")
    if evaluation.protocol != "released":
        print(f"scored: {PROTOCOLS[evaluation.protocol]}")
    print()
    print(evaluation.table(measures=list(dict.fromkeys(measures))))
    for notice in evaluation.notices:
        print(f"note: {notice}")
    folder = options.out or join_location(home.display_path, "results", evaluation.name)
    print(f"\nwritten to {folder}")
    json_output.report(folder=folder, **evaluation.to_json())
    return 0
