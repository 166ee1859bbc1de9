"""Images of a labelled volume with the predictions at the end of each phase of a run."""

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
"""Rows of an image."""


def draw_phases(run: RunDirectory | Path | str, phases: Sequence[str]) -> Path | None:
    """Write ``results/phases.png``: image, prediction at the end of each phase, label.

    The slices are evenly spaced among those that show a structure, of the first labelled test volume of the target
    (validation volume where no test volume is labelled). The phases are finished.

    Returns:
        The file; None where the target has no labelled volume.
    """
    folder = open_run(run)
    model = read_model(folder)
    dataset = model.domains["target"].dataset
    assert dataset is not None
    manifest = load_manifest(dataset)
    case = next((case for split in ("test", "val") for case in manifest.split(split) if case.labelled), None)
    if case is None:
        return None
    arrays = read_case(dataset, case)
    chosen = evenly_spaced(labelled_slices(arrays["label"]), SLICES)
    columns: dict[str, NDArray[np.integer]] = {}
    for phase in phases:
        predictor = load_weights(model, find_checkpoint(folder, phase)[0])
        columns[phase_title(phase)] = predictor.predict_slices(arrays["image"][chosen])
    columns["label"] = arrays["label"][chosen]
    image = folder.results / "phases.png"
    save_png(image, panel(arrays["image"][chosen], columns, model.classes))
    folder.store.upload(image)
    return image
