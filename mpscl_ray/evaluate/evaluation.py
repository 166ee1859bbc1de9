"""The result of an evaluation, and its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mpscl_ray import __version__
from mpscl_ray.evaluate.metrics import StructureScore
from mpscl_ray.evaluate.table_files import json_text, score_json, write_tables
from mpscl_ray.evaluate.tables import (
    LEGEND,
    Style,
    Summary,
    default_measures,
    format_table,
    scores_csv,
    summary_csv,
)
from mpscl_ray.predict.model import Checkpoint
from mpscl_ray.predict.postprocessing import Postprocessing
from mpscl_ray.runs.storage import S3Path
from mpscl_ray.runs.wording import counted

RELEASED_PROTOCOL = (
    "RELEASED PROTOCOL, only for comparison with published numbers: the last (slices mod 32) slices of each volume "
    "are left background, ASD is in voxels (mean of two means), a structure missing in prediction or truth has ASD 1, "
    "and Dice of a structure that is in neither is 0."
)
Protocol = Literal["file", "prepared", "released"]
"""On what scores are taken: the label maps that predict writes, on the grid of the image files; the prepared slices, as
papers do; or these as the released code does."""
PROTOCOLS: Mapping[str, str] = {
    "file": "label maps as predict writes them, on the grid of the image files",
    "prepared": "PREPARED SLICES, as in papers, on the grid after resampling and crop",
    "released": RELEASED_PROTOCOL,
}
_FURTHER = ("asd_mm_mean_of_means", "asd_voxel", "asd_voxel_mean_of_means")
"""Additional measures in ``summary.md``."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of one checkpoint on the labelled volumes of one split."""

    name: str
    """Name, also of its folder in the run's results."""
    run: str
    weights: Checkpoint
    dataset: Path | S3Path
    modality: str
    fingerprint: str
    """Fingerprint of the dataset."""
    split: str
    postprocessing: Postprocessing
    protocol: Protocol
    classes: tuple[str, ...]
    slices: Mapping[str, int]
    """Number of slices of each case; all are predicted."""
    scores: Mapping[str, Sequence[StructureScore]]
    """Scores of each case, one for each structure."""
    summary: Summary
    notices: tuple[str, ...]
    """Warnings on the numbers."""

    @property
    def row_label(self) -> str:
        """Label of its row in a table; says if target labels selected the checkpoint or the postprocessing."""
        return self.weights.name + (" (oracle)" if self.weights.oracle or self.postprocessing.oracle else "")

    def table(self, style: Style = "text", measures: Sequence[str] | None = None) -> str:
        """The summary as a table with one row."""
        rows = {self.row_label: self.summary}
        if self.protocol == "released":
            chosen = ("dice", "asd_voxel_mean_of_means")
            table = format_table(rows, chosen, style, legend=False)
            return f"{table}\n\n{RELEASED_PROTOCOL}"
        return format_table(rows, measures, style)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values; an undefined number is null."""
        return {
            "name": self.name,
            "product_version": __version__,
            "run": self.run,
            "checkpoint": {**asdict(self.weights), "path": str(self.weights.path), "oracle": self.weights.oracle},
            "dataset": {"path": str(self.dataset), "modality": self.modality, "fingerprint": self.fingerprint},
            "split": self.split,
            "postprocessing": self.postprocessing.described(),
            "protocol": self.protocol,
            "explanation": PROTOCOLS[self.protocol] + ("" if self.protocol == "released" else f". {LEGEND}"),
            "classes": list(self.classes),
            "notices": list(self.notices),
            "summary": self.summary.to_json(),
            "volumes": {
                case: {"slices": self.slices[case], "scores": [score_json(score) for score in rows]}
                for case, rows in self.scores.items()
            },
        }


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Write ``per_volume.csv``, ``summary.csv``, ``summary.md`` and ``summary.json``."""
    about = [
        f"# {evaluation.name}",
        f"Run `{evaluation.run}`, checkpoint `{evaluation.weights.path}`"
        + (f" (iteration {evaluation.weights.step})" if evaluation.weights.step is not None else "")
        + f", {counted(len(evaluation.scores), 'volume')} ("
        f"{counted(sum(evaluation.slices.values()), 'slice')}, all predicted) of the split "
        f"{evaluation.split} of `{evaluation.dataset}` ({evaluation.modality}).",
        *([] if evaluation.protocol == "released" else [f"Scored: {PROTOCOLS[evaluation.protocol]}."]),
        *([f"Postprocessing: {evaluation.postprocessing}."] if evaluation.postprocessing else []),
        *(f"Note: {notice}." for notice in evaluation.notices),
        evaluation.table("markdown", (*default_measures([evaluation.summary]), *_FURTHER)),
    ]
    write_tables(
        folder,
        {
            "per_volume.csv": scores_csv(evaluation.scores),
            "summary.csv": summary_csv({evaluation.row_label: evaluation.summary}),
            "summary.md": "\n\n".join(about) + "\n",
            "summary.json": json_text(evaluation.to_json()),
        },
    )


def write_rows(folder: Path, name: str, heading: str, rows: Mapping[str, Summary], about: Mapping[str, Any]) -> None:
    """Write ``NAME.txt``, ``.md``, ``.csv`` and ``.json`` with a row for each summary; ``about`` is in the last."""
    write_tables(
        folder,
        {
            f"{name}.txt": f"{heading}\n\n{format_table(rows)}\n",
            f"{name}.md": f"{heading}\n\n{format_table(rows, style='markdown')}\n",
            f"{name}.csv": summary_csv(rows),
            f"{name}.json": json_text({**about, "rows": {label: row.to_json() for label, row in rows.items()}}),
        },
    )
