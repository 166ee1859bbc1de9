"""Pictures of what each phase of a run brought: slices of a labelled volume, predicted before and after adaptation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpscl_ray.config.titles import phase_title
from mpscl_ray.data.dataset import load_manifest, read_case
from mpscl_ray.predict.predictor import find_checkpoint, load_weights, read_model
from mpscl_ray.runs.bucket_run import open_run
from mpscl_ray.runs.plots import panel, save_png
from mpscl_ray.runs.run_directory import RunFolder

SLICES = 4
"""Rows of a picture."""


def draw_phases(run: RunFolder | Path | str, phases: Sequence[str]) -> Path | None:
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
    chosen = _showing(arrays["label"])
    columns: dict[str, NDArray[np.integer]] = {}
    for phase in phases:
        predictor = load_weights(model, find_checkpoint(home, phase)[0])
        columns[phase_title(phase)] = predictor.predict_slices(arrays["image"])[chosen]
    columns["label"] = arrays["label"][chosen]
    picture = home.results / "phases.png"
    save_png(picture, panel(arrays["image"][chosen], columns, model.classes))
    home.publish(picture)
    return picture


def _showing(label: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Evenly spaced slices among those with a structure; among all where none has one."""
    shown = np.flatnonzero(label.reshape(len(label), -1).any(axis=1))
    candidates = shown if len(shown) else np.arange(len(label))
    places = np.linspace(0, len(candidates) - 1, min(SLICES, len(candidates)) + 2).round().astype(int)[1:-1]
    slices: NDArray[np.intp] = candidates[np.unique(places)]
    return slices
