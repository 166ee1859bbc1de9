"""How the target's features stand to the prototypes as the adaptation goes on: angles, and self-paced pseudo-labels.

Looked at on the target's validation volumes, at the start of the adaptation and at each validation, by all workers.
Worker 0 writes into the run folder:

features.jsonl
    One record a look (:mod:`mpscl_ray.runs.metrics_log`): global_step, phase, iteration, volumes, delta_th and counts
    of pixels at feature resolution: ``nearest``, ``selected`` and, where the volumes are labelled, ``label`` are
    histograms, a list for each class with a count for each of 180 degrees, of the angle between a feature and the
    prototype of its class. That is the nearest prototype's class for all pixels, the same for the pixels that the
    self-paced mask selects, and the class of the label. ``selected_confusion`` counts selected pixels by the label's
    class (row) and the pseudo-label (column).
pseudo_labels/slices.npz
    A few slices of the first validation volume: case, slice_index (K,), image (K, H, W) and, if labelled, label.
pseudo_labels/step-NNNNNNN.npz
    What a look saw on these slices: nearest (K, h, w) uint8, difference (K, h, w) float32, selected (K, h, w) bool.

Labels of validation volumes serve these evaluation curves alone; training and the choice of `best` never see them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpscl_ray.data.loader import Slices, collate
from mpscl_ray.data.parquet_reader import Arrays
from mpscl_ray.data.slice_selection import evenly_spaced
from mpscl_ray.distributed import collectives
from mpscl_ray.methods import base
from mpscl_ray.methods.losses import cosine_to_prototypes
from mpscl_ray.methods.mpscl import MPSCL
from mpscl_ray.methods.prototypes import downsample_labels
from mpscl_ray.methods.pseudo_labels import self_paced_pseudo_labels
from mpscl_ray.runs.atomic_files import storage_errors, write_atomically
from mpscl_ray.runs.metrics_log import MetricsLog

DEGREES = 180
"""Bins of an angle histogram."""

PANEL_SLICES = 3
"""Slices whose pseudo-labels are kept."""

SLICES_FILE = "slices.npz"


@dataclass(frozen=True)
class PseudoLabels:
    """What one look saw on the slices of the panel; h x w is the resolution of the features."""

    global_step: int
    nearest: NDArray[np.uint8]
    """(K, h, w): class of the nearest prototype."""
    difference: NDArray[np.float32]
    """(K, h, w): by how much the nearest prototype's cosine exceeds the second nearest's (Eq. 7)."""
    selected: NDArray[np.bool_]
    """(K, h, w): whether that is above delta_th, so that the pixel trains."""


class FeatureRecord:
    """The record of one run, by its folder. Making the object touches no file."""

    def __init__(self, run: Path) -> None:
        self._log = MetricsLog(run / "features.jsonl")
        self.panels = run / "pseudo_labels"

    # ---- writing ----

    def look(self, method: base.Method, slices: Slices | None, batch_size: int, place: Mapping[str, Any]) -> None:
        """Look at this worker's share of the validation volumes; worker 0 writes what all have seen.

        Nothing where the method has no prototypes that follow its features.

        Args:
            method: the same state on every worker.
            slices: validation split of the target; None where there is none.
            batch_size: slices at a time.
            place: global_step, phase and iteration.
        """
        if slices is None or not isinstance(method, MPSCL) or not (method.config.beta or method.config.gamma):
            return
        counts = _Counts(method)
        rank, world_size = collectives.rank(), collectives.world_size()
        for number, (case, arrays) in enumerate(slices.volumes(rank, world_size)):
            volume = collate(arrays)
            for start in range(0, len(volume["image"]), batch_size):
                counts.add(*(volume[name][start : start + batch_size] for name in ("image", "label") if name in volume))
            if rank == 0 and number == 0:
                self._write_panel(method, case.id, arrays, int(place["global_step"]))
        record = {**place, "volumes": len(slices.files.cases), **counts.reduced(slices.files.labels)}
        if rank == 0:
            self._log.append(record)

    def rewind(self, global_step: int) -> None:
        """Drop what was seen after a global step, which a resumed run sees again."""
        self._log.rewind(global_step)
        for step, file in self._panel_files():
            if step > global_step:
                file.unlink(missing_ok=True)

    def _write_panel(self, method: MPSCL, case: str, arrays: Arrays, global_step: int) -> None:
        chosen = evenly_spaced(np.arange(len(arrays["image"])), PANEL_SLICES)
        with storage_errors(self.panels):
            self.panels.mkdir(parents=True, exist_ok=True)
        if not (self.panels / SLICES_FILE).exists():
            kept: dict[str, NDArray[Any]] = {name: array[chosen] for name, array in arrays.items()}
            _save(self.panels / SLICES_FILE, {"case": np.array(case), "slice_index": chosen, **kept})
        cosine = _cosine(method, collate({"image": arrays["image"][chosen]})["image"])
        nearest, selected = self_paced_pseudo_labels(cosine, method.config.delta_th)
        two = cosine.topk(2, dim=1).values
        content: Arrays = {
            "nearest": nearest.cpu().numpy().astype(np.uint8),
            "difference": (two[:, 0] - two[:, 1]).cpu().numpy().astype(np.float32),
            "selected": selected.cpu().numpy(),
        }
        _save(self.panels / f"step-{global_step:07d}.npz", content)

    # ---- reading ----

    def read(self) -> list[dict[str, Any]]:
        """The records, in order; histograms as lists. Raises DataError where the file is damaged."""
        return self._log.read()

    def read_slices(self) -> dict[str, NDArray[Any]] | None:
        """Contents of slices.npz; None where nothing was recorded."""
        file = self.panels / SLICES_FILE
        return dict(np.load(file, allow_pickle=False)) if file.exists() else None

    def read_panels(self) -> list[PseudoLabels]:
        """What each look saw on the slices, in order."""
        return [PseudoLabels(step, **np.load(file, allow_pickle=False)) for step, file in self._panel_files()]

    def _panel_files(self) -> list[tuple[int, Path]]:
        found = ((re.fullmatch(r"step-(\d+)\.npz", file.name), file) for file in self.panels.glob("step-*.npz"))
        return sorted((int(match[1]), file) for match, file in found if match)


class _Counts:
    """Histograms of this worker."""

    def __init__(self, method: MPSCL) -> None:
        self.method = method
        number = method.num_classes
        zeros = torch.zeros(number, DEGREES, dtype=torch.float64, device=method.device)
        self.nearest, self.selected, self.label = zeros, zeros.clone(), zeros.clone()
        self.confusion = zeros.new_zeros(number, number)

    def add(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Count the pixels of slices (B, 1, H, W) and, where there are any, labels (B, H, W)."""
        cosine = _cosine(self.method, images)
        degrees = torch.rad2deg(torch.arccos(cosine.clamp(-1, 1))).long().clamp(0, DEGREES - 1)
        nearest, mask = self_paced_pseudo_labels(cosine, self.method.config.delta_th)
        of_nearest = degrees.gather(1, nearest[:, None])[:, 0]
        self.nearest += self._pairs(nearest, of_nearest, DEGREES)
        self.selected += self._pairs(nearest[mask], of_nearest[mask], DEGREES)
        if labels is not None:
            small = downsample_labels(labels.to(self.method.device), (cosine.shape[2], cosine.shape[3]))
            self.label += self._pairs(small, degrees.gather(1, small[:, None])[:, 0], DEGREES)
            self.confusion += self._pairs(small[mask], nearest[mask], self.method.num_classes)

    def _pairs(self, rows: Tensor, columns: Tensor, number: int) -> Tensor:
        size = self.method.num_classes * number
        return torch.bincount((rows * number + columns).flatten(), minlength=size).view(-1, number)

    def reduced(self, labelled: bool) -> dict[str, Any]:
        """The counts of all workers, as lists of integers."""
        sums = collectives.all_reduce_sums(self.nearest, self.selected, self.label, self.confusion)
        nearest, selected, label, confusion = (total.long().tolist() for total in sums)
        found: dict[str, Any] = {"delta_th": self.method.config.delta_th, "nearest": nearest, "selected": selected}
        return found | ({"label": label, "selected_confusion": confusion} if labelled else {})


def _cosine(method: MPSCL, images: Tensor) -> Tensor:
    """Cosine (B, C, h, w) of the features of slices (B, 1, H, W) to the prototypes, in evaluation mode."""
    features = method.evaluate(images).features
    return cosine_to_prototypes(features, method.prototypes)


def _save(file: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomically(file, buffer.getvalue())
