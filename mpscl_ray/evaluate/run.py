"""Scores of one checkpoint (the evaluate command), or of the end of each phase of a run, and their tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mpscl_ray.distributed.places import TaskPlace, inference_place
from mpscl_ray.distributed.ray_session import connect
from mpscl_ray.errors import DataError
from mpscl_ray.evaluate.calibrate_quality import calibrate_quality
from mpscl_ray.evaluate.choose_postprocessing import choose_postprocessing
from mpscl_ray.evaluate.evaluation import PROTOCOLS, Evaluation, write_rows
from mpscl_ray.evaluate.scoring import evaluate_checkpoint
from mpscl_ray.evaluate.subject import find_dataset, weights_of
from mpscl_ray.evaluate.tables import default_measures
from mpscl_ray.predict.model import read_model
from mpscl_ray.predict.predictor import choose_device
from mpscl_ray.runs import json_output, safe_json, safe_yaml
from mpscl_ray.runs.model_store import ModelStore, open_model
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
    choose: bool | None = None,
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
        choose: whether to choose the postprocessing first (:mod:`mpscl_ray.evaluate.choose_postprocessing`); None does
            what the run's ``run.choose_postprocessing`` says, and ``run.calibrate_quality``.

    Returns:
        Phase -> evaluation; empty, and nothing is written, if no volume of the target is labelled.

    Raises:
        As :func:`evaluate_checkpoint`.
    """
    home = open_run(run)
    how: dict[str, Any] = {"device": device, "workers": workers, "progress": progress, "place": place}
    settings = safe_yaml.load(home.read_config()).get("run", {}) if choose is None else {}
    for name in weights_of(home, phases):
        if choose or settings.get("choose_postprocessing"):
            chosen = choose_postprocessing(home, name, **how)
            if progress:
                print(f"postprocessing of {chosen}", flush=True)
        if settings.get("calibrate_quality"):
            _calibrate_or_say(home, name, how)
    folder, manifest, _ = find_dataset(home.display_path, read_model(home), None)
    split = next((name for name in ("test", "val") if any(case.labelled for case in manifest.split(name))), None)
    if split is None:
        return {}
    done = {phase: evaluate_checkpoint(home, phase, split=split, **how) for phase in phases}
    rows = {evaluation.row_label: evaluation.summary for evaluation in done.values()}
    volumes = next(iter(rows.values())).volumes
    kind = "test" if split == "test" else "validation"
    heading = f"{counted(volumes, f'labelled {kind} volume')} of {manifest.modality}"
    if split == "val":
        heading += " (no test volume is labelled)"
    protocol = next(iter(done.values())).protocol
    heading += f"; scored: {PROTOCOLS[protocol]}"
    rules = {phase: evaluation.postprocessing.to_json() for phase, evaluation in done.items()}
    about = {"split": split, "dataset": str(folder), "protocol": protocol, "postprocessing": rules}
    write_rows(home.results, "phases", heading, rows, about)
    home.store.upload(home.results)
    return done


def _calibrate_or_say(home: RunDirectory, name: str, how: Mapping[str, Any]) -> None:
    """Calibrate the quality of some weights; data that do not allow it do not fail a finished training."""
    try:
        found = calibrate_quality(home, name, **how)
    except DataError as error:
        print(f"note: {error}", file=sys.stderr)
    else:
        if how["progress"]:
            print(f"quality of {found}", flush=True)


def evaluate(options: argparse.Namespace) -> int:
    """Evaluate one checkpoint and print its table; returns the exit code."""
    if options.ray is None:
        choose_device(options.device)
    home = open_model(options.run)
    with connect(address=options.ray) if options.ray else nullcontext():
        place = inference_place(options.device) if options.ray else None
        how: dict[str, Any] = {"device": options.device, "workers": options.workers, "place": place}
        if options.calibrate_quality:
            return _calibrate(home, options.checkpoint, how)
        if options.choose_postprocessing:
            if options.checkpoint == "last":
                return _choose_and_evaluate_phases(home, how)
            print(f"postprocessing of {choose_postprocessing(home, options.checkpoint, **how)}", flush=True)
        evaluation = evaluate_checkpoint(
            home,
            options.checkpoint,
            data=options.data,
            split=options.split,
            out=options.out,
            device=options.device,
            workers=options.workers,
            postprocessing=options.postprocessing,
            protocol=options.protocol,
            place=place,
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


def _choose_and_evaluate_phases(home: RunDirectory, how: Mapping[str, Any]) -> int:
    """Choose the postprocessing of every phase, score the phases with it, and print their table."""
    phases = _finished_phases(home)
    chosen = [choose_postprocessing(home, name, **how) for name in weights_of(home, phases)]
    json_output.report(folder=join_location(home.display_path, "results"), postprocessing=chosen, scores=None)
    for rules in chosen:
        print(f"postprocessing of {rules}", flush=True)
    if not evaluate_phases(home, phases, choose=False, **how):
        print("no volume of the target is labelled, so nothing was scored")
        return 0
    json_output.report(scores=safe_json.read_object(home.results / PHASES_JSON))
    print(f"\n{(home.results / PHASES_TABLE).read_text(encoding='utf-8')}")
    print(f"written to {join_location(home.display_path, 'results')}; predict and export take the rules from now on")
    return 0


def _calibrate(home: RunDirectory, checkpoint: str, how: Mapping[str, Any]) -> int:
    """Calibrate the quality of every phase and of ``best``, or of another checkpoint than ``last`` alone."""
    names = [checkpoint]
    if checkpoint == "last" and not isinstance(home.store, ModelStore):
        names = weights_of(home, _finished_phases(home))
    found = [calibrate_quality(home, name, **how) for name in names]
    for calibrated in found:
        print(f"quality of {calibrated}")
    file = join_location(home.display_path, home.quality_file.name)
    print(f"written to {file}; predict, report and export take it from now on")
    json_output.report(folder=home.display_path, quality=found)
    return 0


def _finished_phases(home: RunDirectory) -> list[str]:
    home.require()
    phases = [phase for phase in read_model(home).phases if phase in home.store.finished_phases()]
    if not phases:
        raise DataError(f"the run {home.display_path} has finished no phase yet; train it, or give a --checkpoint")
    return phases
