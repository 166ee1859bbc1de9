"""The page of a report and its figures: what the report command does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from mpscl_ray.predict.predictor import choose_device
from mpscl_ray.report.case_sections import case_by_case, curves_section
from mpscl_ray.report.figures.style import DPI
from mpscl_ray.report.groups import group_runs, predict_group, read_group
from mpscl_ray.report.html import page
from mpscl_ray.report.runs import read_runs
from mpscl_ray.report.sections import overview, sections
from mpscl_ray.report.viewer import viewer_data, viewer_files
from mpscl_ray.runs.atomic_files import storage_errors, write_atomically
from mpscl_ray.runs.palette import hex_colour
from mpscl_ray.runs.structures import display_indices
from mpscl_ray.runs.wording import counted

MAX_SIZE_MB = 200
"""Largest size of the volumes on a page, unless another is asked for: browsers open larger pages slowly."""


def report(
    runs: Sequence[Path],
    out: Path | None = None,
    *,
    case: str | None = None,
    device: str | None = None,
    dpi: float = DPI,
    pdf: bool = True,
    images: bool = True,
    volumes: bool = True,
    max_size_mb: float = MAX_SIZE_MB,
) -> Path:
    """Make the page and the figures.

    Args:
        runs: folders of runs.
        out: folder for the report; None for ``RUN/report`` of one run, ``report`` beside the first of several.
        case: volume of the target to show; None for the first labelled test volume.
        device: of the predictions; None takes a GPU where there is one.
        dpi: pixels of the figures per inch.
        pdf: whether to write each figure as PDF too.
        images: whether there are images of patients; without, nothing is predicted, and the page has numbers alone.
        volumes: whether the page has a viewer with the volumes of all test cases, which are predicted for it.
        max_size_mb: largest size of these volumes on the page; of the best cases they are left out.

    Returns:
        The page.

    Raises:
        ConfigError: no such run or case.
        DataError: a run or a dataset is damaged.
        StorageError: the folder cannot be written.
    """
    choose_device(device)  # Refuses a missing device before anything is read.
    found = read_runs(runs)
    first = Path(runs[0])
    folder = out or (first / "report" if len(runs) == 1 else first.absolute().parent / "report")
    with storage_errors(folder):
        (folder / "figures").mkdir(parents=True, exist_ok=True)
    groups = group_runs(found)
    for group in groups:
        if images:
            predict_group(group, case, device, volumes)
        else:
            read_group(group)
    print("drawing", flush=True)
    directions = list(dict.fromkeys(run.direction for run in found))
    names = ", ".join(f"{run.title} ({run.folder.name}, {run.state})" for run in found)
    structures = {group.classes[i]: hex_colour(i) for group in groups for i in display_indices(group.classes)}
    text = page(
        title=f"Adaptation {' and '.join(directions)}",
        summary=f"{counted(len(found), 'run')}: {names}.",
        sections=[
            overview(groups),
            *case_by_case(groups, max_size_mb, folder / "figures", dpi, pdf),
            *curves_section(groups),
            *sections(groups, folder / "figures", dpi, pdf),
        ],
        structures=list(structures.items()),
        settings=[(run.folder.name, yaml.safe_dump(dict(run.config), sort_keys=False)) for run in found],
        viewer=viewer_data(groups),
        files=viewer_files(groups),
    )
    write_atomically(folder / "index.html", text.encode())
    return folder / "index.html"
