"""``python -m mpscl_ray.evaluate RUN``: Dice and surface distance of a trained segmenter on labelled volumes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mpscl_ray import cli
from mpscl_ray.bucket_run import open_run
from mpscl_ray.data import SPLITS
from mpscl_ray.errors import ConfigError
from mpscl_ray.evaluation import Evaluation, evaluate_checkpoint, find_dataset, json_text, write_tables
from mpscl_ray.inference import choose_device, read_model
from mpscl_ray.run_folder import RunFolder
from mpscl_ray.score_table import default_measures, format_table, summary_csv
from mpscl_ray.storage import child

__all__ = ["PHASES_TABLE", "Evaluation", "evaluate_checkpoint", "evaluate_phases", "main"]

PHASES_TABLE = "phases.txt"
"""File in a run's results with a row for each phase; ``phases.md``, ``.csv`` and ``.json`` have the same."""

_EXAMPLES = """\
examples:
  python -m mpscl_ray.evaluate runs/mpscl                                  last checkpoint, test split of the target
  python -m mpscl_ray.evaluate runs/mpscl --checkpoint source_only         the end of the first phase
  python -m mpscl_ray.evaluate runs/mpscl --data DATA/ct --split val       another dataset or split
  python -m mpscl_ray.evaluate runs/mpscl --checkpoint mr2ct.pth --released-protocol
                                                                           released weights, the papers' way of counting

RUN/results/NAME/ gets per_volume.csv, summary.csv, summary.md and summary.json.
"""


def evaluate_phases(
    run: RunFolder | Path | str,
    phases: Sequence[str],
    *,
    device: str | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Evaluation]:
    """Evaluate the end of each phase on the target and write ``results/phases.{txt,md,csv,json}``, a row per phase.

    The volumes are those of the test split; where none of them is labelled, those of the validation split, and the
    table says so.

    Args:
        run: folder, or URL, of a run whose phases are finished.
        phases: their names, in order.
        device: see :func:`evaluate_checkpoint`.
        workers: see :func:`evaluate_checkpoint`.
        progress: whether to show progress lines.

    Returns:
        Phase -> evaluation; empty, with nothing written, where no volume of the target is labelled.

    Raises:
        As :func:`evaluate_checkpoint`.
    """
    home = open_run(run)
    folder, manifest, _ = find_dataset(home.place, read_model(home), None)
    split = next((name for name in ("test", "val") if any(case.labelled for case in manifest.split(name))), None)
    if split is None:
        return {}
    done = {
        phase: evaluate_checkpoint(home, phase, split=split, device=device, workers=workers, progress=progress)
        for phase in phases
    }
    rows = {evaluation.row_label: evaluation.summary for evaluation in done.values()}
    volumes = next(iter(rows.values())).volumes
    heading = f"{volumes} labelled {'test' if split == 'test' else 'validation'} volumes of {manifest.modality}"
    if split == "val":
        heading += " (no test volume is labelled)"
    write_tables(
        home.results,
        {
            PHASES_TABLE: f"{heading}\n\n{format_table(rows)}\n",
            "phases.md": f"{heading}\n\n{format_table(rows, style='markdown')}\n",
            "phases.csv": summary_csv(rows),
            "phases.json": json_text(
                {"split": split, "dataset": str(folder), "rows": {k: v.to_json() for k, v in rows.items()}}
            ),
        },
    )
    home.publish(home.results)
    return done


def main(arguments: Sequence[str]) -> int:
    """Evaluate one checkpoint and print its table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mpscl_ray.evaluate",
        description="Dice and average surface distance of a run's segmenter on labelled volumes; every slice counts.",
        epilog=f"{_EXAMPLES}\n{cli.EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of the run, or its URL")
    add("--checkpoint", default="last", help="last (default), best, a phase, a name in RUN/checkpoints, or a path")
    add("--data", metavar="FOLDER", help="prepared dataset, or its URL (default: the run's target)")
    add("--split", default="test", choices=SPLITS, help="which volumes (default: test)")
    add("--out", metavar="DIR", help="folder for the tables, or its URL (default: RUN/results/NAME)")
    add(
        "--workers",
        type=int,
        metavar="N",
        help="volumes at a time, on Ray; 0 in this process (default: by their number)",
    )
    add("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    add("--largest-component", action="store_true", help="keep only the largest connected part of each structure")
    add(
        "--released-protocol", action="store_true", help="count as the released code does, to compare published numbers"
    )
    options = parser.parse_args(list(arguments))
    if options.workers is not None and options.workers < 0:
        raise ConfigError(f"--workers is {options.workers}; expected 0 or more")
    choose_device(options.device)
    home = open_run(options.run)
    evaluation = evaluate_checkpoint(
        home,
        options.checkpoint,
        data=options.data,
        split=options.split,
        out=options.out,
        device=options.device,
        workers=options.workers,
        largest_component=options.largest_component,
        released_protocol=options.released_protocol,
    )
    measures = (*default_measures([evaluation.summary]), "asd_voxel")
    print(f"{evaluation.modality}, {len(evaluation.scores)} volumes of the split {evaluation.split}\n")
    print(evaluation.table(measures=list(dict.fromkeys(measures))))
    for notice in evaluation.notices:
        print(f"note: {notice}")
    print(f"\nwritten to {options.out or child(home.place, 'results', evaluation.name)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
