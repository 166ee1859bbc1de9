"""What the train command prints: the run in short, its progress, its results and what to do next."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpscl_ray.config import Config, reads_target
from mpscl_ray.config.titles import phase_title
from mpscl_ray.evaluate.run import PHASES_JSON, PHASES_TABLE
from mpscl_ray.runs import json_output, safe_json
from mpscl_ray.runs.control_files import WARNINGS_FILE, WORKER_FAILURES_FILE
from mpscl_ray.runs.next_steps import command_line, logger_lines
from mpscl_ray.runs.progress import ProgressLine
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.runs.storage import join_location
from mpscl_ray.runs.structures import display_order
from mpscl_ray.runs.wording import counted
from mpscl_ray.train.domains import Domains
from mpscl_ray.train.streams import TrainingData


def summary(config: Config, folder: RunDirectory, domains: Domains, data: TrainingData, use_gpu: bool) -> str:
    """What a run trains on, with what, and for how long."""
    source, target = domains.source, domains.target
    phases = ", ".join(f"{phase_title(name)} {iterations}" for name, iterations in config.schedule)
    unlabelled = (
        f"{counted(data.unlabelled.files.rows, f'{target.modality} slice')} without labels"
        if data.unlabelled
        else "no other slices"
    )
    labelled = target.modality if config.data.labelled_domain == "target" else source.modality
    return (
        f"run {folder.name} in {folder.display_path}: {config.method_name}, {source.modality} to {target.modality}, "
        f"structures {', '.join(display_order(domains.classes[1:]))}\n"
        f"  trains on {counted(data.labelled.files.rows, f'labelled {labelled} slice')} and {unlabelled}, "
        f"{config.scaling.describe(use_gpu)}\n"
        f"  iterations: {phases}; the target's labels are not used for training"
        + (" (except here: the supervised bound)" if config.data.labelled_domain == "target" else "")
        + ("; best is chosen with target labels (oracle)" if config.run.select == "oracle" else "")
        + (
            f"\n  follow it in {join_location(folder.display_path, 'progress.html')}"
            if config.run.progress_page
            else ""
        )
    )


class ProgressDisplay:
    """Shows the metrics and warnings that the workers write into the run folder, from now on."""

    def __init__(self, config: Config, folder: RunDirectory) -> None:
        self.config, self.folder = config, folder
        self.phase = ""
        self.line: ProgressLine | None = None
        self.shown_step = max((record["global_step"] for record in folder.read_metrics()), default=0)
        self.metrics_size = -1
        self.shown_bytes = {
            file: file.stat().st_size if file.exists() else 0
            for file in (folder.logs / WARNINGS_FILE, folder.logs / WORKER_FAILURES_FILE)
        }

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, *exception: object) -> None:
        self._end_line()

    def update(self) -> None:
        """Show what is new; called several times a second."""
        for file, shown in self.shown_bytes.items():
            if file.exists() and file.stat().st_size > shown:
                self._show_warnings(file)
        size = self.folder.metrics_file.stat().st_size if self.folder.metrics_file.exists() else 0
        if size == self.metrics_size:
            return
        self.metrics_size = size
        records = self.folder.read_metrics()
        last_step = records[-1]["global_step"] if records else 0
        if self.shown_step > last_step:  # the workers resumed from a checkpoint
            self.shown_step = last_step
            self._end_line()
        for record in records:
            if record["global_step"] > self.shown_step:
                self.shown_step = record["global_step"]
                self._show_metrics(record)

    def _show_metrics(self, record: Mapping[str, Any]) -> None:
        if record["phase"] != self.phase or self.line is None:
            self._end_line()
            self.phase = record["phase"]
            domains = 2 if reads_target(self.phase) else 1
            self.line = ProgressLine(
                record["iterations"],
                phase_title(self.phase),
                images_per_iteration=domains * self.config.data.global_batch_size,
                start=record["iteration"],
            )
        self.line.update(record["iteration"], loss=record.get("train/loss_segmentation"))
        parts = [
            f"{domain} Dice {record[f'{prefix}/dice/mean']:.3f}"
            for domain, prefix in (("target", "val"), ("source", "val/source"))
            if f"{prefix}/dice/mean" in record
        ]
        if parts:
            self.line.message(f"  {phase_title(self.phase)} {record['iteration']}: validation {', '.join(parts)}")

    def _end_line(self) -> None:
        if self.line is not None:
            self.line.close()
            self.line = None

    def _show_warnings(self, file: Path) -> None:
        with file.open("rb") as stream:
            stream.seek(self.shown_bytes[file])
            new = stream.read()
        complete = new[: new.rfind(b"\n") + 1]
        self.shown_bytes[file] += len(complete)
        for sentence in complete.decode("utf-8", "replace").splitlines():
            if self.line is not None:
                self.line.message(sentence)
            else:
                print(sentence, file=sys.stderr, flush=True)


def print_results(folder: RunDirectory) -> None:
    """Print the table of the phases' scores."""
    table, scores = folder.results / PHASES_TABLE, folder.results / PHASES_JSON
    json_output.report(run=folder.display_path, scores=safe_json.read_object(scores) if scores.exists() else None)
    if table.exists():
        print(f"\n{table.read_text(encoding='utf-8')}")
    else:
        print("\nno test or validation volume of the target is labelled, so there is no table of scores")


def print_next_steps(folder: RunDirectory, loggers: Sequence[str]) -> None:
    """Print the commands that work with a finished run."""
    run = folder.display_path
    commands = [
        command_line("predict", run, "IMAGE.nii.gz", "--out", "predictions"),
        command_line("report", run, "--out", "report"),
        *logger_lines(join_location(run), loggers),
    ]
    table = folder.results / PHASES_JSON
    if table.exists():
        split = safe_json.read_object(table)["split"]
        commands.insert(0, command_line("evaluate", run, *(["--split", split] if split != "test" else [])))
    json_output.report(next=commands)
    print(
        f"\n{run} has the tables (results/), curves (progress.png) and checkpoints. Next:\n  " + "\n  ".join(commands)
    )
