"""Pictures of what each phase of a run brought: slices of a labelled volume, predicted before and after adaptation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpscl_ray.config.titles import phase_title
from mpscl_ray.data.dataset import load_manifest
from mpscl_ray.data.parquet_reader import read_case
from mpscl_ray.data.slice_selection import evenly_spaced, labelled_slices
from mpscl_ray.predict.model import find_checkpoint, read_model
from mpscl_ray.predict.predictor import load_weights
from mpscl_ray.runs.plots import panel, save_png
from mpscl_ray.runs.run_directory import RunDirectory, open_run

SLICES = 4
"""Rows of a picture."""


def draw_phases(run: RunDirectory | Path | str, phases: Sequence[str]) -> Path | None:
    """Write ``results/phases.png``: image, prediction at the end of each phase, label.

    The slices are the evenly spaced ones among those that show a structure, of the first labelled test volume of the
    target (validation volume where no test volume is labelled).

    Args:
        run: folder, or URL, of a run whose phases are finished.
        phases: their names, in order.

    Returns:
        The picture; None where the target has no labelled volume.
    """
    home = open_run(run)
    model = read_model(home)
    folder = model.domains["target"].dataset
    assert folder is not None
    manifest = load_manifest(folder)
    case = next((case for split in ("test", "val") for case in manifest.split(split) if case.labelled), None)
    if case is None:
        return None
    arrays = read_case(folder, case)
    chosen = evenly_spaced(labelled_slices(arrays["label"]), SLICES)
    columns: dict[str, NDArray[np.integer]] = {}
    for phase in phases:
        predictor = load_weights(model, find_checkpoint(home, phase)[0])
        columns[phase_title(phase)] = predictor.predict_slices(arrays["image"])[chosen]
    columns["label"] = arrays["label"][chosen]
    picture = home.results / "phases.png"
    save_png(picture, panel(arrays["image"][chosen], columns, model.classes))
    home.store.upload(picture)
    return picture
