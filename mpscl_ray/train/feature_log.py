"""Log of the target's features during the adaptation: angles to the prototypes, and self-paced pseudo-labels.

All workers record it on the target's validation volumes, at the start of the adaptation and at each validation.
Worker 0 writes into the run folder:

features.jsonl
    One record each time (:mod:`mpscl_ray.runs.json_lines`): global_step, phase, iteration, volumes, delta_th and
    counts of pixels at feature resolution. ``nearest``, ``selected`` and, with labels, ``label`` are histograms of the
    angle between a feature and the prototype of its class: for each class a list with a count for each of 180 degrees.
    The class is that of the nearest prototype, for all pixels and for those that the self-paced mask selects, or that
    of the label. ``selected_confusion`` counts selected pixels by the label's class (row) and the pseudo-label
    (column).
pseudo_labels/slices.npz
    A few slices of the first validation volume: case, slice_index (K,), image (K, H, W) and, if labelled, label.
pseudo_labels/step-NNNNNNN.npz
    Pseudo-labels of these slices: nearest (K, h, w) uint8, difference (K, h, w) float32, selected (K, h, w) bool.

Labels of validation volumes are used for these curves alone, never for training or for the choice of `best`.
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

from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.data.loader import collate
from mpscl_ray.data.parquet_reader import Arrays
from mpscl_ray.data.slice_selection import evenly_spaced
from mpscl_ray.data.slices import Slices
from mpscl_ray.distributed import collectives
from mpscl_ray.errors import DataError
from mpscl_ray.methods.base import Method
from mpscl_ray.methods.prototypes import PrototypeClassifier, downsample_labels, self_paced_pseudo_labels
from mpscl_ray.runs import safe_npz
from mpscl_ray.runs.atomic_files import storage_errors, write_atomically
from mpscl_ray.runs.json_lines import MetricsLog

DEGREES = 180
"""Bins of an angle histogram."""

PANEL_SLICES = 3
"""Slices whose pseudo-labels are kept."""

SLICES_FILE = "slices.npz"


@dataclass(frozen=True)
class PseudoLabels:
    """Pseudo-labels of the kept slices at one step; h x w is the resolution of the features."""

    global_step: int
    nearest: NDArray[np.uint8]
    """(K, h, w): class of the nearest prototype."""
    difference: NDArray[np.float32]
    """(K, h, w): cosine of the nearest prototype minus that of the second nearest (Eq. 7)."""
    selected: NDArray[np.bool_]
    """(K, h, w): whether the difference is above delta_th, so that the pixel is trained on."""


class FeatureRecord:
    """The log of one run, by its folder, and without ``images`` numbers alone. The constructor touches no file."""

    def __init__(self, run: Path, *, images: bool = True) -> None:
        self._log, self._images = MetricsLog(run / "features.jsonl"), images
        self.panels = run / "pseudo_labels"

    # ---- writing ----

    def record(self, method: Method, slices: Slices | None, batch_size: int, position: Mapping[str, Any]) -> None:
        """Count pixels of this worker's share of the target's validation slices; worker 0 writes the sums over workers.

        Does nothing for a method without prototypes or a target without such slices. ``position`` is global_step, phase
        and iteration.
        """
        classifier = method.prototype_classifier
        if slices is None or classifier is None:
            return
        counts = _Counts(classifier)
        rank, world_size = collectives.rank(), collectives.world_size()
        for number, (case, arrays) in enumerate(slices.volumes(rank, world_size)):
            volume = collate(arrays)
            for start in range(0, len(volume["image"]), batch_size):
                counts.add(*(volume[name][start : start + batch_size] for name in ("image", "label") if name in volume))
            if rank == 0 and number == 0 and self._images:
                self._write_panel(classifier, case.id, arrays, int(position["global_step"]))
        record = {**position, "volumes": len(slices.files.cases), **counts.reduce(slices.files.labels)}
        if rank == 0:
            self._log.append(record)

    def rewind(self, global_step: int) -> None:
        """Drop what was recorded after a global step; a resumed run records it again."""
        self._log.rewind(global_step)
        for step, file in self._panel_files():
            if step > global_step:
                file.unlink(missing_ok=True)

    def _write_panel(self, classifier: PrototypeClassifier, case: str, arrays: Arrays, global_step: int) -> None:
        chosen = evenly_spaced(np.arange(len(arrays["image"])), PANEL_SLICES)
        with storage_errors(self.panels):
            self.panels.mkdir(parents=True, exist_ok=True)
        if not (self.panels / SLICES_FILE).exists():
            kept: dict[str, NDArray[Any]] = {name: array[chosen] for name, array in arrays.items()}
            _save(self.panels / SLICES_FILE, {"case": np.array(case), "slice_index": chosen, **kept})
        cosine = classifier.cosine(collate({"image": arrays["image"][chosen]})["image"])
        nearest, selected = self_paced_pseudo_labels(cosine, classifier.delta_th)
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
        return _load(file) if file.exists() else None

    def read_panels(self) -> list[PseudoLabels]:
        """Pseudo-labels of the kept slices, in the order of the steps."""
        return [PseudoLabels(step, **_load(file)) for step, file in self._panel_files()]

    def _panel_files(self) -> list[tuple[int, Path]]:
        found = ((re.fullmatch(r"step-(\d+)\.npz", file.name), file) for file in self.panels.glob("step-*.npz"))
        return sorted((int(match[1]), file) for match, file in found if match)


class _Counts:
    """Histograms of this worker."""

    def __init__(self, classifier: PrototypeClassifier) -> None:
        self.classifier, self.device = classifier, classifier.prototypes.device
        self.num_classes = number = len(classifier.prototypes)
        zeros = torch.zeros(number, DEGREES, dtype=torch.float64, device=self.device)
        self.nearest, self.selected, self.label = zeros, zeros.clone(), zeros.clone()
        self.confusion = zeros.new_zeros(number, number)

    def add(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Count the pixels of slices (B, 1, H, W) and, where there are any, labels (B, H, W)."""
        cosine = self.classifier.cosine(images)
        degrees = torch.rad2deg(torch.arccos(cosine.clamp(-1, 1))).long().clamp(0, DEGREES - 1)
        nearest, mask = self_paced_pseudo_labels(cosine, self.classifier.delta_th)
        of_nearest = degrees.gather(1, nearest[:, None])[:, 0]
        self.nearest += self._pairs(nearest, of_nearest, DEGREES)
        self.selected += self._pairs(nearest[mask], of_nearest[mask], DEGREES)
        if labels is not None:
            small = downsample_labels(labels.to(self.device), (cosine.shape[2], cosine.shape[3]))
            known = small != NOT_ANNOTATED
            of_label = degrees.gather(1, (small * known)[:, None])[:, 0]
            self.label += self._pairs(small[known], of_label[known], DEGREES)
            self.confusion += self._pairs(small[mask & known], nearest[mask & known], self.num_classes)

    def _pairs(self, rows: Tensor, columns: Tensor, number: int) -> Tensor:
        size = self.num_classes * number
        return torch.bincount((rows * number + columns).flatten(), minlength=size).view(-1, number)

    def reduce(self, labelled: bool) -> dict[str, Any]:
        """The counts of all workers, as lists of integers."""
        sums = collectives.all_reduce_sums(self.nearest, self.selected, self.label, self.confusion)
        nearest, selected, label, confusion = (total.long().tolist() for total in sums)
        found: dict[str, Any] = {"delta_th": self.classifier.delta_th, "nearest": nearest, "selected": selected}
        return found | ({"label": label, "selected_confusion": confusion} if labelled else {})


def _load(file: Path) -> dict[str, NDArray[Any]]:
    try:
        return safe_npz.read(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is damaged ({error}); remove it") from error


def _save(file: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomically(file, buffer.getvalue())
